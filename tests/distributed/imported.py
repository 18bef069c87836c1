"""What ranks import, for the process that they are forked from (tests/distributed/ranks.py).

It starts no thread and computes nothing.
"""

import gc

import torch._dynamo  # noqa: F401  which the first optimizer step imports

from pipeline.engines import deepspeed_private, fsdp2, zero3  # noqa: F401
from pipeline.running import lean_imports
from pipeline.stages import evaluate, train  # noqa: F401

deepspeed_private.import_deepspeed()
lean_imports.import_peft()
gc.freeze()  # DeepSpeed collects garbage at every start of an engine: not among these
