"""The step in float64 against a dense reference written by hand, its sign property, and what it refuses."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from pipeline.defences.sap.probe import Probe
from pipeline.defences.sap.section import SapSection
from pipeline.defences.sap.step import SapStep
from pipeline.engines.single import SingleEngine
from pipeline.model.models import decoder_layers
from pipeline.objectives.batches import BatchOrder
from pipeline.objectives.losses import safety_loss, useful_loss
from pipeline.recipe.layer_choice import probed_layers
from tests.tiny import HIDDEN, StepBatches, tiny_lora

PROBED = [1, 2]
LR = 1e-2


def build(section: SapSection, dtype=torch.float64, dropout: float = 0.0):
    model = tiny_lora(dtype, dropout)
    engine = SingleEngine(
        model,
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False),
        max_grad_norm=1.0,
    )
    return engine, SapStep(engine, Probe(decoder_layers(model), PROBED, HIDDEN, dtype), section)


class DenseReference:
    """Algorithm 1 written out once more, sharing nothing with the product but the model's own layers.

    The whole batch in one pass per sequence, V added by replacing the layers' forward,
    every gradient by torch.autograd.grad.
    """

    def __init__(self, model, section: SapSection):
        self.model, self.section = model, section
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.v = torch.zeros(len(PROBED), HIDDEN, dtype=torch.float64)
        self.scale, self.calibrated, self.number = (
            section.beta,
            section.probe_step != "target_correction",
            0,
        )
        self.optimizer = torch.optim.AdamW(self.weights, foreach=False)

    def forward(self, ids, v):
        layers = decoder_layers(self.model)
        originals = {index: layers[index].forward for index in PROBED}
        for row, index in enumerate(PROBED):
            layers[index].forward = lambda *a, _f=originals[index], _v=v[row], **k: _f(*a, **k) + _v
        try:
            return self.model(input_ids=torch.tensor([ids])).logits[0]
        finally:
            for index in PROBED:
                del layers[index].forward

    def sequence(self, ids, labels, v):
        """Summed loss and number of supervised tokens of one sequence."""
        logits, targets = self.forward(ids, v)[:-1], torch.tensor(labels[1:])
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"), int(
            (targets != -100).sum()
        )

    def useful(self, rows, v):
        parts = [self.sequence(row["input_ids"], row["labels"], v) for row in rows]
        return sum(loss for loss, _ in parts) / sum(count for _, count in parts)

    def safety(self, pairs):
        zero, total = torch.zeros_like(self.v), 0.0
        for pair in pairs:
            means = []
            for side in ("chosen", "rejected"):
                loss, count = self.sequence(pair[f"{side}_input_ids"], pair[f"{side}_labels"], zero)
                means.append(loss / count)
            margin = means[0] - means[1]
            total = total + (
                margin
                if self.section.contrastive == "difference"
                else torch.log1p(torch.exp(margin))
            )
        return total / len(pairs)

    def probe_gradient(self, rows, v):
        v = v.detach().requires_grad_()
        return torch.autograd.grad(self.useful(rows, v), v)[0]

    def correction(self, rows, v):
        """|g(V) - g(0)| / |g(0)|."""
        g, g0 = (
            torch.autograd.grad(self.useful(rows, value), self.weights)
            for value in (v, torch.zeros_like(v))
        )

        def size(parts):
            return torch.sqrt(sum(part.square().sum() for part in parts))

        return (size([a - b for a, b in zip(g, g0, strict=True)]) / size(g0)).item()

    def moved(self, correction, most):
        """By what V's scale is moved towards the target: at most so many times, either way."""
        factor = min(max(self.section.target_correction / correction, 1 / most), most)
        self.scale *= factor
        return factor

    def calibrate(self, rows, v):
        """The first V that there is, scaled until its correction is the target, within a tenth or in four passes."""
        if not self.calibrated and v.any():
            for _ in range(4):
                factor = self.moved(self.correction(rows, v), 10.0)
                v = v * factor
                if abs(factor - 1) < 0.1:
                    break
            self.calibrated = True
        return v

    def step(self, rows, pairs):
        section, exact, calibrated = self.section, self.section.schedule == "exact", self.calibrated
        g_s = torch.autograd.grad(self.safety(pairs), self.weights)
        norm = torch.sqrt(sum(g.square().sum() for g in g_s))
        size = torch.sqrt(sum(w.detach().square().sum() for w in self.weights))
        start = torch.zeros_like(self.v) if exact else self.calibrate(rows, self.v)
        looked_at = rows[: round(section.probe_share * len(rows))]
        p0 = self.probe_gradient(looked_at, start)
        saved = [w.detach().clone() for w in self.weights]
        with torch.no_grad():
            for w, g in zip(self.weights, g_s, strict=True):
                w.add_(section.eps * size / norm * g)
        p1 = self.probe_gradient(looked_at, start)
        with torch.no_grad():
            for w, s in zip(self.weights, saved, strict=True):
                w.copy_(s)
        used = self.calibrate(rows, self.update_v(p1 - p0)) if exact else start
        gradient = torch.autograd.grad(self.useful(rows, used), self.weights)
        due = self.number % section.correction_every == 0 or self.calibrated != calibrated
        if section.probe_step == "target_correction" and used.any() and due:
            self.moved(self.correction(rows, used), 2.0)
        self.v = used if exact else self.update_v(p1 - p0)
        self.number += 1
        total = torch.sqrt(sum(g.square().sum() for g in gradient))
        for w, g in zip(self.weights, gradient, strict=True):
            w.grad = g / max(1.0, (total.item() + 1e-6) / 1.0)
        self.optimizer.param_groups[0]["lr"] = LR
        self.optimizer.step()

    def update_v(self, ascent):
        if self.section.probe_step == "raw":
            return self.section.beta * ascent
        if self.section.probe_step in ("rms", "target_correction"):
            return self.scale * ascent / ascent.square().mean().sqrt()
        raise AssertionError(self.section.probe_step)


