"""What cases would else import one by one: DeepSpeed, PEFT, and transformers' Trainer. Imports only; nothing here may touch a GPU."""

from pipeline import lean_imports

lean_imports.import_peft()
lean_imports.import_deepspeed()
from transformers import LlamaForCausalLM, Trainer  # noqa: E402, F401
