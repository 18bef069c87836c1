"""A new run from another one's checkpoint, and losses that leap: what is said, left out, or ends the training."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline import artifacts
from pipeline.cli import main
from pipeline.defences import recipes
from pipeline.defences.callback import Callback
from pipeline.defences.plain import PlainStep
from pipeline.engines.open import open_engine
from pipeline.recipe.strict_yaml import parse_overrides
from pipeline.stages import direction, prepare, train
from pipeline.stages.checks import check_start
from pipeline.stages.layout import Layout
from pipeline.training.loop import Loop, TrainingData
from pipeline.training.spikes import Spikes
from tests.project import make_project, write_recipe
from tests.tiny import tiny_lora, tiny_rows
from tests.told import Told
from tests.unit.recipe.test_recipe import content, load
from tests.unit.training.test_loop import interrupted, log, saved, section, straight, weights  # noqa: F401 (fixtures)

BASIS = {
    "the start model": "a digest",
    "train.engine": "single",
    "train.lora": {"r": 4, "alpha": 8},
}


@pytest.fixture
def work(interrupted) -> Path:  # noqa: F811
    """A stopped run's work folder, as stages name it, whose steps 2 and 4 can be started from."""
    folder = interrupted / ".train-sft-s0-0123456789.work"
    again = build(folder, basis=BASIS)
    again.told.on_metrics = lambda _, number: number == 3 and (folder / "STOP").touch()
    assert not again.run() and saved(folder) == ["step-000002", "step-000004"]
    return folder


def build(folder: Path, step=PlainStep, events=None, basis=None, ema=None, **changes) -> Loop:
    train = section(**changes)
    engine = open_engine(tiny_lora(), train)
    told = Told(on_event=(lambda text: None) if events is None else events.append)
    callbacks = [told] if ema is None else [ema, told]
    loop = Loop(
        engine,
        step(engine),
        TrainingData(tiny_rows(), [], 0),
        train,
        0,
        folder,
        "a run",
        callbacks,
        basis,
    )
    loop.told = told
    return loop


def test_a_run_starts_from_another_one_s_checkpoint_with_settings_of_its_own(
    work, tmp_path_factory
):
    folder, events = tmp_path_factory.mktemp("new"), []
    changes = {"lr": 1e-3, "resume_from": f"{work}@4", "save_every": 100}
    started = build(folder, events=events, basis=BASIS, **changes)
    assert started.run() and events == [f"started from {work.name}@4"]
    assert [line["step"] for line in log(folder)] == [1, 2, 3, 4, 5, 6]
    rates = [line["train/lr"] for line in log(folder)]
    assert max(rates[4:]) <= 1e-3 < min(rates[:4])

    by_hand = build(tmp_path_factory.mktemp("hand"), lr=1e-3)
    by_hand.engine.load(work / "checkpoints" / "step-000004" / "engine")
    for number in (4, 5):
        metrics = by_hand.step(by_hand._useful(number, number), None, number)
        by_hand.engine.step(
            log(folder)[number]["train/lr"],
            by_hand.engine.read({"n": by_hand.engine.gradient_norm()})["n"],
        )
        assert by_hand.engine.read(metrics)["train/loss"] == log(folder)[number]["train/loss"]
    assert torch.equal(weights(by_hand), weights(started))


def test_once_started_a_run_has_a_checkpoint_of_its_own(work, tmp_path_factory, monkeypatch):
    folder, events = tmp_path_factory.mktemp("new"), []
    changes = {"lr": 1e-3, "resume_from": f"{work}@4", "save_every": 100}
    killed = build(folder, events=events, basis=BASIS, **changes)
    monkeypatch.setattr(
        killed, "_one_step", lambda number, stop: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    work.rename(work.with_name("gone"))
    again = build(folder, events=events, basis=BASIS, **changes)
    assert again.run() and [event.partition(" from")[0] for event in events] == [
        "started",
        "resumed after step 4",
    ]
    assert [line["step"] for line in log(folder)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"at": 3}, "holds no checkpoint of step 3: it has those of steps 2, 4"),
        ({"folder": ".train-sft-s1-0123456789.work"}, "there is no folder"),
        (
            {"basis": {"the start model": "another"}},
            "does not go with this one: the start model is another one; make it the same",
        ),
        (
            {"basis": {"train.engine": "zero3"}},
            'train.engine was "single" there, and is "zero3" here; make it the same',
        ),
        (
            {"basis": {"train.lora": {"r": 4, "alpha": 16}}},
            "train.lora.alpha was 8 there, and is 16 here; make it the same",
        ),
        ({"steps": 4}, "is at step 4, and the training has 4: set train.steps beyond it"),
        (
            {"basis": {"format": 99, "the start model": "another"}},
            "whose checkpoints have another form: another version has written it, so begin without",
        ),
    ],
    ids=["step", "folder", "model", "engine", "adapter", "steps", "version"],
)
def test_a_checkpoint_that_does_not_go_with_the_run_is_refused(
    work, tmp_path_factory, changes, sentence
):
    given = f"{work.with_name(changes.get('folder', work.name))}@{changes.get('at', 4)}"
    started = build(
        tmp_path_factory.mktemp("new"),
        resume_from=given,
        steps=changes.get("steps", 6),
        basis=BASIS | changes.get("basis", {}),
    )
    said = ""
    try:
        started.run()
    except ValueError as error:
        said = str(error)
    assert said.startswith("resume_from ") and sentence in said


