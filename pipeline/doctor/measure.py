"""What several checks need: slopes by central differences, digests, values of all ranks,
and the passes' results, computed once.

examined = StepUnderTest(engine, probe, sap, useful, pairs)
slope = central_slope(examined.loss_along_gradient, size=norm, loss=examined.loss)
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pipeline.defences.sap.probe import Probe
from pipeline.defences.sap.section import SapSection
from pipeline.engines.engine import Engine, LossFunction, ShardedVector
from pipeline.objectives.batches import MicroBatch, PairBatch
from pipeline.objectives.losses import safety_loss, useful_loss

# of the loss, to first order: below is rounding, above is curvature
_CHANGES = (2.5e-4, 1e-3, 4e-3, 1.6e-2, 6.4e-2)
_LOW_CHANGES = _CHANGES[1:]  # rounding is larger in less than float32


class StepUnderTest:
    """An engine under examination.

    Results that several checks use are computed at their first use, at the unperturbed weights and V = 0.
    """

    def __init__(
        self,
        engine: Engine,
        probe: Probe,
        sap: SapSection,
        useful: Sequence[MicroBatch],
        pairs: Sequence[PairBatch],
    ):
        self.engine, self.probe, self.sap, self.useful, self.pairs = (
            engine,
            probe,
            sap,
            useful,
            pairs,
        )
        self.safety_loss: LossFunction[PairBatch] = safety_loss(sap.contrastive)
        self.best_eps = sap.eps  # the signal check's recommendation, once it has one

    @cached_property
    def loss(self) -> float:
        """The useful loss at the present weights."""
        return self.useful_loss()

    @cached_property
    def gradient(self) -> ShardedVector:
        """grad_W L_useful."""
        return self._usable(
            "the useful loss's gradient", self.engine.gradient(useful_loss, self.useful)[1]
        )

    @cached_property
    def direction(self) -> ShardedVector:
        """g_s = grad_W L_safety."""
        return self._usable(
            "the safety gradient", self.engine.gradient(self.safety_loss, self.pairs)[1]
        )

    @cached_property
    def p0(self) -> torch.Tensor:
        """grad_V L_useful(W, 0): (probed layers, hidden size), the same on every rank."""
        p0 = self.probe_gradient()
        _check_norm("the probe gradient", p0.norm().item())
        return p0

    @cached_property
    def weight_norm(self) -> float:
        """Euclidean norm of the trained weights."""
        return self.engine.norm(self.engine.weights())

    @cached_property
    def low(self) -> bool:
        """Whether the model computes in less than float32, seen at the first probed layer's output:
        weights may be cast on the way.
        """
        found: list[torch.dtype] = []

        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found.append((output[0] if isinstance(output, tuple) else output).dtype)

        handle = self.probe.modules[0].register_forward_hook(look)
        try:
            self.useful_loss()
        finally:
            handle.remove()
        return found[0].itemsize < 4

    def useful_loss(self) -> float:
        """L_useful at the present weights, over all ranks."""
        return self.engine.loss(useful_loss, self.useful)

    def probe_gradient(self) -> torch.Tensor:
        """p at V = 0 and the present weights."""
        with self.probe.active(self.probe.zeros(self.engine.device)) as rows:
            return self.engine.probe_gradient(useful_loss, self.useful, rows)[1]

    def scale(self, eps: float) -> float:
        """Factor of g_s for |dW| = eps |W|."""
        return eps * self.weight_norm / self.engine.norm(self.direction)

    def perturbed_probe_gradient(self, scale: float) -> torch.Tensor:
        """p at V = 0 and W + scale * g_s."""
        with self.engine.perturbed(self.direction, scale):
            return self.probe_gradient()

    def _usable(self, what: str, shard: ShardedVector) -> ShardedVector:
        _check_norm(what, self.engine.norm(shard))
        return shard


def _check_norm(what: str, norm: float) -> None:
    """ValueError where nothing can be divided by it."""
    if not (norm > 0 and math.isfinite(norm)):
        raise ValueError(f"{what} has norm {norm}: check the data, the model and its dtype")


@dataclass(frozen=True)
class Slope:
    """A central difference.

    ratio: over the gradient's own slope, 1 if they agree; distance: how far it stepped; moved: the loss's change there.

    spread: how far the two distances that agreed best are apart, as a share of the larger;
    large where nothing can be concluded.
    """

    ratio: float
    distance: float
    moved: float
    spread: float


def central_slope(
    loss_at: Callable[[float], float], size: float, loss: float, low: bool = False
) -> Slope:
    """Slope of loss_at(h) at 0 over `size`, what the gradient says it is.

    Several h, four times as far each, chosen by the change of the loss they should make; taken where two neighbours
    agree best, between rounding and curvature, and extrapolated from these to h = 0 (Richardson). Not where they agree
    best with `size`: a wrong slope may cross it. low: the model computes in less than float32.
    """
    distances = [
        change * max(abs(loss), 1.0) / abs(size) for change in (_LOW_CHANGES if low else _CHANGES)
    ]
    changes = [loss_at(h) - loss_at(-h) for h in distances]
    ratios = [change / (2 * h * size) for change, h in zip(changes, distances, strict=True)]
    spreads = [abs(a - b) / (max(abs(a), abs(b)) or 1.0) for a, b in itertools.pairwise(ratios)]
    best = spreads.index(min(spreads))
    return Slope(
        (16 * ratios[best] - ratios[best + 1]) / 15,
        distances[best],
        changes[best] / 2,
        spreads[best],
    )


def digest(shard: ShardedVector) -> str:
    """Digest of this rank's bits: full fine-tuning has no room for one copy more."""
    found = hashlib.blake2b()
    for part in shard:
        found.update(part.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return found.hexdigest()


def across_ranks(engine: Engine, value: float) -> list[float]:
    """Every rank's value, on every rank."""
    values = torch.zeros(engine.world_size, dtype=torch.float64, device=engine.device)
    values[engine.rank] = value
    return engine.sum_over_ranks(values).tolist()


def relative(engine: Engine, a: ShardedVector, b: ShardedVector) -> float:
    """|a - b| / |b|."""
    return engine.norm([x - y for x, y in zip(a, b, strict=True)]) / engine.norm(b)


def gradients_left(engine: Engine) -> float:
    """What a pass has left of gradients: the norm of the engine's accumulated one;
    infinity where only a parameter's `.grad` is set.
    """
    norm = engine.norm(engine.accumulated_gradient())
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    visible = any(
        bool((grad.to_local() if isinstance(grad, DTensor) else grad).any()) for grad in grads
    )
    return float("inf") if engine.any_rank(visible) and not norm else norm
