"""The loop around a step: learning rate, what stops it, what it resumes from, and what its log holds afterwards."""

import errno
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from pipeline import artifacts
from pipeline.defences.plain import PlainStep
from pipeline.engines.open import open_engine
from pipeline.recipe.sections import TrainSection
from pipeline.training import checkpoint
from pipeline.training.loop import Loop, TrainingData, learning_rate
from tests.tiny import tiny_lora, tiny_rows
from tests.told import Told


def section(**changes) -> TrainSection:
    return TrainSection(
        **{
            "engine": "single",
            "steps": 6,
            "batch_size": 8,
            "micro_batch_size": 4,
            "lr": 1e-2,
            "save_every": 2,
            **changes,
        }
    )


def build(
    folder: Path,
    step=PlainStep,
    on_metrics=lambda metrics, number: None,
    validation=None,
    **changes,
) -> Loop:
    train = section(**changes)
    engine = open_engine(tiny_lora(), train)
    data = TrainingData(tiny_rows(), [], 0, validation=validation or {})
    loop = Loop(engine, step(engine), data, train, 0, folder, "tiny", [Told(on_metrics)])
    loop.told = loop.callbacks[0]
    return loop


def weights(loop: Loop) -> torch.Tensor:
    return torch.cat(loop.engine.weights())


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """Six steps without interruption: the folder and the weights."""
    folder = tmp_path_factory.mktemp("straight")
    loop = build(folder)
    assert loop.run()
    return folder, weights(loop)


@pytest.fixture
def interrupted(straight, tmp_path) -> Path:
    """The folder of a run that was killed after step 4's checkpoint and at the end of step 5;
    steps 2 and 4 can be resumed.
    """

    def kill(_metrics: dict, number: int) -> None:
        if number == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, on_metrics=kill).run()
    assert saved(tmp_path) == ["step-000002", "step-000004"] and len(log(tmp_path)) == 5
    return tmp_path


class Recorded(PlainStep):
    """Keeps what it is given; wants a quarter of the samples by themselves."""

    share = 0.25

    def __init__(self, engine):
        super().__init__(engine)
        self.seen = []

    def __call__(self, useful, pairs, number, part):
        self.seen.append((useful, part))
        return super().__call__(useful, pairs, number)


def test_a_step_that_asks_for_a_share_gets_the_first_samples_as_a_batch_of_their_own(tmp_path):
    loop = build(tmp_path, Recorded)
    assert loop.run()
    for number, (useful, part) in enumerate(loop.step.seen):
        first = [loop.data.train[i] for i in loop.order.step(number)[:2]]
        assert sum(len(batch.input_ids) for batch in useful) == 8 and [
            len(batch.input_ids) for batch in part
        ] == [2]
        assert [
            row[: len(sample["input_ids"])]
            for row, sample in zip(part[0].input_ids.tolist(), first, strict=True)
        ] == [sample["input_ids"] for sample in first]
        assert part[0].global_tokens == len(part[0].targets.tokens) < useful[0].global_tokens


def test_warm_up_rises_linearly_to_the_peak():
    train = section(lr=0.4, warmup_steps=4)
    assert [learning_rate(train, number, 20) for number in range(5)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4]
    )


@pytest.mark.parametrize(
    ("decay", "quarter", "half"),
    [("cosine", 0.853553, 0.5), ("linear", 0.75, 0.5), ("constant", 1.0, 1.0)],
)
def test_decay_after_the_warm_up(decay, quarter, half):
    train = section(lr=1.0, warmup_steps=2, decay=decay)
    assert [learning_rate(train, number, 10) for number in (2, 4, 6)] == pytest.approx(
        [1.0, quarter, half], abs=1e-6
    )


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_decay_never_rises_and_never_wastes_the_last_step(decay):
    rates = [
        learning_rate(section(lr=1.0, warmup_steps=0, decay=decay), number, 10)
        for number in range(10)
    ]
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.2


