"""sap.speed and sap.probe_share: what they set, what they do not go with, and what they cost by the planner."""

from types import SimpleNamespace

import pytest

from pipeline.defences.sap.section import SPEEDS, SapSection
from pipeline.objectives.sharing import share_of
from pipeline.recipe.sections import TrainSection
from pipeline.stages.checks import _check_cell
from tests.companions import recipe_of
from tests.unit.planner.test_planner import llama, planned


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_speed_sets_what_the_recipe_does_not(speed):
    untouched, found = SapSection(), SapSection(speed=speed)
    assert {key: value for key, value in found if getattr(untouched, key) != value} == SPEEDS[
        speed
    ] | ({} if speed == "exact" else {"speed": speed})
    assert SapSection(speed=speed, probe_share=0.5).probe_share == 0.5
    assert SapSection.model_validate(found.model_dump()) == found


def test_a_speed_that_does_not_exist_names_those_that_do():
    with pytest.raises(ValueError, match="'exact', 'balanced' or 'fast'"):
        SapSection(speed="faster")


def test_a_share_needs_the_exact_schedule():
    with pytest.raises(
        ValueError, match=r"probe_share 0.25 \(of speed balanced\) needs schedule: exact"
    ):
        SapSection(schedule="lagged", speed="balanced")
    assert SapSection(schedule="lagged").probe_share == 1


@pytest.mark.parametrize(
    ("size", "share", "samples"),
    [(8, 0.25, 2), (8, 0.125, 1), (8, 0.01, 1), (30, 0.1, 3), (8, 1.0, 8)],
)
def test_samples_of_a_share(size, share, samples):
    assert share_of(size, share) == samples


def test_ranks_without_a_sample_are_told():
    of = recipe_of(
        sap={"enabled": True, "probe_share": 0.25},
        safety_pairs={"batch_size": 8},
        train={"steps": 20, "batch_size": 16},
    )
    cell = SimpleNamespace(method="sap", recipe=of)
    assert _check_cell(cell, of, None, 4) == []
    (note,) = _check_cell(cell, of, None, 8)
    assert (
        "sap.probe_share 0.25 of train.batch_size 16 is 4: 4 of 8 ranks would have no sample of their own"
        in note
        and "0.5 takes the same time" in note
    )


def test_the_planner_counts_passes_of_a_share():
    def extra(ranks: int = 1, **sap) -> float:
        train = TrainSection(steps=1, batch_size=8, micro_batch_size=2)
        section = SapSection(
            enabled=True, noise_every=0, correction_every=0, probe_step="raw", **sap
        )
        step, _ = planned(llama(64, 160, 9, 4, 2, 97), train, section, ranks=ranks).flops()
        return step

    least = extra(probe_share=0.125)
    assert extra(probe_share=0.25) - least == pytest.approx((extra() - least) / 7)
    assert extra(ranks=8, probe_share=0.125) == pytest.approx(extra(ranks=8)), (
        "a sample a rank is the least there is"
    )
