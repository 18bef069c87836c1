"""An evaluation shared by several processes: the same answers and measures as one process's, merged once,
whatever happens on the way.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.data import prompts
from pipeline.defences import recipes
from pipeline.evaluation.evaluate import Measured, conclude
from pipeline.evaluation.shards import PromptSlice, interleaved
from pipeline.stages import evaluate as stage
from pipeline.stages import prepare
from pipeline.stages.layout import Layout
from tests.project import ROOT, make_project, quiet, run, write_recipe

pytestmark = [pytest.mark.processes, pytest.mark.slow]

COUNTS = {"harmful": 6, "harmless": 4, "task": 2}  # of three shards one has no task prompt


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Layout:
    """The tiny project with its data prepared, and no model trained: the shipped one is evaluated."""
    folder = tmp_path_factory.mktemp("shards")
    content = make_project(folder)
    content["evaluate"]["task_prompts"] = COUNTS["task"]
    content |= {"align": {"enabled": False}, "tracking": {"enabled": False}}
    experiment = recipes.load(write_recipe(folder, content))
    prepare.prepare(experiment)
    return Layout(experiment)


@pytest.fixture(scope="module")
def whole(project) -> Path:
    """The evaluation by one process."""
    return evaluated(project)


@pytest.fixture(scope="module")
def thirds(project, tmp_path_factory) -> Path:
    """Three complete shards in their work folder, not merged: tests take copies."""
    layout = project_in(project, tmp_path_factory.mktemp("thirds"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_merge", lambda *_: None)
        for index in range(3):
            assert evaluate(layout, PromptSlice(index, 3))
    return layout.work(target(layout))


def project_in(project: Layout, output: Path, **changes) -> Layout:
    """The project with the same prepared data and nothing evaluated."""
    for folder in (project.prepare(), project.prompts()):
        shutil.copytree(folder, output / "tiny" / folder.name)
    return Layout(recipes.load(project.experiment.path, {"output_dir": str(output), **changes}))


def with_thirds(project: Layout, thirds: Path, output: Path, **changes) -> Layout:
    layout = project_in(project, output, **changes)
    shutil.copytree(thirds, layout.work(target(layout)))
    return layout


def shipped(layout: Layout):
    return next(subject for subject in layout.subjects() if subject.name == "shipped")


def target(layout: Layout) -> Path:
    return layout.evaluate(shipped(layout))


def evaluate(layout: Layout, *shard: PromptSlice) -> bool:
    return stage.evaluate(layout.experiment, shipped(layout), *shard)


def evaluated(layout: Layout, *shards: PromptSlice) -> Path:
    for shard in shards:
        assert evaluate(layout, shard)
    if not shards:
        assert evaluate(layout)
    artifacts.verify(target(layout))
    return target(layout)


def assert_same(folder: Path, whole: Path) -> None:
    """The answers byte for byte; the loss but for the order of its sum."""
    assert (folder / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()
    found, expected = (json.loads((each / "metrics.json").read_text()) for each in (folder, whole))
    assert (
        found.pop("test_loss") == pytest.approx(expected.pop("test_loss"), rel=1e-6)
        and found == expected
    )
    assert (
        artifacts.read_manifest(folder)["files"].keys()
        == artifacts.read_manifest(whole)["files"].keys()
    )
    assert not list(folder.parent.glob(".*")), "no work folder, temporary folder or lock stays"


def no_model(*_) -> None:
    raise AssertionError("a model was loaded")


def test_the_last_shard_merges_to_what_one_process_measures(project, whole, tmp_path):
    answers = [json.loads(line) for line in (whole / "answers.jsonl").read_text().splitlines()]
    assert {name: sum(answer["set"] == name for answer in answers) for name in COUNTS} == COUNTS
    assert len({answer["response"] for answer in answers}) >= 4, (
        "answers that are all alike would hide their order"
    )
    layout = project_in(project, tmp_path)
    for index in (2, 0):
        assert evaluate(layout, PromptSlice(index, 3)) and not target(layout).exists()
    assert_same(evaluated(layout, PromptSlice(1, 3)), whole)
    assert target(layout).name == whole.name


def test_prompts_that_are_missing_are_made_once_by_one_of_many(project, tmp_path, monkeypatch):
    """Eight evaluations that begin at the same moment: one makes the prompts, the others wait for them."""
    layout = project_in(project, tmp_path)
    shutil.rmtree(layout.prompts())
    made, together, write = [], threading.Barrier(8), prompts.write_prompts

    def slowly(*arguments):
        made.append(arguments)
        time.sleep(0.5)
        return write(*arguments)

    monkeypatch.setattr(prompts, "write_prompts", slowly)

    def begin(_: int) -> Path:
        together.wait()
        return prepare.make_prompts(layout)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(begin, range(8))) == {layout.prompts()}
    assert len(made) == 1
    artifacts.verify(layout.prompts())
    assert not list(layout.root.glob(".*")), "no temporary folder or lock stays"


def test_an_evaluation_makes_the_prompts_itself(project, whole, tmp_path):
    layout = project_in(project, tmp_path)
    shutil.rmtree(layout.prompts())
    assert_same(evaluated(layout), whole)
    assert artifacts.complete(layout.prompts())


def test_a_shard_holds_every_nth_row_and_may_lack_a_set(thirds):
    sizes = []
    for index in range(3):
        part = Measured.read(thirds / f"shard-{index}-of-3")
        sizes.append(
            {name: sum(answer["set"] == name for answer in part.answers) for name in COUNTS}
        )
    assert sizes == [
        {"harmful": 2, "harmless": 2, "task": 1},
        {"harmful": 2, "harmless": 1, "task": 1},
        {"harmful": 2, "harmless": 1, "task": 0},
    ]
    assert (part.test_loss, part.tokens) == (0, 0)


def test_one_shard_is_the_whole(project, whole, tmp_path):
    folder = evaluated(project_in(project, tmp_path), PromptSlice.parse("0/1"))
    for name in ("answers.jsonl", "metrics.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_complete_shards_and_evaluations_load_no_model(project, thirds, tmp_path, monkeypatch):
    layout = with_thirds(project, thirds, tmp_path)
    shutil.rmtree(layout.shard(target(layout), 1, 3))
    monkeypatch.setattr(stage, "load_whole", no_model)
    assert evaluate(layout, PromptSlice(0, 3)) and not target(layout).exists()
    shutil.copytree(thirds / "shard-1-of-3", layout.shard(target(layout), 1, 3))
    assert evaluate(layout, PromptSlice(0, 3)) and artifacts.complete(target(layout)), (
        "its shard was complete, and it merged"
    )
    assert (
        evaluate(layout)
        and evaluate(layout, PromptSlice(0, 3))
        and evaluate(layout, PromptSlice(5, 99))
    )


def test_the_loser_returns_quietly(project, thirds, whole, tmp_path):
    layout = with_thirds(project, thirds, tmp_path)
    release = artifacts.claim(layout.work(target(layout)))  # as the merger does
    assert evaluate(layout, PromptSlice(2, 3)) and not target(layout).exists()
    assert all(artifacts.complete(layout.shard(target(layout), index, 3)) for index in range(3))
    release()
    assert_same(evaluated(layout, PromptSlice(2, 3)), whole)


def test_all_at_once_merge_once(project, thirds, whole, tmp_path, monkeypatch):
    """Eight that find all shards complete at the same moment, among them the same shard twice."""
    layout = with_thirds(project, thirds, tmp_path)
    concluded, together = [], threading.Barrier(8)
    monkeypatch.setattr(
        stage,
        "conclude",
        lambda parts, folder: concluded.append(len(parts)) or conclude(parts, folder),
    )

    def finish(index: int) -> bool:
        together.wait()
        return evaluate(layout, PromptSlice(index % 3, 3))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(finish, range(8)))
    assert concluded == [3]
    assert_same(target(layout), whole)


def test_a_merge_that_was_killed_is_done_by_any_shard(project, thirds, whole, tmp_path):
    layout = with_thirds(project, thirds, tmp_path)
    child = os.fork()
    if child == 0:
        artifacts.publish = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        evaluate(layout, PromptSlice(0, 3))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = {path.name for path in target(layout).parent.glob(".*")}
    assert len(left) == 4 and not target(layout).exists(), (
        "the work folder, the half-made evaluation and both locks"
    )
    assert_same(evaluated(layout, PromptSlice(1, 3)), whole)


def test_a_merge_that_was_killed_before_its_marker_is_done_again(project, thirds, whole, tmp_path):
    layout = with_thirds(project, thirds, tmp_path)
    shutil.copytree(whole, target(layout))
    (target(layout) / artifacts.MARKER).unlink()
    assert_same(evaluated(layout, PromptSlice(1, 3)), whole)


def test_shards_of_another_number_do_not_mix(project, thirds, whole, tmp_path):
    layout = with_thirds(project, thirds, tmp_path)
    shutil.rmtree(layout.shard(target(layout), 0, 3))
    assert evaluate(layout, PromptSlice(0, 2)) and not target(layout).exists()
    assert_same(evaluated(layout, PromptSlice(1, 2)), whole)


def test_a_repeated_shard_that_comes_too_late_leaves_nothing(project, whole, tmp_path, monkeypatch):
    """Another process did the same shard, merged and cleared the work folder while this one measured."""
    layout = project_in(project, tmp_path)

    def late(*arguments):
        shutil.copytree(whole, target(layout))
        return measure(*arguments)

    measure = stage.measure
    monkeypatch.setattr(stage, "measure", late)
    assert_same(evaluated(layout, PromptSlice(0, 3)), whole)


def test_a_damaged_shard_is_named(project, thirds, tmp_path):
    layout = with_thirds(project, thirds, tmp_path)
    path = layout.shard(target(layout), 1, 3) / "answers.jsonl"
    path.write_text(path.read_text().replace('"label": "answer"', '"label": "refusal"', 1))
    with pytest.raises(
        ValueError, match=f"{path} does not match .*: delete {path.parent} and run its stage again"
    ):
        evaluate(layout, PromptSlice(0, 3))
    assert not target(layout).exists()


@pytest.mark.parametrize("log_answers", [False, True])
def test_tracking_hears_of_the_merge_only(project, tmp_path, log_answers):
    layout = project_in(
        project,
        tmp_path,
        tracking={
            "enabled": True,
            "log_answers": log_answers,
            "uri": f"sqlite:///{tmp_path}/none/store.db",
        },
    )
    evaluated(layout, *(PromptSlice(index, 3) for index in range(3)), PromptSlice(0, 3))
    (outbox,) = (layout.root / "tracking").glob("*.jsonl")
    entries = [json.loads(line) for line in outbox.read_text().splitlines()]
    assert [entry["kind"] for entry in entries] == [
        "start",
        "metrics",
        *["artifact"] * log_answers,
        "end",
    ]
    metrics = json.loads((target(layout) / "metrics.json").read_text())
    assert entries[0]["key"] == target(layout).name and entries[-1]["status"] == "FINISHED"
    assert entries[1]["values"]["evaluate/test_loss"] == metrics["test_loss"]
    assert entries[1]["values"]["evaluate/non_refusal_rate"] == metrics["non_refusal_rate"]["value"]


def test_two_commands_at_once(project, whole, tmp_path):
    layout = project_in(project, tmp_path)
    commands = [
        [sys.executable, "launch/evaluate.py", "--config", str(project.experiment.path), "--method", "shipped",
         f"--output_dir={tmp_path}", "--shard", f"{index}/2"] for index in range(2)
    ]  # fmt: skip
    jobs = [
        subprocess.Popen(command, cwd=ROOT, env=quiet(), stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    errors = [job.communicate(timeout=900)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], errors
    assert all(f"[evaluate shipped {index}/2] harmful 3/3" in errors[index] for index in range(2))
    assert_same(target(layout), whole)


SENTENCES = {
    "4/4": "--shard is '4/4', but shards are counted from 0: K of K/4 is at most 3",
    "0/0": "--shard is '0/0', but shards are counted from 0: there is at least one",
    "x": "--shard is 'x', but it takes K/N: shard K of N, counted from 0, e.g. 0/4",
    "": "--shard is '', but it takes K/N: shard K of N, counted from 0, e.g. 0/4",
    "1/2/3": "--shard is '1/2/3', but it takes K/N: shard K of N, counted from 0, e.g. 0/4",
    "-1/4": "--shard is '-1/4', but it takes K/N: shard K of N, counted from 0, e.g. 0/4",
    "0/7": "--shard is '0/7', but there are 6 harmful prompts to share: N of K/N is at most 6",
}


@pytest.mark.parametrize("given", SENTENCES)
def test_a_shard_that_is_none_is_one_sentence(project, tmp_path, given):
    project_in(project, tmp_path)
    arguments = [
        "--config",
        str(project.experiment.path),
        "--method",
        "shipped",
        f"--output_dir={tmp_path}",
        f"--shard={given}",
    ]
    result = run(["launch/evaluate.py", *arguments])
    assert (result.returncode, result.stderr) == (2, f"error: {SENTENCES[given]}\n")
    there = {project.prepare().name, project.prompts().name}
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == there, "nothing is written"


def test_too_many_shards_are_refused_before_a_model_is_loaded(project, tmp_path, monkeypatch):
    layout = project_in(project, tmp_path)
    monkeypatch.setattr(stage, "load_whole", no_model)
    with pytest.raises(ValueError, match="at most 6"):
        evaluate(layout, PromptSlice(6, 7))


def test_a_shard_after_which_nothing_comes_is_asked_for(project):
    result = run(["launch/evaluate.py", "--config", str(project.experiment.path), "--shard"])
    assert result.returncode == 2 and "--shard: expected one argument" in result.stderr


@pytest.mark.parametrize("length", range(8))
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_put_back_in_order(length, count):
    rows = list(range(length))
    shares = [PromptSlice(index, count).of({"set": rows})["set"] for index in range(count)]
    assert interleaved(shares) == rows


def test_the_loss_is_weighted_by_tokens_and_one_part_keeps_its_bits(tmp_path):
    parts = [Measured([], 1.0, 30), Measured([], 4.0, 10), Measured([], float("nan"), 0)]
    assert conclude(parts, tmp_path)["test_loss"] == pytest.approx(1.75)
    for loss, tokens in ((0.1, 3), (1 / 3, 49), (2.7182818, 10_007)):
        assert conclude([Measured([], loss, tokens)], tmp_path)["test_loss"] == loss
