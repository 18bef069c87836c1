"""The SAP step: Algorithm 1 of arXiv 2505.16737 on any engine, and its lagged form.

    step = SapStep(engine, Probe(decoder_layers(model), layers, hidden_size), recipe.sap)
    metrics = step(useful_batches, pairs, number)      # the engine then holds the step's gradient
    engine.step(lr)

`dW = eps |W| g_s / |g_s|` with `g_s = grad_W L_safety` and both norms global over the trainable parameters; V is one
vector per probed layer, one for all micro-batches and ranks of a step, and acts only inside its own passes. It may be
computed from a share of the step's samples: the same for both of its gradients, or their difference would be that of
the samples. With H = d2 L_useful / dW dV, to first order `g(V) - g(0) = beta H H^T dW`: a preconditioned descent of
L_safety, so <g(V) - g(0), g_s> >= 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch

from pipeline.defences.sap.probe import Probe
from pipeline.defences.sap.section import SapSection
from pipeline.defences.step import Metrics, Pairs, Step
from pipeline.engines.engine import Engine, ShardedVector
from pipeline.objectives.batches import MicroBatch
from pipeline.objectives.losses import safety_loss, useful_loss

_CALIBRATION_PASSES = 4
_CALIBRATION_TOLERANCE = 0.1
_ADAM = (0.9, 0.999, 1e-8)


class SapStep(Step):
    """Algorithm 1 with the state it carries from step to step: the direction and its age, V (lagged), and V's scale."""

    summary_keys = ("sap/correction", "sap/probe_signal")

    def __init__(
        self,
        engine: Engine,
        probe: Probe,
        section: SapSection,
        direction: ShardedVector | None = None,
        refresh_every: int = 1,
    ):
        """direction: the direction stage's g_s as this engine's shard; required for direction 'precomputed'.

        refresh_every: steps after which pairs are drawn and the direction is computed again; 0: never.
        """
        assert (direction is not None) == (section.direction == "precomputed"), (
            "a direction is given exactly when it is precomputed"
        )
        self.engine, self.probe, self.section, self.refresh_every = (
            engine,
            probe,
            section,
            refresh_every,
        )
        self.share = section.probe_share
        self.safety_loss = safety_loss(section.contrastive)
        self.direction, self.direction_step = direction, 0
        self.v = probe.zeros(engine.device)
        self.scale, self.calibrated = section.beta, section.probe_step != "target_correction"
        self.adam_count, self.adam_mean, self.adam_square = (
            0,
            probe.zeros(engine.device),
            probe.zeros(engine.device),
        )
        self.checked = self.warned = False

    def __call__(
        self,
        useful: Sequence[MicroBatch],
        pairs: Pairs,
        number: int,
        part: Sequence[MicroBatch] | None = None,
    ) -> Metrics:
        """Compute the gradient of step `number` (from 0) and leave it in the engine;
        returns what was measured on the way.

        part: micro-batches of the `share` of the step's samples that V is computed from; None where that is all of
        them. train/loss is the loss whose gradient is taken, under the step's V; losses without a probe are the
        validation's.
        """
        assert (part is None) == (self.share == 1), (
            "a share of the samples is given exactly when V is computed from one"
        )
        metrics: Metrics = {}
        g_s = self._safety_direction(pairs, number, metrics)
        scale = self._perturbation_scale(g_s, metrics)
        if self.section.schedule == "lagged":
            return self._lagged(useful, g_s, scale, number, metrics)
        return self._exact(useful, useful if part is None else part, g_s, scale, number, metrics)

    def _exact(
        self,
        useful: Sequence[MicroBatch],
        part: Sequence[MicroBatch],
        g_s: ShardedVector,
        scale: float,
        number: int,
        metrics: Metrics,
    ) -> Metrics:
        zero = self.probe.zeros(self.engine.device)
        loss, p0 = self._probe_gradient(part, zero)  # grad_V L_useful(W, 0)
        with self.engine.perturbed(g_s, scale):
            shifted, p1 = self._probe_gradient(part, zero)  # grad_V L_useful(W + dW, 0)
        minus = self._opposite_gradient(part, g_s, scale, zero, number)
        self._diagnose(loss, shifted, p0, p1, minus, metrics)
        self.v = self._probe_step(p1 - p0)  # V_safe
        g0 = self._plain_gradient(useful, number)
        # grad_W L_useful(W, V_safe)
        with self.probe.active(self.v, requires_grad=False):
            probed, _ = self.engine.forward_backward(useful_loss, useful)
        self._measure_correction(g0, metrics)
        return {"train/loss": probed, "sap/loss_without_probe": loss, **metrics}

    def _lagged(
        self,
        useful: Sequence[MicroBatch],
        g_s: ShardedVector,
        scale: float,
        number: int,
        metrics: Metrics,
    ) -> Metrics:
        g0 = self._plain_gradient(useful, number)
        v = self.v  # V_{t-1}; V_0 = 0
        with self.engine.perturbed(g_s, scale):
            shifted, p1 = self._probe_gradient(useful, v)  # grad_V L_useful(W + dW, V_{t-1})
        minus = self._opposite_gradient(useful, g_s, scale, v, number)
        # grad_{W,V} L_useful(W, V_{t-1})
        with self.probe.active(v) as rows:
            loss, p0 = self.engine.forward_backward(useful_loss, useful, rows)
        assert p0 is not None, "rows of V were given"
        self._measure_correction(g0, metrics)
        self._diagnose(loss, shifted, p0, p1, minus, metrics)
        self.v = self._probe_step(p1 - p0)  # V_t: replaced, not accumulated
        return {"train/loss": loss, **metrics}

    def _safety_direction(self, pairs: Pairs, number: int, metrics: Metrics) -> ShardedVector:
        age, every = number - self.direction_step, self.refresh_every
        if self.direction is None or (every and age >= every):
            metrics["sap/safety_loss"], self.direction = self.engine.gradient(
                self.safety_loss, pairs()
            )
            self.direction_step = number
        metrics["sap/direction_age"] = float(number - self.direction_step)
        return self.direction

    def _perturbation_scale(self, g_s: ShardedVector, metrics: Metrics) -> float:
        norm, weight_norm = self.engine.norm(g_s), self.engine.norm(self.engine.weights())
        if not (norm > 0 and math.isfinite(norm)):
            raise ValueError(
                f"the safety gradient has norm {norm}: check data.safety (chosen and rejected must "
                "differ) and sap.contrastive"
            )
        metrics |= {"sap/direction_norm": norm, "sap/weight_norm": weight_norm}
        return self.section.eps * weight_norm / norm

    def _probe_gradient(
        self, useful: Sequence[MicroBatch], v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with self.probe.active(v) as rows:
            return self.engine.probe_gradient(useful_loss, useful, rows)

    def _opposite_gradient(
        self,
        useful: Sequence[MicroBatch],
        g_s: ShardedVector,
        scale: float,
        v: torch.Tensor,
        number: int,
    ) -> torch.Tensor | None:
        """p(-1), for the noise, at its interval."""
        if not self.section.noise_every or number % self.section.noise_every:
            return None
        with self.engine.perturbed(g_s, -scale):
            return self._probe_gradient(useful, v)[1]

    def _diagnose(
        self,
        loss: torch.Tensor,
        shifted: torch.Tensor,
        p0: torch.Tensor,
        p1: torch.Tensor,
        minus: torch.Tensor | None,
        metrics: Metrics,
    ) -> None:
        """Signal, noise, delta_loss (methods.md, SAP); refuses a perturbation that changes nothing."""
        if not self.checked and shifted == loss:
            raise ValueError(
                "the perturbation W + dW changes no bit of the loss: raise sap.eps (now "
                f"{self.section.eps}) or use model.dtype float32"
            )
        self.checked = True
        base = p0.norm().item()
        metrics |= {
            "sap/delta_loss": shifted - loss,
            "sap/probe_signal": (p1 - p0).norm().item() / base,
        }
        if minus is not None:
            noise = (p1 + minus - 2 * p0).norm().item() / (math.sqrt(3) * base)
            metrics["sap/probe_noise"] = noise
            if noise > metrics["sap/probe_signal"] and not self.warned:
                self.warned = True
                warnings.warn(
                    f"SAP's signal {metrics['sap/probe_signal']:.2g} is below its noise "
                    f"{noise:.2g}: V is not meaningful; change sap.eps (now {self.section.eps}; "
                    "larger against rounding, smaller against curvature) or use model.dtype "
                    "float32",
                    stacklevel=2,
                )

    def _probe_step(self, ascent: torch.Tensor) -> torch.Tensor:
        """V from grad_V L_su (line 5), by sap.probe_step."""
        kind = self.section.probe_step
        if kind == "raw":
            return self.section.beta * ascent
        if kind == "adam":
            beta1, beta2, eps = _ADAM
            self.adam_count += 1
            self.adam_mean = beta1 * self.adam_mean + (1 - beta1) * ascent
            self.adam_square = beta2 * self.adam_square + (1 - beta2) * ascent.square()
            mean = self.adam_mean / (1 - beta1**self.adam_count)
            return (
                self.section.beta
                * mean
                / ((self.adam_square / (1 - beta2**self.adam_count)).sqrt() + eps)
            )
        rms = ascent.square().mean().sqrt()
        return self.scale * ascent / rms.clamp(min=torch.finfo(ascent.dtype).tiny)

    def _plain_gradient(self, useful: Sequence[MicroBatch], number: int) -> ShardedVector | None:
        """g(0), when the correction is to be measured; calibrates V's scale at the first V there is."""
        calibrate = not self.calibrated and bool(self.v.any())
        due = bool(self.section.correction_every) and number % self.section.correction_every == 0
        if not (calibrate or due) or not self.v.any():
            return None
        _, g0 = self.engine.gradient(useful_loss, useful)
        if calibrate:
            self._calibrate(useful, g0)
        return g0

    def _calibrate(self, useful: Sequence[MicroBatch], g0: ShardedVector) -> None:
        """Scale V until |g(V) - g(0)| / |g(0)| is sap.target_correction, within a tenth or a few passes."""
        for _ in range(_CALIBRATION_PASSES):
            with self.probe.active(self.v, requires_grad=False):
                _, g = self.engine.gradient(useful_loss, useful)
            factor = self._adapt_scale(self._correction(g, g0), limit=10.0)
            self.v = self.v * factor
            if abs(factor - 1) < _CALIBRATION_TOLERANCE:
                break
        self.calibrated = True

    def _measure_correction(self, g0: ShardedVector | None, metrics: Metrics) -> None:
        metrics["sap/probe_rms"] = self.v.square().mean().sqrt().item()
        if g0 is None:
            return
        correction = self._correction(self.engine.accumulated_gradient(), g0)
        metrics["sap/correction"] = correction
        if self.section.probe_step == "target_correction":
            self._adapt_scale(correction, limit=2.0)

    def _correction(self, g: ShardedVector, g0: ShardedVector) -> float:
        return self.engine.norm([a - b for a, b in zip(g, g0, strict=True)]) / self.engine.norm(g0)

    def _adapt_scale(self, correction: float, limit: float) -> float:
        """Move V's scale towards the target, by at most `limit` either way; the correction is linear in a small V.

        Returns the factor.
        """
        ratio = self.section.target_correction / max(correction, 1e-12)
        factor = min(max(ratio, 1 / limit), limit)
        self.scale *= factor
        return factor

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs and every rank has alike."""
        scalars = [
            self.direction_step,
            self.scale,
            self.calibrated,
            self.adam_count,
            self.checked,
            self.warned,
        ]
        return {
            "v": self.v,
            "adam_mean": self.adam_mean,
            "adam_square": self.adam_square,
            "scalars": torch.tensor(scalars, dtype=torch.float64),
        }

    def vectors(self) -> dict[str, ShardedVector]:
        """What a resumed run needs and is sharded: the direction, once there is one."""
        return {} if self.direction is None else {"direction": self.direction}

    def load_state_dict(
        self, state: dict[str, torch.Tensor], vectors: dict[str, ShardedVector]
    ) -> None:
        """Restore `state_dict` and `vectors`, bit for bit."""
        device = self.engine.device
        self.v, self.adam_mean, self.adam_square = (
            state[key].to(device) for key in ("v", "adam_mean", "adam_square")
        )
        direction_step, self.scale, calibrated, adam_count, checked, warned = state[
            "scalars"
        ].tolist()
        self.direction_step, self.adam_count = int(direction_step), int(adam_count)
        self.calibrated, self.checked, self.warned = bool(calibrated), bool(checked), bool(warned)
        self.direction = vectors.get("direction")