def test_a_damaged_checkpoint_is_no_start(work, tmp_path_factory):
    (work / "checkpoints" / "step-000004" / "more").write_text("x")
    with pytest.raises(ValueError, match="resume_from names a damaged checkpoint"):
        build(tmp_path_factory.mktemp("new"), resume_from=f"{work}@4", basis=BASIS).run()


@pytest.mark.parametrize(
    "text",
    [
        "folder@1",
        ".train-sft-s0-1a.work",
        ".train-sft-s0-1a.work@0",
        ".train-sft-s0-1a.work@x",
        "copy.work@4",
    ],
)
def test_what_names_no_step_is_refused_with_the_recipe(tmp_path, text):
    with pytest.raises(
        ValueError,
        match=r"resume_from is '.*': it takes the work folder of a training that is not finished, and a step",
    ):
        load(tmp_path, content(), "--train.resume_from", text)


class Leaps(PlainStep):
    """The gradient of steps 12 and 13 (from 1) is a thousand times what it is."""

    def __call__(self, useful, pairs, number, part=None):
        metrics = super().__call__(useful, pairs, number)
        if number in (11, 12):
            self.engine.add_gradient(self.engine.accumulated_gradient(), 999.0)
        return metrics


@pytest.fixture(scope="module")
def without_leaps(tmp_path_factory) -> torch.Tensor:
    """Weights of the same run that never sees steps 12 and 13."""
    run = build(tmp_path_factory.mktemp("calm"), steps=16)
    original = run._one_step
    run._one_step = lambda number, stop: False if number in (11, 12) else original(number, stop)
    assert run.run()
    return weights(run)


def test_a_spike_is_an_event_once_and_training_goes_on(tmp_path, without_leaps):
    run = build(tmp_path, Leaps, events=(events := []), steps=16)
    assert run.run() and not torch.equal(weights(run), without_leaps)
    assert (
        len(events) == 1
        and "the gradient's norm is " in events[0]
        and "times its median at step 12" in events[0]
    )


def test_a_spike_s_update_is_left_out_wherever_the_run_was_stopped(tmp_path, without_leaps):
    run = build(tmp_path / "straight", Leaps, events=(events := []), steps=16, on_spike="skip")
    assert run.run() and torch.equal(weights(run), without_leaps)
    assert [event.endswith("whose update is left out") for event in events] == [True, True]
    assert [line["step"] for line in log(tmp_path / "straight") if line["train/skipped"]] == [
        12,
        13,
    ]
    for number in (8, 12, 13):
        folder = tmp_path / f"stopped-{number}"
        stopped = build(folder, Leaps, steps=16, on_spike="skip", save_every=1)
        stopped.told.on_metrics = lambda _, at, number=number, folder=folder: (
            at == number - 1 and (folder / "STOP").touch()
        )
        assert not stopped.run() and saved(folder)[-1] == f"step-{number:06d}"
        again = build(folder, Leaps, steps=16, on_spike="skip", save_every=1)
        assert again.run() and torch.equal(weights(again), without_leaps)


def test_a_spike_ends_the_training_where_the_recipe_says_so(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"the gradient's norm is .* at step 12, before the update: begin anew from a checkpoint before it",
    ):
        build(tmp_path, Leaps, steps=16, on_spike="stop").run()
    assert saved(tmp_path)[-1] == "step-000010"