def section(**changes) -> SapSection:
    values = {
        "enabled": True,
        "probe_step": "rms",
        "beta": 0.02,
        "noise_every": 2,
        "correction_every": 2,
        **changes,
    }
    return SapSection(**values)


def flat(parameters) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])


def one_step(step: SapStep, batches: StepBatches, number: int) -> dict[str, float]:
    part = (
        {}
        if step.share == 1
        else {"part": batches.useful(number, round(step.share * batches.batch_size))}
    )
    return step(batches.useful(number), lambda: batches.pairs(number), number, **part)


def run_both(settings: SapSection, steps: int = 3):
    engine, step = build(settings)
    reference = DenseReference(tiny_lora(torch.float64), settings)
    start, batches = flat(reference.weights), StepBatches()
    for number in range(steps):
        one_step(step, batches, number)
        engine.step(LR)
        rows = [batches.rows[i] for i in BatchOrder(40, 8, 0).step(number)]
        pairs = [batches.pair_rows[i] for i in BatchOrder(16, 4, 0).step(number)]
        reference.step(rows, pairs)
    return (flat(engine.parameters) - flat(reference.weights)).norm() / (
        flat(reference.weights) - start
    ).norm()


@pytest.mark.parametrize("schedule", ["exact", "lagged"])
@pytest.mark.parametrize("contrastive", ["difference", "logsigmoid"])
@pytest.mark.parametrize("probe_step", ["raw", "rms", "target_correction"])
def test_step_equals_the_dense_reference(schedule, contrastive, probe_step):
    beta = 5.0 if probe_step == "raw" else 0.02
    settings = section(
        schedule=schedule,
        contrastive=contrastive,
        probe_step=probe_step,
        beta=beta,
        target_correction=0.3,
    )
    assert run_both(settings, steps=5 if probe_step == "target_correction" else 3) < 1e-9


@pytest.mark.parametrize("share", [0.125, 0.25, 0.75])
def test_v_of_a_share_of_the_samples_equals_the_dense_reference(share):
    assert run_both(section(schedule="exact", probe_share=share)) < 1e-9


def test_v_of_other_samples_is_noticed(monkeypatch):
    """The control of the test above."""
    original = StepBatches.useful
    monkeypatch.setattr(
        StepBatches,
        "useful",
        lambda self, number, samples=None: original(self, number + (samples is not None), samples),
    )
    assert run_both(section(schedule="exact", probe_share=0.25)) > 1e-4


@pytest.mark.parametrize("schedule", ["exact", "lagged"])
def test_leaving_the_probe_out_is_noticed(schedule, monkeypatch):
    """The control of the test above: with V = 0 the difference is seven orders of magnitude above its bound."""
    monkeypatch.setattr(SapStep, "_probe_step", lambda self, ascent: torch.zeros_like(ascent))
    assert run_both(section(schedule=schedule)) > 1e-2


def first_order_gain(flip: float, monkeypatch, contrastive: str) -> tuple[float, float]:
    """(<g(V) - g(0), g_s>, its first-order value) for one exact step; flip -1 turns V's sign."""
    original = SapStep._probe_step
    monkeypatch.setattr(SapStep, "_probe_step", lambda self, ascent: flip * original(self, ascent))
    settings = section(
        schedule="exact",
        probe_step="raw",
        beta=1.0,
        eps=1e-4,
        noise_every=0,
        correction_every=0,
        contrastive=contrastive,
    )
    engine, step = build(settings)
    batches = StepBatches()
    _, g0 = engine.gradient(useful_loss, batches.useful(0))
    _, g_s = engine.gradient(safety_loss(contrastive), batches.pairs(0))
    metrics = step(batches.useful(0), lambda: batches.pairs(0), 0)
    assert step.v.any()
    g = engine.accumulated_gradient()
    gain = engine.dot([a - b for a, b in zip(g, g0, strict=True)], g_s)
    # V = beta H^T dW and dW = k g_s, so the gain is (beta k) |H^T g_s|^2 = |V|^2 / (beta k).
    k = settings.eps * metrics["sap/weight_norm"] / metrics["sap/direction_norm"]
    return gain, (step.v.square().sum() / (settings.beta * k)).item()


