"""What this project needs of torch's insides, in one place: there is nothing public that does the same.

torch_private.check()      # before any weight is read
torch_private.multiply(gradients, 0.5)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.libraries.needed import need

if TYPE_CHECKING:
    import torch

REQUIREMENT = "torch>=2.6,<3"  # as pyproject.toml has it


def check() -> None:
    """ValueError, one sentence, where the torch that is installed lacks a name that a training uses."""
    state = "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._register_pre_backward_hook"
    names = ["torch:_foreach_mul_", "torch.distributed.fsdp:FSDPModule._get_fsdp_state", state]
    need("torch", REQUIREMENT, names)


def multiply(tensors: Sequence[torch.Tensor], factor: float) -> None:
    """Multiply all of them in place: in a few kernels on a GPU, where a loop starts one for each of hundreds."""
    import torch

    torch._foreach_mul_(list(tensors), factor)


def ends_with(module: Any, loss: torch.Tensor) -> None:
    """Have FSDP2 reduce the gradients of its root module's group at the end of the loss's backward pass.

    Its own hook for that is on the module's output, which a loss of activations alone does not use: nothing would be
    reduced, and no error raised.
    """
    module._get_fsdp_state()._register_pre_backward_hook(loss)


def broken_by_fork() -> Callable[[], bool]:
    """What tells a fork of this process whether CUDA had been asked anything. ValueError where torch cannot tell.

    `torch.cuda.is_initialized` knows of contexts alone: a count of devices breaks a fork, too. Where torch was not
    imported it is not imported here.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return lambda: False
    need("torch", REQUIREMENT, ["torch:cuda._is_in_bad_fork"])
    return torch.cuda._is_in_bad_fork
