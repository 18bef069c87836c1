"""A SAP step that is saved between two refreshes goes on with the same direction, V and scale:
to the bit, on one process.

tests/distributed/test_resume.py says the same of sharded engines.
"""

import pytest
import torch

from pipeline.defences.sap.probe import Probe
from pipeline.defences.sap.section import SapSection
from pipeline.defences.sap.step import SapStep
from pipeline.engines.single import SingleEngine
from pipeline.model.models import decoder_layers
from pipeline.training import checkpoint
from tests.tiny import HIDDEN, StepBatches, tiny_lora

SAVED, STEPS = 4, 7


def build(section: SapSection) -> SapStep:
    model = tiny_lora(dropout=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    engine = SingleEngine(model, optimizer, max_grad_norm=1.0)
    return SapStep(engine, Probe(decoder_layers(model), [1, 2], HIDDEN), section, refresh_every=3)


def train(step: SapStep, first: int, last: int) -> list[float]:
    """Ages of the direction in steps first..last."""
    batches, ages = StepBatches(), []
    for number in range(first, last):
        ages.append(
            step(batches.useful(number), lambda number=number: batches.pairs(number), number)[
                "sap/direction_age"
            ]
        )
        step.engine.step(1e-2)
    return ages


@pytest.mark.parametrize("schedule", ["exact", "lagged"])
@pytest.mark.parametrize("probe_step", ["rms", "adam", "target_correction"])
def test_a_resumed_step_is_the_same_step(tmp_path, schedule, probe_step):
    section = SapSection(
        enabled=True, schedule=schedule, probe_step=probe_step, beta=0.02, target_correction=0.3, noise_every=2,
        correction_every=2,
    )  # fmt: skip
    straight = build(section)
    train(straight, 0, SAVED)
    checkpoint.save(straight.engine, straight, tmp_path, SAVED, "same")
    ages = train(straight, SAVED, STEPS)

    resumed = build(section)
    assert checkpoint.load_latest(resumed.engine, resumed, tmp_path, "same") == SAVED
    assert train(resumed, SAVED, STEPS) == ages == [1, 2, 0], (
        "saved in the middle of a direction's life"
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(straight.engine.weights(), resumed.engine.weights(), strict=True)
    )
    assert torch.equal(straight.v, resumed.v) and straight.scale == resumed.scale
