"""Products of a run: a PEFT adapter, or a merged model folder; in safetensors, re-opened and checked before they count.

save_adapter(engine, "models/base", Path("adapter"))     # PeftModel.from_pretrained(model, "adapter") loads it
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.models import load_model, resolve_dtype
from pipeline.recipe import ModelSection
from pipeline.sharding.engine import Engine


def save_adapter(engine: Engine, base_model: str, folder: Path) -> None:
    """Gather the adapter and write it as PEFT does, on rank 0; a collective call. AssertionError where the file does not hold what was trained."""
    from peft import get_peft_model_state_dict

    gathered = engine.gather(engine.weights())
    if engine.rank != 0:
        return
    folder.mkdir(parents=True)
    config = copy.deepcopy(engine.module.peft_config["default"])
    config.inference_mode, config.base_model_name_or_path = True, base_model
    state = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(engine.module, state_dict=gathered).items()}
    config.save_pretrained(str(folder))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    again = load_file(folder / "adapter_model.safetensors")
    assert len(again) == len(gathered), "the adapter's file lacks parameters"
    for name, tensor in state.items():
        assert tensor.numel() > 0 and torch.equal(again[name], tensor), f"{name} is not in the adapter's file as it was trained"


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """The model with a trained adapter, for inference."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder))


def save_merged(engine: Engine, source: str, section: ModelSection, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Merge the trained adapter into the model at `source` and save folder/model; a collective call, the merge is on rank 0."""
    save_adapter(engine, source, folder / "adapter")
    if engine.rank != 0:
        return
    model = load_adapter(load_model(source, torch.float32, section.attention, section.revision), folder / "adapter").merge_and_unload()
    model.to(resolve_dtype(section.dtype)).save_pretrained(folder / "model", safe_serialization=True)
    tokenizer.save_pretrained(folder / "model")
