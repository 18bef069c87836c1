"""Counts how often the host would wait for the device: at every tensor whose content decides what Python does next.

with counted() as found:
    step()
assert found == ["tolist"]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.recipe.sections import TrainSection

aten = torch.ops.aten
# Whose result has as many elements as the content says, or is a number of Python's.
_READS = (
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten._unique2,
)


class Reads(TorchDispatchMode):
    """Counts what a GPU would make the host wait for, by name; the CPU's own tensors are not told apart."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function.overloadpacket is aten.index and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if function.overloadpacket in _READS or by_mask:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """`tolist` and `numpy`, which copy a GPU's tensor without a word to the dispatcher where it is the CPU's."""

    def __init__(self, reads: Reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.tolist, torch.Tensor.numpy):
            self.reads.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """Names of what was read inside the block."""
    reads = Reads()
    with reads, Lists(reads):
        yield reads.found


def fused(parameters, train: TrainSection) -> torch.optim.Optimizer:
    """As on a GPU: the form for CPUs reads a counter of steps that is kept on the CPU on purpose."""
    return torch.optim.AdamW(parameters, lr=train.lr, fused=True)