def test_a_run_that_has_left_the_range_for_good_ends(tmp_path):
    run = build(tmp_path, steps=40, on_spike="skip")
    run.step = Leaping(run.step.engine, 14, 99)
    with pytest.raises(
        ValueError, match="the last 10 steps were spikes, whose updates are left out"
    ):
        run.run()
    assert log(tmp_path)[-1]["step"] == 24 and saved(tmp_path)[-1] == "step-000024"


def test_steps_of_another_kind_are_held_against_their_own():
    def seen(spikes, losses):
        return [
            spikes.seen({"train/loss": loss, "train/grad_norm": 1.0}, number)
            for number, loss in enumerate(losses)
        ]

    losses = [100.0 if number % 5 == 0 else 1.0 for number in range(60)]
    assert not any(seen(Spikes(20.0, [], lambda number: number % 5 == 0), losses))
    assert sum(map(bool, seen(Spikes(20.0, []), losses))) == 10, (
        "the first two come before there is a median"
    )
    losses[50], losses[51] = 2001.0, 21.0
    found = seen(Spikes(20.0, [], lambda number: number % 5 == 0), losses)
    assert {number: text for number, text in enumerate(found) if text} == {
        50: "the loss is 2e+03, 20 times its median", 51: "the loss is 21, 21 times its median",
    }  # fmt: skip


def test_the_option_and_the_field_cannot_both_be_given(capsys):
    given = ["--resume-from", "a@1", "--train.resume-from", "b@2"]
    assert main(["train", "demo.yaml", *given]) == 2
    assert "--resume-from and --train.resume_from are the same" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        ["run", "demo.yaml"],
        ["train", "demo.yaml"],
        ["train", "demo.yaml", "--method", "sap", "--seeds", "[0, 1]"],
    ],
)
def test_the_option_is_of_one_training(capsys, given):
    assert main([*given, "--resume-from", ".train-sap-s0-1a.work@1"]) == 2
    assert "--resume-from applies to one training" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["track"], ["plan"], ["doctor", "--method", "sap"]])
def test_the_option_is_refused_where_it_would_do_nothing(capsys, given):
    assert (
        main([given[0], "demo.yaml", *given[1:], "--resume-from", ".train-sap-s0-1a.work@1"]) == 2
    )
    assert f"--resume-from would do nothing in `sap {given[0]}`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        (
            [
                "--train.lr",
                "1",
                "--train.steps",
                "9",
                "--train.on_spike",
                "skip",
                "--data.validation_samples",
                "9",
            ],
            True,
        ),
        (["--train.lora.dropout", "0.5"], True),
        (["--train.lora.r", "3"], False),
        (["--train.adapter", "full"], False),
        (["--train.engine", "fsdp2"], False),
        (["--sap.target_correction", "0.4"], False),
        (["--sap.probe_step", "rms", "--sap.beta", "3"], False),
        (["--ema.enabled", "true"], False),
        (["--align.train.lr", "3e-5"], False),
        (["--model.dtype", "float32"], False),
    ],
)
def test_what_a_checkpoint_fits_on(changes, same):
    """What the method carries, and where its weights belong; not what a run is started anew for."""

    def of(given):
        return (lambda experiment: Layout(experiment).basis(experiment.cell("sap", 0)))(
            recipes.load("demo.yaml", parse_overrides(given))
        )

    before = of(["--model.dtype", "bfloat16"])
    assert (
        of(["--model.dtype", "bfloat16", *changes] if "--model.dtype" not in changes else changes)
        == before
    ) is same


def test_what_the_alignment_s_checkpoint_fits_on():
    def of(*given):
        return Layout(recipes.load("demo.yaml", parse_overrides(list(given)))).basis(None)

    assert (
        of()
        == of("--align.train.lr", "3e-5", "--train.lora.r", "3")
        != of("--align.train.lora.r", "3")
    )


