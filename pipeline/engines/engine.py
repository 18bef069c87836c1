"""The verbs every engine offers, and what they promise.

Batches are this rank's micro-batches of one global step. A loss function returns a micro-batch's *share* of the global
loss: shares add up over micro-batches and ranks, so no engine weighs anything and 1 or N ranks compute the same
numbers.

Returned losses are global: 0-dimensional float64 tensors on the engine's device, which `read` turns into numbers. A GPU
works behind the host that feeds it, and has nothing to do while the host waits for a number: so a step reads once.

A `ShardedVector` is what one rank holds of a vector over all trainable parameters: float32 tensors in the engine's own
order, padding zeroed. Two shards of one engine may be combined elementwise; only `norm` and `dot` see the whole vector.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from pipeline.engines.frozen import FrozenLayers
from pipeline.libraries import torch_private

ShardedVector = list[torch.Tensor]
_JOINED = 2**22  # elements: tensors are put end to end up to these


class Batch(Protocol):
    """A micro-batch of one rank, as its loss function takes it."""

    def to(self, device: torch.device) -> Self:
        """What a pass needs of it, on the device."""


B = TypeVar("B", bound=Batch)
LossFunction = Callable[[nn.Module, B], torch.Tensor]


class Engine(ABC):
    """One model, sharded or not, with its optimizer."""

    module: nn.Module
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    frozen: FrozenLayers | None = None  # weights of layers that are cut, and are no parameters

    @abstractmethod
    def forward_backward(
        self, loss_fn: LossFunction[B], batches: Sequence[B], v: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Main pass: the gradient of the step, kept for `step`. At most once a step, after all auxiliary passes.

        v: leaf tensors outside the module; their gradient (len(v), D) comes from the same backward, summed over ranks.
        """

    @abstractmethod
    def gradient(
        self, loss_fn: LossFunction[B], batches: Sequence[B]
    ) -> tuple[torch.Tensor, ShardedVector]:
        """Auxiliary pass: the gradient's shard, a copy.

        Leaves no trace in weights, gradients, optimizer or counters.
        """

    @abstractmethod
    def probe_gradient(
        self, loss_fn: LossFunction[B], batches: Sequence[B], v: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Auxiliary pass: the gradient (len(v), D) with respect to v alone;
        backward stops at the lowest probed layer.
        """

    @abstractmethod
    def perturbed(self, direction: ShardedVector, scale: float) -> AbstractContextManager[None]:
        """Inside the block the weights are W + scale * direction; afterwards they are W again, bit for bit."""

    @abstractmethod
    def accumulated_gradient(self) -> ShardedVector:
        """A copy of what `forward_backward` left for `step`, before clipping."""

    @abstractmethod
    def add_gradient(self, shard: ShardedVector, scale: float) -> None:
        """Add scale * shard to what `forward_backward` left for `step`,
        as if the loss had a term with that gradient.
        """

    @abstractmethod
    def weights(self) -> ShardedVector:
        """A copy of the trainable weights (the optimizer's float32 ones)."""

    @abstractmethod
    def assign(self, weights: ShardedVector) -> None:
        """Go on from these weights; the optimizer's moments stay."""

    @contextlib.contextmanager
    def replaced(self, weights: ShardedVector) -> Iterator[None]:
        """Inside the block the weights are these, for `weights` too; afterwards they are what they were, bit for bit.

        No `step` inside.
        """
        stash = [tensor.clone() for tensor in self.storage()]
        try:
            self.assign(weights)
            yield
        finally:
            self.drop_gathered()
            for tensor, saved in zip(self.storage(), stash, strict=True):
                tensor.copy_(saved)

    @abstractmethod
    def storage(self) -> list[torch.Tensor]:
        """Everything of the trainable weights that this rank keeps, views and not copies:
        the compute copy, and a master where there is one.
        """

    @abstractmethod
    def drop_gathered(self) -> None:
        """Forget gathered copies of weights: before and after the shards are edited."""

    @abstractmethod
    def step(self, lr: float, norm: float | None = None) -> None:
        """Clip, update with learning rate `lr`, clear the gradient. norm: the gradient's, where the caller has it."""

    @abstractmethod
    def discard(self) -> None:
        """Forget what `forward_backward` left for `step`, as if the step had not been:
        weights, moments and counters stay.
        """

    @abstractmethod
    def gathered(self, shard: ShardedVector) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole vector, one full tensor at a time with its parameter's name, on the CPU;
        nothing on ranks other than 0.

        A collective call: every rank must exhaust the iterator. No rank ever holds two gathered tensors.
        """

    def gather(self, shard: ShardedVector) -> dict[str, torch.Tensor]:
        """`gathered` as a dictionary: for vectors that rank 0 can hold, such as an adapter's."""
        return dict(self.gathered(shard))

    @abstractmethod
    def parts(self, shard: ShardedVector) -> Iterator[tuple[str, torch.Tensor]]:
        """What this rank holds of every parameter's vector, flat, by the parameter's name;
        the same names in one order on all ranks.
        """

    @abstractmethod
    def shard(self, named: Mapping[str, torch.Tensor]) -> ShardedVector:
        """This rank's part of a vector given as full tensors by parameter name:
        the inverse of `gather`, without communication.
        """

    @abstractmethod
    def save(self, folder: Path, vectors: dict[str, ShardedVector]) -> None:
        """Write weights, optimizer state and named vectors of every rank below `folder`; no rank waits for another."""

    @abstractmethod
    def load(self, folder: Path, vectors: Sequence[str] = ()) -> dict[str, ShardedVector]:
        """Read what `save` wrote, at any world size: bit for bit, each rank its part, and none waits for another.

        Returns the vectors named.
        """

    def loss(self, loss_fn: LossFunction[B], batches: Sequence[B]) -> float:
        """The global loss without gradients, in eval mode (no dropout)."""
        self.module.eval()
        try:
            with torch.no_grad():
                total = sum(
                    (
                        loss_fn(self.module, batch.to(self.device)).detach().double()
                        for batch in batches
                    ),
                    self.zero(),
                )
        finally:
            self.module.train()
        return self.sum_over_ranks(total).item()

    def gradient_norm(self) -> torch.Tensor:
        """Norm of what `forward_backward` left for `step`, before clipping: as a loss, for `read`."""
        shard = self.accumulated_gradient()
        return self._dot(shard, shard).sqrt()

    def norm(self, shard: ShardedVector) -> float:
        """Euclidean norm of the whole vector."""
        return math.sqrt(self.dot(shard, shard))

    def dot(self, a: ShardedVector, b: ShardedVector) -> float:
        """Inner product of two whole vectors, accumulated in float64."""
        return self._dot(a, b).item()

    def _dot(self, a: ShardedVector, b: ShardedVector) -> torch.Tensor:
        total = self.zero()
        for x, y in _joined(a, b):
            total += torch.dot(x.double(), y.double())
        return self.sum_over_ranks(total)

    def read(self, values: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
        """The values as numbers, in their order: the host waits for the device once, whatever there is to read."""
        waiting = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
        stacked = [value.double() for value in waiting.values()]
        numbers = torch.stack(stacked).tolist() if stacked else []
        known = {key: value for key, value in values.items() if not isinstance(value, torch.Tensor)}
        found = known | dict(zip(waiting, numbers, strict=True))
        return {key: found[key] for key in values}

    def checksum(self, shard: ShardedVector) -> int:
        """Sum of the whole vector's bit patterns (as int32) modulo 2**64:
        equal for equal vectors on any engine and any number of ranks.
        """
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for _, part in self.parts(shard):
            total += part.contiguous().view(torch.int32).sum(dtype=torch.int64).to(self.device)
        return int(self.sum_over_ranks(total).item())

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place, on every rank."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank: the agreement on which all ranks act together."""
        return self.ranks_with(flag).item() > 0

    def ranks_with(self, flag: bool) -> torch.Tensor:
        """On how many ranks the flag is set: as a loss, for `read`."""
        # filled there: a copy would make the host wait
        return self.sum_over_ranks(self.zero().fill_(float(flag)))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def zero(self) -> torch.Tensor:
        """A float64 scalar on the engine's device, to add to."""
        return torch.zeros((), dtype=torch.float64, device=self.device)


def _joined(a: ShardedVector, b: ShardedVector) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same pairs of flat tensors, small ones end to end: an adapter has hundreds, and a GPU is asked for each."""
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
    held = 0
    for pair in zip(a, b, strict=True):
        if held and held + pair[0].numel() > _JOINED:
            yield _end_to_end(waiting)
            waiting, held = [], 0
        waiting.append(pair)
        held += pair[0].numel()
    if waiting:
        yield _end_to_end(waiting)


def _end_to_end(
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    if len(pairs) == 1:
        return pairs[0]
    first, second = zip(*pairs, strict=True)
    one = torch.cat(first)
    return one, one if all(x is y for x, y in pairs) else torch.cat(second)


def clip(gradients: Sequence[torch.Tensor], norm: float, max_norm: float) -> None:
    """Scale the gradient of norm `norm` to `max_norm` where it is larger:
    DeepSpeed's formula, so that engines agree to the last digits.
    """
    factor = 1.0 / max(1.0, (norm + 1e-6) / max_norm)
    if factor < 1.0 and gradients:
        torch_private.multiply(gradients, factor)


def step_counter(
    optimizer: torch.optim.Optimizer, counted: torch.Tensor, parameter: torch.Tensor
) -> torch.Tensor:
    """AdamW's counter of steps where the optimizer wants it: the fused form reads it on the parameter's device."""
    return counted.to(parameter.device if optimizer.defaults.get("fused") else "cpu", copy=True)


def stacked_gradients(
    v: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """Gradients of v as one tensor (len(v), D); an unused row is zero."""
    return torch.stack(
        [
            torch.zeros_like(row) if gradient is None else gradient
            for row, gradient in zip(v, gradients, strict=True)
        ]
    )
