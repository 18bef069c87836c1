"""Where a model that is evaluated lives: on the CPU, on the one GPU there is,
or spread over all that this process sees.

model = place(model)      # 70B in bfloat16 takes 140 GB: two or more GPUs of one node
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.libraries.transformers_private import not_moved, not_split
from pipeline.model.models import decoder_layers
from pipeline.running.devices import device

Memory = dict[int | str, int]


def place(model: nn.Module) -> nn.Module:
    """Move a whole model from the CPU to where it is computed. ValueError where it does not fit on the GPUs.

    Over several visible GPUs its layers are spread in order, and accelerate's hooks carry the activations from one to
    the next, so only one computes at a time: it is for models that no single GPU holds. Inputs go to the device of the
    first parameter (the embeddings). `sap evaluate` gives every process one GPU. **Not run on GPUs yet**: the tests see
    the map of layers, and the hooks on a CPU only.
    """
    if torch.cuda.device_count() < 2:
        return model.to(device())
    return dispatch(model, device_map(model))


def device_map(model: nn.Module, max_memory: Memory | None = None) -> dict[str, Any]:
    """Names of modules -> GPU; equal shares, no decoder layer split.

    max_memory: bytes of every GPU; default: what is free on them.

    ValueError where the GPUs are too small: accelerate would leave the rest on the CPU or the disk and take days.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = sorted({type(layer).__name__ for layer in decoder_layers(model)} | not_split(model))
    balanced = get_balanced_memory(model, max_memory=max_memory, no_split_module_classes=whole)
    placed = infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=whole)
    if not all(isinstance(where, int) for where in placed.values()):
        gpus = sum(isinstance(where, int) for where in balanced)
        raise ValueError(
            f"the model to evaluate does not fit on the {gpus} GPUs that this process sees: give "
            "it more of them, or larger ones"
        )
    return placed


def dispatch(model: nn.Module, placed: dict[str, Any], force_hooks: bool = False) -> nn.Module:
    """Spread `model` as `placed` says. force_hooks: also where it is all one device, which is for tests."""
    from accelerate import dispatch_model

    # The keys and values of a layer stay where the layer is: carried along, they would travel at every token.
    return dispatch_model(model, placed, skip_keys=not_moved(model), force_hooks=force_hooks)