@pytest.mark.processes
def test_a_stage_starts_from_another_one_s_checkpoint_and_records_it(tmp_path):
    raw = make_project(tmp_path)
    raw["align"] = {"enabled": False}
    raw["train"] |= {"engine": "single", "ranks": 1, "steps": 3}
    raw["tracking"] = {"enabled": False}
    path = write_recipe(tmp_path, raw)
    old = recipes.load(path)
    cell, layout = old.cell("sap", 0), Layout(old)
    prepare.prepare(old)
    direction.direction(old, cell)
    work = layout.work(layout.train(cell))
    work.mkdir()
    (work / "STOP").touch()
    assert train.train(old, cell) is False and saved(work) == ["step-000001"]
    changes = ["--train.lr", "1e-4", "--train.resume_from", f"{work}@1"]
    new = recipes.load(path, parse_overrides(changes))
    with pytest.raises(
        ValueError,
        match=r"train.resume_from names .*: sap.target_correction was .* there, and is 0.3 here",
    ):
        check_start(
            "train",
            new.base.train,
            other := recipes.load(
                path, parse_overrides([*changes, "--sap.target_correction", "0.3"])
            ),
            other.cell("sap", 0),
        )
    check_start("train", new.base.train, new, new.cell("sap", 0))
    assert train.train(new, new.cell("sap", 0))
    made = Layout(new).train(new.cell("sap", 0))
    origin = artifacts.read_manifest(made)["inputs"]["resume_from"]
    assert origin == {
        "checkpoint": f"{work.name}@1",
        "digest": artifacts.source(work / "checkpoints" / "step-000001")["content"],
    }
    assert [json.loads(line)["step"] for line in (made / "metrics.jsonl").read_text().splitlines()][
        -3:
    ] == [1, 2, 3]


def test_weights_of_an_alignment_made_again_are_another_start(work, tmp_path_factory):
    """The folder's name is the same, and what it holds is not: on a GPU, or by other ranks."""
    given = {"resume_from": f"{work}@4"}
    with pytest.raises(
        ValueError, match="the start model's content is another one; make it the same"
    ):
        build(
            tmp_path_factory.mktemp("new"),
            basis=BASIS | {"the start model's content": {"folder": "align-1", "content": "b"}},
            **given,
        ).run()


class Leaping(PlainStep):
    """Its loss is enormous between two steps, by its log."""

    def __init__(self, engine, after, before):
        super().__init__(engine)
        self.after, self.before = after, before

    def __call__(self, useful, pairs, number, part=None):
        metrics = super().__call__(useful, pairs, number)
        return metrics | {
            "train/loss": torch.tensor(9e9 if self.after < number < self.before else 1.0)
        }


class Averaged(Callback):
    """Counts its updates."""

    def __init__(self):
        self.seen = []

    def updated(self, number):
        self.seen.append(number)


def test_a_step_that_is_left_out_moves_no_average(tmp_path):
    average = Averaged()
    run = build(tmp_path, Leaps, steps=16, on_spike="skip", ema=average)
    assert run.run() and average.seen == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14, 15, 16]


@pytest.mark.parametrize("steps", [16, 60])
def test_spikes_of_the_run_before_are_not_the_last_ten(tmp_path, steps):
    """A run that only noted its spikes, begun anew with skip:
    it ends after ten of its own, or goes on where the spikes end.
    """
    source = tmp_path / ".train-sft-s0-0123456789.work"
    old = build(source, steps=100, save_every=1, basis=BASIS)
    old.step = Leaping(old.engine, 14, 99)
    old.told.on_metrics = lambda _, number: number == 27 and (source / "STOP").touch()
    assert not old.run() and old.spikes.in_a_row > 10
    new = build(
        tmp_path / "new", steps=28 + steps, on_spike="skip", resume_from=f"{source}@28", basis=BASIS
    )
    new.step = Leaping(new.engine, 14, 99 if steps == 60 else 36)
    if steps == 60:
        with pytest.raises(ValueError, match="the last 10 steps were spikes"):
            new.run()
        assert log(tmp_path / "new")[-1]["step"] == 37
    else:
        assert (
            new.run() and sum(line.get("train/skipped", 0) for line in log(tmp_path / "new")) == 8
        )


def test_a_copy_of_a_checkpoint_is_left_alone(work, tmp_path_factory):
    copy = work / "checkpoints" / "step-000002-keep"
    shutil.copytree(work / "checkpoints" / "step-000002", copy)
    started = build(tmp_path_factory.mktemp("new"), resume_from=f"{work}@4", basis=BASIS)
    assert started.run()
    again = build(work, basis=BASIS)
    assert again.run() and saved(work) == ["step-000002-keep", "step-000004", "step-000006"]


@pytest.mark.parametrize("option", ["--method", "--methods", "--resume-from"])
def test_an_option_without_a_value_is_refused(capsys, option):
    assert main(["train", "demo.yaml", option, ""]) == 2
    assert f"{option} is empty" in capsys.readouterr().err
