"""What ranks import, for the process that they are forked from (tests/distributed/ranks.py). It starts no thread and computes nothing."""

from pipeline import lean_imports, stages  # noqa: F401
from pipeline.sharding import fsdp2, zero3  # noqa: F401

lean_imports.import_deepspeed()
lean_imports.import_peft()