def test_the_logged_rate_is_the_one_the_schedule_says(straight):
    assert [line["train/lr"] for line in log(straight[0])] == [
        learning_rate(section(), number, 6) for number in range(6)
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_a_token_budget_pads_less_and_learns_the_same(straight, tmp_path, packing):
    loop = build(tmp_path, tokens_per_micro_batch=30, packing=packing)
    assert loop.run()
    one, other = log(straight[0]), log(tmp_path)
    assert sum(line["train/padding"] for line in other) < sum(line["train/padding"] for line in one)
    assert not packing or all(line["train/padding"] == 0 for line in other)
    assert [line["train/loss"] for line in other] == pytest.approx(
        [line["train/loss"] for line in one], rel=1e-4
    )


@pytest.mark.parametrize("packing", [False, True])
def test_validation_keeps_the_token_budget(tmp_path, packing):
    losses, sizes = [], []
    for budget in (None, 30):
        rows, packed = {"task": tiny_rows(20, seed=3)}, packing and budget is not None
        how = {"tokens_per_micro_batch": budget, "packing": packed}
        loop = build(tmp_path / str(budget), validation=rows, steps=1, **how)

        def watched(loss_fn, batches, loss=loop.engine.loss, packed=packed):
            sizes.append(max(batch.input_ids.numel() for batch in batches))
            assert any(batch.packed for batch in batches) == packed
            return loss(loss_fn, batches)

        loop.engine.loss = watched
        assert loop.run()
        losses.append(log(tmp_path / str(budget))[0]["validation/task_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert max(sizes[:2]) > 30 >= max(sizes[2:])


def test_epochs_are_rounded_up_to_whole_steps(tmp_path):
    assert build(tmp_path, steps=None, epochs=1.5).steps == 8  # 40 rows, 8 a step: 7.5


class BrokenLoss(PlainStep):
    """A step whose third loss is not finite; its gradient is there, waiting to be applied."""

    def __call__(self, useful, pairs, number, part=None):
        return super().__call__(useful, pairs, number) | (
            {"train/loss": float("inf")} if number == 2 else {}
        )


class BrokenGradient(PlainStep):
    """A step whose third loss is fine and whose gradient is not."""

    def __call__(self, useful, pairs, number, part=None):
        metrics = super().__call__(useful, pairs, number)
        if number == 2:
            self.engine.parameters[-1].grad.view(-1)[0] = float("nan")
        return metrics


@pytest.mark.parametrize(
    ("step", "what"), [(BrokenLoss, "loss is inf"), (BrokenGradient, "gradient's norm is nan")]
)
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(tmp_path, step, what):
    good = build(
        tmp_path / "good",
        on_metrics=lambda _, number: number == 1 and (good.folder / "STOP").touch(),
    )
    assert not good.run()
    loop = build(tmp_path / "broken", step=step)
    with pytest.raises(
        ValueError, match=rf"the {what} at step 3, before the update: lower train.lr \(now 0.01\)"
    ) as caught:
        loop.run()
    assert "\n" not in str(caught.value)
    assert torch.equal(weights(loop), weights(good)), "the weights are those after step 2"
    assert [line["step"] for line in log(tmp_path / "broken")] == [1, 2] and saved(
        tmp_path / "broken"
    ) == ["step-000002"]


def test_a_resumed_run_ends_as_the_straight_one(interrupted, straight):
    loop = build(interrupted)
    assert loop.run() and torch.equal(weights(loop), straight[1])


def test_events_tell_of_every_stop_and_return(tmp_path, monkeypatch):
    """On the same run, whichever process says it; a first start is one in a job only."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    events: list[str] = []

    def run(stop_after: int | None = None) -> bool:
        loop = build(
            tmp_path,
            on_metrics=lambda _, number: number + 1 == stop_after and (tmp_path / "STOP").touch(),
        )
        loop.told.on_event = events.append
        return loop.run()

    assert not run(stop_after=3)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SAP_RESTART_REASON", "time limit or preemption")
    assert run()
    assert events[0].startswith("stopped after step 3 (stop file ")
    assert events[1:] == ["resumed after step 3, Slurm job 7, restart 1: time limit or preemption"]


def test_a_job_whose_checkpoints_cannot_be_read_does_not_begin_again(interrupted, monkeypatch):
    """The batch script saw step 4; this node sees none, or damaged ones only:
    hours of work are not thrown away without a word.
    """
    for folder in (interrupted / "checkpoints").glob("step-*"):
        (folder / "manifest.json").write_text("{")
    monkeypatch.setenv("SAP_PROGRESS", "4")
    with (
        pytest.raises(
            RuntimeError,
            match=r"the job had saved step 4 in .*, but no checkpoint there can be read",
        ),
        pytest.warns(UserWarning, match="damaged"),
    ):
        build(interrupted).run()
    assert len(log(interrupted)) == 5, "the log is as it was"


def test_the_log_is_rewound_to_the_checkpoint(interrupted, straight):
    """Step 5 was logged and will run again, and the kill cut step 6's line short:
    each step stands there once, as in the straight run.
    """
    with (interrupted / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "train/lo')
    assert build(interrupted).run()
    assert [line["step"] for line in log(interrupted)] == [1, 2, 3, 4, 5, 6]
    assert [line["train/loss"] for line in log(interrupted)] == [
        line["train/loss"] for line in log(straight[0])
    ]


@pytest.mark.parametrize("harm", ["edited", "cut", "emptied", "gone"])
def test_a_log_that_was_changed_is_put_back_from_the_checkpoint_and_it_is_said(
    interrupted, straight, harm
):
    path = interrupted / "metrics.jsonl"
    if harm == "gone":
        path.unlink()
    else:
        text = path.read_text()
        path.write_text(
            {
                "edited": text.replace("train/loss", "train/lass", 1),
                "cut": text[:100],
                "emptied": "",
            }[harm]
        )
    with pytest.warns(UserWarning, match="metrics.jsonl is not what it was at the checkpoint"):
        assert build(interrupted).run()
    assert [line["train/loss"] for line in log(interrupted)] == [
        line["train/loss"] for line in log(straight[0])
    ]


def poisoned(loop: Loop, at: int) -> Loop:
    """The update of step `at` leaves a weight that is no number, as an overflow in the optimizer does."""
    original, calls = loop.engine.step, []

    def step(*args):
        original(*args)
        calls.append(args)
        if len(calls) == at:
            loop.engine.storage()[0].view(-1)[0] = float("nan")

    loop.engine.step = step
    return loop


@pytest.mark.parametrize(
    ("at", "last"), [(6, "the last checkpoint is .*step-000004"), (2, "there is no checkpoint yet")]
)
def test_weights_that_are_no_numbers_after_an_update_are_not_saved(tmp_path, at, last):
    with pytest.raises(
        ValueError,
        match=f"the weights are not finite after the update of step {at}: lower train.lr .*{last}",
    ):
        poisoned(build(tmp_path), at).run()
    assert saved(tmp_path) == (["step-000002", "step-000004"] if at == 6 else [])


def test_what_a_step_carries_must_be_finite_too(tmp_path):
    loop = build(tmp_path)
    loop.state.state_dict = lambda: {"v": torch.tensor([1.0, float("inf")])}
    with pytest.raises(
        ValueError,
        match="what the method carries from step to step is not finite after the update of step 2",
    ):
        loop.run()


def test_a_checkpoint_that_is_not_finite_is_refused_by_name(tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        # as an older version wrote it, after its last update
        before.setattr(checkpoint, "_not_finite", lambda engine, step: None)
        assert poisoned(build(tmp_path), 6).run()
    with pytest.raises(
        ValueError,
        match=r"the weights are not finite in .*step-000006: delete .*checkpoints and lower train.lr",
    ):
        build(tmp_path).run()


def test_without_a_checkpoint_the_log_starts_anew(interrupted):
    shutil.rmtree(interrupted / "checkpoints")
    assert build(interrupted).run()
    assert [line["step"] for line in log(interrupted)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(interrupted, straight, damage):
    path = interrupted / "checkpoints" / "step-000004" / "engine" / "single.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:-9])
    if damage == "missing":
        path.unlink()
    seen = []
    loop = build(interrupted, on_metrics=lambda _, number: seen.append(number))
    with pytest.warns(
        UserWarning, match="checkpoint is damaged, the one before it is used: .*step-000004"
    ):
        assert loop.run()
    assert seen == [3, 4, 5, 6] and torch.equal(weights(loop), straight[1])
    for name in saved(interrupted):
        artifacts.verify(interrupted / "checkpoints" / name)  # the damaged one was written again
    assert not list((interrupted / "checkpoints").glob(".*.tmp"))


def test_a_checkpoint_without_its_marker_does_not_exist(interrupted):
    (interrupted / "checkpoints" / "step-000004" / "DONE").unlink()
    seen = []
    loop = build(interrupted, on_metrics=lambda _, number: seen.append(number))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert loop.run()
    assert seen == [3, 4, 5, 6] and artifacts.complete(interrupted / "checkpoints" / "step-000004")


def test_a_checkpoint_of_another_run_is_refused_in_one_sentence(interrupted):
    before = (interrupted / "metrics.jsonl").read_text()
    loop = build(interrupted)
    loop.identity = "another"
    with pytest.raises(
        ValueError, match=r"step-000004 belongs to another run, or to this one .*: delete "
    ) as caught:
        loop.run()
    assert "\n" not in str(caught.value)
    assert (interrupted / "metrics.jsonl").read_text() == before and saved(interrupted) == [
        "step-000002",
        "step-000004",
    ]


def test_only_the_last_two_checkpoints_are_kept(straight):
    assert saved(straight[0]) == ["step-000004", "step-000006"]


def test_a_stop_file_stops_at_the_steps_end_with_the_state_saved(tmp_path, straight):
    loop = build(tmp_path, on_metrics=lambda _, number: number == 2 and (tmp_path / "STOP").touch())
    assert not loop.run()
    assert saved(tmp_path) == ["step-000002", "step-000003"] and [
        line["step"] for line in log(tmp_path)
    ] == [1, 2, 3]
    again = build(tmp_path)  # the file was obeyed and is gone: the same command goes on
    assert again.run() and torch.equal(weights(again), straight[1])


def test_a_stop_during_the_last_step_is_a_finish(tmp_path):
    assert build(
        tmp_path, steps=2, on_metrics=lambda _, number: number == 1 and (tmp_path / "STOP").touch()
    ).run()


def test_validation_runs_at_its_interval_and_at_the_end_and_changes_nothing(tmp_path, straight):
    loop = build(tmp_path, validation={"task": tiny_rows(6, seed=5)}, validate_every=4)
    assert loop.run()
    assert [line["step"] for line in log(tmp_path) if "validation/task_loss" in line] == [0, 4, 6]
    assert torch.equal(weights(loop), straight[1])


def test_a_checkpoint_that_a_full_disk_cuts_short_takes_no_room_and_the_run_goes_on_from_the_one_before(
    tmp_path, straight
):
    loop = build(tmp_path)
    write = loop.engine.save

    def full(folder: Path, vectors: dict) -> None:
        write(folder, vectors)
        if folder.parent.name == ".step-000004.tmp":
            raise OSError(errno.ENOSPC, "No space left on device")

    loop.engine.save = full
    with pytest.raises(OSError) as met:
        loop.run()
    checkpoints = tmp_path / "checkpoints"
    assert (met.value.errno, met.value.filename) == (errno.ENOSPC, str(checkpoints))
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]
    again = build(tmp_path)
    assert again.run() and torch.equal(weights(again), straight[1])
