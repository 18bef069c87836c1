"""What this project needs of DeepSpeed's insides, in one place.

fetched_whole(decoder_layers(model))
with gradients_by_parameter():
    deepspeed.initialize(...)
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

_NAMED = "_named_parameters_of_leaf"  # what a leaf keeps of its own named_parameters()


def fetched_whole(blocks: Sequence[nn.Module]) -> None:
    """Have DeepSpeed fetch and release each block as a whole, with hooks on the block alone, in as little time as it can.

    It walks through a leaf's modules for their parameters at every fetch and release, opens a range for NVIDIA's profiler
    at every call, and asks for its rank for messages that it does not print. Raises ValueError where this version of it
    has other names.
    """
    import deepspeed
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.utils import nvtx

    for block in blocks:
        deepspeed.utils.set_z3_leaf_module(block, True)
        block.__dict__[_NAMED] = list(block.named_parameters())
    found, said = _private(coordinator, "get_all_parameters"), _private(partition_parameters, "print_rank_0")
    if not hasattr(found, "of_leaves"):

        def parameters(module: nn.Module, recurse: bool = False) -> Any:
            known = module.__dict__.get(_NAMED) if recurse else None
            return found(module, recurse) if known is None else itertools.chain(known, module.ds_external_parameters())

        parameters.of_leaves = True  # type: ignore[attr-defined]
        coordinator.get_all_parameters = parameters

        def print_rank_0(message: str, debug: bool = False, force: bool = False) -> None:
            if debug or force:
                said(message, debug, force)

        for module in (partition_parameters, coordinator):
            _private(module, "print_rank_0")
            module.print_rank_0 = print_rank_0
    _private(nvtx, "enable_nvtx")
    nvtx.enable_nvtx = False


@contextlib.contextmanager
def gradients_by_parameter() -> Iterator[None]:
    """Engines that are made inside take the gradient of each parameter of a leaf module as it comes, as elsewhere.

    DeepSpeed takes a leaf's gradients in a full backward hook on the module. It fires before they are there where the
    module's input needs no gradient (the first layer under LoRA), and leaves `grad` behind after passes that end no step.
    Raises ValueError where this version of DeepSpeed has no such distinction.
    """
    from deepspeed.runtime.zero import stage3

    leaf = _private(stage3, "z3_leaf_parameter")
    stage3.z3_leaf_parameter = lambda parameter: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = leaf


def _private(module: Any, name: str) -> Any:
    """A private name of DeepSpeed; ValueError with the version where it is not there."""
    import deepspeed

    if not hasattr(module, name):
        raise ValueError(f"deepspeed {deepspeed.__version__} has no {module.__name__}.{name}: install deepspeed 0.19.4 to 0.19.8")
    return getattr(module, name)