@pytest.mark.parametrize("contrastive", ["difference", "logsigmoid"])
def test_the_correction_descends_the_safety_loss(contrastive, monkeypatch):
    gain, predicted = first_order_gain(1.0, monkeypatch, contrastive)
    assert gain > 0
    assert gain == pytest.approx(predicted, rel=1e-2)


def test_a_flipped_sign_of_v_fails_the_property(monkeypatch):
    gain, predicted = first_order_gain(-1.0, monkeypatch, "difference")
    assert gain < 0 < predicted


def test_target_correction_is_reached_and_held():
    engine, step = build(
        section(
            schedule="exact",
            probe_step="target_correction",
            target_correction=0.3,
            correction_every=1,
        )
    )
    batches, seen = StepBatches(), []
    for number in range(4):
        seen.append(
            step(batches.useful(number), lambda number=number: batches.pairs(number), number)[
                "sap/correction"
            ]
        )
        engine.step(LR)
    assert abs(seen[0] - 0.3) <= 0.03, "off by at most a tenth of the target"
    assert all(0.1 < value < 0.9 for value in seen)


def test_adam_probe_moves_each_coordinate_by_beta_at_first():
    _, step = build(section(schedule="exact", probe_step="adam", beta=0.05))
    batches = StepBatches()
    step(batches.useful(0), lambda: batches.pairs(0), 0)
    assert torch.allclose(step.v.abs(), torch.full_like(step.v, 0.05), rtol=0.2)


def test_all_passes_see_the_same_dropout_masks():
    """p(1) - p(0) is the perturbation's alone: with dropout and a tiny eps it stays tiny;
    other masks would make it large.
    """
    engine, step = build(section(schedule="exact", eps=1e-7, noise_every=0), dropout=0.5)
    batches = StepBatches()
    metrics = step(batches.useful(0), lambda: batches.pairs(0), 0)
    assert 0 < metrics["sap/probe_signal"] < 1e-4
    other = [dataclasses.replace(batch, seed=batch.seed + 1) for batch in batches.useful(0)]
    with step.probe.active(step.probe.zeros()) as rows:
        _, same = engine.probe_gradient(useful_loss, batches.useful(0), rows)
    with step.probe.active(step.probe.zeros()) as rows:
        _, masked_otherwise = engine.probe_gradient(useful_loss, other, rows)
    assert (masked_otherwise - same).norm() / same.norm() > 1e-2


def test_a_perturbation_that_changes_nothing_is_an_error():
    _, step = build(section(schedule="exact", eps=1e-30))
    batches = StepBatches()
    with pytest.raises(ValueError, match=r"changes no bit of the loss: raise sap.eps"):
        step(batches.useful(0), lambda: batches.pairs(0), 0)


def test_a_vanishing_safety_gradient_is_refused(monkeypatch):
    engine, step = build(section())
    monkeypatch.setattr(
        engine,
        "gradient",
        lambda loss_fn, batches: (0.0, [torch.zeros_like(w) for w in engine.weights()]),
    )
    batches = StepBatches()
    with pytest.raises(ValueError, match="chosen and rejected must differ"):
        step(batches.useful(0), lambda: batches.pairs(0), 0)


def test_signal_below_noise_warns_with_the_field_to_change():
    _, step = build(section(schedule="exact", eps=3.0, noise_every=1))
    batches = StepBatches()
    with pytest.warns(UserWarning, match="below its noise.*sap.eps"):
        step(batches.useful(0), lambda: batches.pairs(0), 0)


def test_hooks_are_gone_after_a_step_and_after_a_failure():
    engine, step = build(section(schedule="exact"))
    batches = StepBatches()
    step(batches.useful(0), lambda: batches.pairs(0), 0)
    with pytest.raises(RuntimeError, match="stop"), step.probe.active(step.v):
        raise RuntimeError("stop")
    assert all(not layer._forward_hooks for layer in decoder_layers(engine.module))


def test_direction_is_refreshed_at_its_age():
    engine, step = build(section())
    step.refresh_every = 3
    batches, calls = StepBatches(), []
    ages = []
    for number in range(7):
        metrics = step(
            batches.useful(number),
            lambda number=number: calls.append(number) or batches.pairs(number),
            number,
        )
        ages.append(metrics["sap/direction_age"])
        engine.step(LR)
    assert calls == [0, 3, 6] and ages == [0, 1, 2, 0, 1, 2, 0]


def test_probed_layers():
    assert probed_layers("0.33:0.66", 30) == list(range(10, 20))
    assert probed_layers("10:19", 32) == list(range(10, 19))
    assert probed_layers([3, 9], 30) == [3, 9]
    assert probed_layers([0.0, 0.5, 1.0], 30) == [0, 15, 29]
    for outside in ([40], "20:40", [-1], "5:5"):
        with pytest.raises(ValueError, match=r"sap.layers"):
            probed_layers(outside, 30)
