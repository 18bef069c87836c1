"""Companion methods on one process: equal to the dense reference, and what each promises by itself."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.defences import DEFENCES
from pipeline.defences.ema.average import Ema
from pipeline.defences.ema.section import EmaSection
from pipeline.defences.lisa.section import LisaSection
from pipeline.defences.lisa.step import LisaStep
from pipeline.defences.making import make_step
from pipeline.defences.safe_mix.step import safe_batches
from pipeline.engines.open import open_engine
from pipeline.objectives.batches import micro_batches
from pipeline.objectives.losses import useful_loss
from pipeline.recipe.sections import TrainSection
from pipeline.training.loop import Loop, TrainingData
from tests.companions import LR, METHODS, PAIRS, Dense, distance, recipe_of, train
from tests.tiny import StepBatches, tiny_lora, tiny_pairs, tiny_rows
from tests.told import Told


def engine(**changes):
    return open_engine(
        tiny_lora(),
        TrainSection(engine="single", steps=9, batch_size=8, micro_batch_size=2, lr=LR, **changes),
    )


@pytest.fixture(scope="module")
def dense() -> dict:
    return {method: Dense(method).train() for method in METHODS}


def start() -> dict:
    return {name: p.detach() for name, p in tiny_lora().named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_equals_the_dense_reference(dense, method):
    assert (
        distance(train(engine(), method), dense[method]) / distance(dense[method], start()) < 1e-5
    )


@pytest.mark.parametrize("method", [method for method in METHODS if method != "plain"])
def test_leaving_a_method_out_would_be_caught(dense, method):
    assert distance(dense["plain"], dense[method]) / distance(dense[method], start()) > 1e-2


def weights(engine) -> torch.Tensor:
    return torch.cat(engine.weights())


@pytest.mark.parametrize("every", [1, 3])
def test_the_average_has_its_closed_form(every):
    trained, batches = engine(), StepBatches()
    step, ema = (
        make_step(recipe_of(), trained),
        Ema(trained, EmaSection(enabled=True, decay=0.8, every=every)),
    )
    start, seen = weights(trained).double(), []
    for number in range(9):
        step(batches.useful(number), lambda: None, number)
        trained.step(LR)
        ema.updated(number + 1)
        if (number + 1) % every == 0:
            seen.append(weights(trained).double())
    n = len(seen)
    expected = 0.8**n * start + 0.2 * sum(0.8 ** (n - k) * w for k, w in enumerate(seen, 1))
    assert (
        torch.allclose(torch.cat(ema.average).double(), expected, rtol=1e-6, atol=1e-7)
        and n == 9 // every
    )
    assert not torch.allclose(torch.cat(ema.average).double(), seen[-1], rtol=1e-3, atol=1e-4)


def test_until_its_warm_up_is_over_the_average_is_the_weights():
    trained, batches = engine(), StepBatches()
    step, ema = (
        make_step(recipe_of(), trained),
        Ema(trained, EmaSection(enabled=True, decay=0.8, warmup_steps=2)),
    )
    for number in range(3):
        with ema.weights():
            assert (ema.average is None) == (number < 2)
            if number <= 2:
                applied = weights(trained)
        assert torch.equal(applied, weights(trained))
        step(batches.useful(number), lambda: None, number)
        trained.step(LR)
        ema.updated(number + 1)
    with ema.weights():
        assert not torch.equal(weights(trained), applied)


def test_an_exception_inside_leaves_the_weights_as_they_were():
    trained = engine()
    ema = Ema(trained, EmaSection(enabled=True))
    before = weights(trained)
    ema.average = [part + 1 for part in ema.average]
    with pytest.raises(KeyError), ema.weights():
        assert torch.equal(weights(trained), before + 1)
        raise KeyError
    assert torch.equal(weights(trained), before)


def test_decay_zero_follows_the_weights_in_both_modes():
    trained = engine()
    for mode in ("shadow", "momentum"):
        ema = Ema(trained, EmaSection(enabled=True, mode=mode, decay=0.0))
        trained.assign([part * 1.5 for part in trained.weights()])
        before = weights(trained)
        ema.updated(1)
        assert torch.equal(torch.cat(ema.average), before) and torch.equal(weights(trained), before)


def test_the_proximal_gradient_is_rho_times_the_drift():
    trained, batches = engine(), StepBatches()
    lisa, plain = (
        LisaStep(trained, LisaSection(enabled=True, alignment_steps=1, task_steps=2, rho=2.5)),
        make_step(recipe_of(), trained),
    )
    lisa(batches.useful(0), lambda: batches.pairs(0), 0)
    trained.step(LR)
    anchor = weights(trained)
    # a switch: w is the anchor, and the proximal gradient 0
    lisa(batches.useful(1), lambda: batches.pairs(1), 1)
    at_the_switch = torch.cat(trained.accumulated_gradient())
    trained.optimizer.zero_grad()
    plain(batches.useful(1), None, 1)
    assert torch.equal(at_the_switch, torch.cat(trained.accumulated_gradient()))
    trained.step(LR)
    found = lisa(batches.useful(2), lambda: batches.pairs(2), 2)
    with_term = torch.cat(trained.accumulated_gradient())
    trained.optimizer.zero_grad()
    plain(batches.useful(2), None, 2)
    drift = weights(trained) - anchor
    assert drift.norm() > 0.01
    assert torch.allclose(
        with_term - torch.cat(trained.accumulated_gradient()), 2.5 * drift, atol=1e-6
    )
    assert (
        found["lisa/proximal"] == pytest.approx(2.5 / 2 * drift.square().sum().item(), rel=1e-5)
        and found["lisa/aligning"] == 0
    )


def test_the_safety_gradient_has_the_size_asked_for():
    trained, batches = engine(), StepBatches()
    recipe = recipe_of(**METHODS["safety_gradient"])
    step, plain = make_step(recipe, trained), make_step(recipe_of(), trained)
    step(batches.useful(0), lambda: batches.pairs(0), 0)
    with_term = torch.cat(trained.accumulated_gradient())
    trained.optimizer.zero_grad()
    plain(batches.useful(0), None, 0)
    task = torch.cat(trained.accumulated_gradient())
    assert ((with_term - task).norm() / task.norm()).item() == pytest.approx(0.6, rel=1e-5)
    safety = torch.cat(step.direction)
    assert torch.nn.functional.cosine_similarity(with_term - task, safety, dim=0) > 0.9999


@pytest.mark.parametrize(("left", "refused"), [(1e-3, False), (1e-6, True)])
def test_a_safety_gradient_that_has_vanished_is_refused(monkeypatch, left, refused):
    """Once the pairs have nothing to teach, what holds their gradient at its size is noise a million times over."""
    recipe, trained, batches = recipe_of(**METHODS["safety_gradient"]), engine(), StepBatches()
    step, gradient = make_step(recipe, trained), trained.gradient
    monkeypatch.setattr(
        trained,
        "gradient",
        lambda *given: (lambda loss, g: (loss, [part * left for part in g]))(*gradient(*given)),
    )
    if refused:
        with pytest.raises(
            ValueError,
            match=r"^lambda is \d\.\de\+\d\d at step 1: the safety pairs' gradient has all but vanished",
        ):
            step(batches.useful(0), lambda: batches.pairs(0), 0)
    else:
        assert step(batches.useful(0), lambda: batches.pairs(0), 0)["safety_gradient/lambda"] > 10


def test_only_the_safe_side_is_mixed_in():
    pairs = StepBatches().pairs(0)
    for batch, safe in zip(pairs, safe_batches(pairs), strict=True):
        half = len(batch.input_ids) // 2
        assert torch.equal(safe.input_ids, batch.input_ids[:half]) and torch.equal(
            safe.labels, batch.labels[:half]
        )


EMAS = {
    "none": None,
    "shadow": EmaSection(enabled=True, decay=0.7, warmup_steps=1),
    "momentum": EmaSection(enabled=True, mode="momentum", decay=0.7, every=2),
}


def loop(folder: Path, method: str, ema: str, on_metrics=lambda metrics, number: None) -> Loop:
    trained = engine()
    section = TrainSection(
        engine="single",
        steps=6,
        batch_size=8,
        micro_batch_size=4,
        lr=LR,
        save_every=2,
        validate_every=3,
    )
    data = TrainingData(tiny_rows(), tiny_pairs(), 0, 4, 1, {"task": tiny_rows(6, seed=9)})
    callbacks = [*([Ema(trained, EMAS[ema])] if EMAS[ema] else []), Told(on_metrics)]
    return Loop(
        trained,
        make_step(recipe_of(**METHODS[method]), trained),
        data,
        section,
        0,
        folder,
        "tiny",
        callbacks,
    )


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "ema"),
    [("lisa", "shadow"), ("safety_gradient", "momentum"), ("safe_mix", "shadow"), ("lisa", "none")],
)
def test_a_resumed_run_ends_as_the_straight_one(tmp_path, method, ema):
    straight = loop(tmp_path / "straight", method, ema)
    assert straight.run()

    def kill(_metrics: dict, number: int) -> None:
        if number == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "killed", method, ema, kill).run()
    resumed = loop(tmp_path / "killed", method, ema)
    assert resumed.run() and torch.equal(weights(resumed.engine), weights(straight.engine))
    with straight.counted_weights(), resumed.counted_weights():
        assert torch.equal(weights(resumed.engine), weights(straight.engine))
    drop = ("time", "time/step")
    assert [
        {k: v for k, v in line.items() if k not in drop} for line in log(tmp_path / "killed")
    ] == [{k: v for k, v in line.items() if k not in drop} for line in log(tmp_path / "straight")]


def test_lisa_sees_the_task_samples_and_pairs_of_the_others():
    """Each kind of step is counted by itself: no task batch is lost to an alignment step,
    and the draws are those of every other step.
    """
    step = LisaStep(
        engine(), LisaSection(enabled=True, alignment_steps=2, task_steps=3), draw_every=4
    )
    positions = [step.positions(number) for number in range(10)]
    aligning = [number % 5 < 2 for number in range(10)]
    assert [task for (task, _), other in zip(positions, aligning, strict=True) if not other] == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]
    assert [draw for (_, draw), own in zip(positions, aligning, strict=True) if own] == [
        0,
        4,
        8,
        12,
    ]


def test_the_loop_gives_lisa_the_batches_that_it_counts(tmp_path):
    lisa = loop(tmp_path, "lisa", "none")
    seen = []
    lisa._useful = lambda number, task: (
        seen.append((number, task)) or Loop._useful(lisa, number, task)
    )
    assert lisa.run() and seen == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3)]


def test_an_average_that_would_never_begin_is_refused(tmp_path):
    trained = engine()
    average = Ema(trained, EmaSection(enabled=True, warmup_steps=4, every=2))
    section = TrainSection(engine="single", epochs=1.0, batch_size=8, micro_batch_size=4)
    with pytest.raises(
        ValueError, match=r"ema.warmup_steps 4 and ema.every 2 leave no step of 5 to average"
    ):
        Loop(
            trained,
            make_step(recipe_of(), trained),
            TrainingData(tiny_rows(), [], 0),
            section,
            0,
            tmp_path,
            "tiny",
            [average],
        )


def test_validation_sees_the_average_and_training_does_not(tmp_path):
    averaged, plain = (
        loop(tmp_path / "averaged", "plain", "shadow"),
        loop(tmp_path / "plain", "plain", "none"),
    )
    assert averaged.run() and plain.run()
    assert torch.equal(weights(averaged.engine), weights(plain.engine)), (
        "shadow leaves the training alone"
    )
    last, other = (
        log(tmp_path / name)[-1]["validation/task_loss"] for name in ("averaged", "plain")
    )
    batches = micro_batches(tiny_rows(6, seed=9), list(range(6)), 4, 0, 1, 0, 0, 0)
    with averaged.counted_weights():
        assert averaged.engine.loss(useful_loss, batches) == last != other


def test_the_log_counts_the_safety_pairs_of_every_step(tmp_path):
    assert (
        loop(tmp_path / "mix", "safe_mix", "none").run()
        and loop(tmp_path / "plain", "plain", "none").run()
    )
    assert [line["safety/pairs"] for line in log(tmp_path / "mix") if line["step"]] == [
        4,
        0,
        4,
        0,
        4,
        0,
    ]
    assert [line["safety/pairs"] for line in log(tmp_path / "plain") if line["step"]] == [0] * 6


class Counted:
    """Counts the pairs that a step draws."""

    def __init__(self):
        self.numbers: set[int] = set()

    def __call__(self, batches: StepBatches, number: int):
        self.numbers.add(number)
        return batches.pairs(number)


@pytest.mark.parametrize("method", ["safe_mix", "safety_gradient", "sap"])
def test_methods_draw_the_same_pairs_at_the_same_steps(method):
    sections = (
        PAIRS | {"sap": {"enabled": True, "layers": [1, 2]}} if method == "sap" else METHODS[method]
    )
    recipe = recipe_of(**sections)
    trained, batches, counted = engine(), StepBatches(), Counted()
    step = make_step(recipe, trained)
    for number in range(6):
        step(batches.useful(number), lambda n=number: counted(batches, n), number)
        trained.step(LR)
    assert counted.numbers == {0, 2, 4}


@pytest.mark.parametrize("turned", [False, True])
def test_the_step_that_stands_alone_is_made_first(monkeypatch, turned):
    """Else it would drop the step around it, in an order of DEFENCES that nothing asks for."""
    recipe = recipe_of(**PAIRS, safe_mix={"enabled": True}, sap={"enabled": True})
    order = list(reversed(recipe.parts)) if turned else recipe.parts
    monkeypatch.setattr(type(recipe), "parts", property(lambda self: order))
    made = make_step(recipe, engine())
    assert type(made).__name__ == "SafeMix" and type(made.step).__name__ == "SapStep"


def test_two_steps_that_stand_alone_are_refused():
    """Also where no conflict is named."""
    conflicts = {name: replace(each, conflicts={}) for name, each in DEFENCES.items()}
    with pytest.MonkeyPatch.context() as patched:
        for name, each in conflicts.items():
            patched.setitem(DEFENCES, name, each)
        with pytest.raises(
            ValueError, match=r"sap\.enabled and lisa.enabled do not go together: each has"
        ):
            recipe_of(**PAIRS, sap={"enabled": True}, lisa={"enabled": True})


def test_lisa_without_a_safety_pair_is_refused():
    never = {"safety_pairs": {"refresh_every": 0}}
    with pytest.raises(ValueError, match=r"safety_pairs\.refresh_every is 0, so that lisa would"):
        recipe_of(**never, lisa={"enabled": True})
