"""The passes of engines whose parameters carry their own `grad`: `single`, and `fsdp2`, where it is this rank's rows.

A subclass says what a rank holds (`storage`, `drop_gathered`, `_gradients`) and what it does before a backward pass.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from pipeline.engines.engine import B, Engine, LossFunction, ShardedVector, stacked_gradients


class AutogradEngine(Engine):
    """A ShardedVector here is one flat tensor per trainable parameter."""

    named: dict[str, nn.Parameter]
    parameters: list[nn.Parameter]  # the same, in the same order

    @abstractmethod
    def _gradients(self) -> ShardedVector:
        """What `forward_backward` left, zeros where there is nothing: views where they can be."""

    def _begun(self, loss: torch.Tensor) -> None:
        """What has to be done between a micro-batch's passes."""

    def _before(self, last: bool) -> None:
        """What has to be done before a micro-batch's passes. last: whether it is the last one."""

    def forward_backward(
        self, loss_fn: LossFunction[B], batches: Sequence[B], v: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        loss = self._backward(loss_fn, batches)
        return loss, self.sum_over_ranks(
            stacked_gradients(v, [row.grad for row in v])
        ) if v else None

    def gradient(
        self, loss_fn: LossFunction[B], batches: Sequence[B]
    ) -> tuple[torch.Tensor, ShardedVector]:
        loss = self._backward(loss_fn, batches)
        shard = self.accumulated_gradient()
        self.discard()
        return loss, shard

    def probe_gradient(
        self, loss_fn: LossFunction[B], batches: Sequence[B], v: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, gradient = (
            self.zero(),
            torch.zeros(len(v), v[0].numel(), dtype=v[0].dtype, device=self.device),
        )
        for batch in batches:
            loss = loss_fn(self.module, batch.to(self.device))
            gradient += stacked_gradients(v, torch.autograd.grad(loss, v, allow_unused=True))
            total += loss.detach().double()
        return self.sum_over_ranks(total), self.sum_over_ranks(gradient)

    @contextlib.contextmanager
    def perturbed(self, direction: ShardedVector, scale: float) -> Iterator[None]:
        self.drop_gathered()
        stash = [local.clone() for local in self.storage()]
        try:
            for local, d in zip(self.storage(), direction, strict=True):
                local.add_(d.view_as(local), alpha=scale)
            yield
        finally:
            self.drop_gathered()
            for local, saved in zip(self.storage(), stash, strict=True):
                local.copy_(saved)

    def accumulated_gradient(self) -> ShardedVector:
        return [part.clone() for part in self._gradients()]

    def gradient_norm(self) -> torch.Tensor:
        shard = self._gradients()
        return self._dot(shard, shard).sqrt()

    def assign(self, weights: ShardedVector) -> None:
        self.drop_gathered()
        for local, part in zip(self.storage(), weights, strict=True):
            local.copy_(part.view_as(local))

    def discard(self) -> None:
        for p in self.parameters:
            p.grad = None

    def parts(self, shard: ShardedVector) -> Iterator[tuple[str, torch.Tensor]]:
        return zip(self.named, shard, strict=True)

    def _backward(self, loss_fn: LossFunction[B], batches: Sequence[B]) -> torch.Tensor:
        assert all(p.grad is None for p in self.parameters), "a pass must start without gradients"
        total = self.zero()
        for number, batch in enumerate(batches, 1):
            self._before(last=number == len(batches))
            loss = loss_fn(self.module, batch.to(self.device))
            self._begun(loss)
            loss.backward()
            total += loss.detach().double()
        return self.sum_over_ranks(total)
