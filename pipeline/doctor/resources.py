"""What a pass costs and what a rank holds: seconds, peak memory, bytes of weights.

with Meter(engine.device) as cost:
    engine.gradient(loss_fn, batches)
cost.seconds, cost.peak, cost.grown
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pipeline.engines.deepspeed_private import partition_of
from pipeline.engines.frozen import FrozenLayers

# bytes that a peak may lie above the present right after its reset, for it to count as reset
_UNRESET = 64 * 2**20


class Meter:
    """Time and peak memory of a block: allocated CUDA memory, or a CPU process's resident set.

    peak: bytes, None where it cannot be measured; grown: peak less what was there before.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.device = device
        self.seconds, self.before = 0.0, 0
        self.peak: int | None = None

    @property
    def grown(self) -> int | None:
        """Bytes by which the peak exceeds what was taken before; None where it was not measured."""
        return None if self.peak is None else self.peak - self.before

    def __enter__(self) -> Meter:
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.resettable = _reset_peak()
            self.before = _status("VmRSS")
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device)
        elif self.resettable:
            self.peak = _status("VmHWM")
        self.seconds = time.perf_counter() - self.started


def _reset_peak() -> bool:
    """Give freed memory back, then set the peak of the resident set to its present size.

    False where the kernel does not do that.
    """
    with contextlib.suppress(AttributeError, OSError):  # where it is not glibc
        # or what an earlier pass has freed would hide what this one takes
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM
        return _status("VmHWM") - _status("VmRSS") <= _UNRESET
    except OSError:
        return False


def _status(key: str) -> int:
    """A field of /proc/self/status in bytes; 0 where there is no such file."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


@dataclass(frozen=True)
class Held:
    """Bytes of weights on this rank.

    fair: what an even split gives it, rounded up; whole: the model; gathered: full copies that the engine keeps beside
    its shards. (Of frozen layers two are whole at any time, never the same for long: they do not count.)
    """

    shard: int
    fair: int
    whole: int
    gathered: int


def held_weights(module: nn.Module, world_size: int, frozen: FrozenLayers | None = None) -> Held:
    """Weights of any module: partitioned by ZeRO-3, DTensors of FSDP2, or plain tensors, which count whole.

    frozen: those that the engine's module has no more.
    """
    shard = fair = whole = gathered = 0
    for layer in frozen.layers if frozen else ():
        numel = sum(weight.nbytes for weight in layer.weights)
        shard, whole, fair = (
            shard + layer.part.nbytes,
            whole + numel,
            fair + -(-numel // world_size),
        )
    for p in module.parameters():
        size = p.element_size()
        cut = partition_of(p)
        if cut is not None:
            numel, local = cut.numel, cut.held.numel() * cut.held.element_size()
            gathered += numel * size if cut.gathered else 0
        elif isinstance(p, DTensor):
            numel, local = p.numel(), p.to_local().numel() * size
        else:
            numel, local = p.numel(), p.numel() * size
        shard, whole, fair = (
            shard + local,
            whole + numel * size,
            fair + -(-numel // world_size) * size,
        )
    return Held(shard, fair, whole, gathered)


def mebibytes(count: float | None) -> str:
    """A number of bytes in MiB, for a table."""
    return (
        "not measured"
        if count is None
        else f"{count / 2**20:.1f} MiB"
        if count < 2**27
        else f"{count / 2**20:.0f} MiB"
    )
