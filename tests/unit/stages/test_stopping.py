"""`sap run` that is asked to stop, or whose disk fills up: what it begins after that, and how it ends.

Launch scripts and stages are stand-ins.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from pipeline import artifacts, cli, shipped
from pipeline.defences import recipes
from pipeline.recipe import recipe
from pipeline.running import runner, warm
from pipeline.stages.chain import Chain
from pipeline.stages.layout import Layout
from tests.project import write_recipe

# A cell called bad fails, full meets a full disk; the others train until they are done or save when asked.
TRAIN = """
import json, pathlib, signal, sys, time
root, method = pathlib.Path({root!r}), sys.argv[sys.argv.index("--method") + 1]
(root / f"began-{{method}}").touch()
code = {{"bad": 2, "full": 74}}.get(method)
if code is not None:
    sys.exit(code)

def save(*_):
    (root / f"saved-{{method}}").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, save)
(root / f"up-{{method}}").touch()
if method.startswith("slow"):
    time.sleep(1000)
folder = pathlib.Path(json.loads((root / "folders.json").read_text())[method])
folder.mkdir(parents=True)
(folder / "DONE").touch()
"""
EVALUATE = """
import pathlib, sys, time
root, method = pathlib.Path({root!r}), sys.argv[sys.argv.index("--method") + 1]
(root / f"evaluated-{{method}}").touch()
time.sleep(1000 if method == "slow" else 0)
"""


def publish(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / artifacts.MARKER).touch()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Returns a function: write a recipe of these methods, prepared unless `prepare` is given,
    which is then run as that stage.
    """
    (tmp_path / "launch").mkdir()
    for name, text in (("train", TRAIN), ("evaluate", EVALUATE)):
        (tmp_path / "launch" / f"{name}.py").write_text(text.format(root=str(tmp_path)))
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.setattr(Chain, "needed", lambda chain: [])
    monkeypatch.setattr(cli, "_check", lambda *_, **__: (None, None))
    monkeypatch.setattr(runner, "_one_gpu", lambda slot: {})

    def make(*methods: str, ranks: int = 1, prepare=None) -> Path:
        source = {"source": str(tmp_path / "data.jsonl")}
        path = write_recipe(tmp_path, {
            "name": "tiny", "output_dir": str(tmp_path / "runs"),
            "model": {"path": str(tmp_path / "launch"), "dtype": "float32"}, "data": {"task": source, "safety": source},
            "train": {"steps": 2, "ranks": ranks}, "evaluate": {"harmful": source, "baselines": False},
            "methods": {name: {} for name in methods}, "tracking": {"enabled": False},
        })  # fmt: skip
        layout = Layout(recipes.load(path))
        artifacts.write_json(
            tmp_path / "folders.json",
            {cell.method: str(layout.train(cell)) for cell in layout.experiment.cells()},
        )
        stand_in = ModuleType("pipeline.stages.prepare")
        stand_in.prepare = prepare
        monkeypatch.setitem(sys.modules, "pipeline.stages.prepare", stand_in)
        if prepare is None:
            publish(layout.prepare())
            publish(layout.prompts())
        return path

    return make


def signal_when(*paths: Path, number: int = signal.SIGTERM) -> threading.Thread:
    def wait() -> None:
        deadline = time.monotonic() + 100  # a test that fails must not hang
        while not all(path.exists() for path in paths) and time.monotonic() < deadline:
            time.sleep(0.02)
        if time.monotonic() < deadline:
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def names(folder: Path, prefix: str) -> list[str]:
    return sorted(path.name.removeprefix(f"{prefix}-") for path in folder.glob(f"{prefix}-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_stop_after_another_cell_failed_saves_evaluates_nothing_and_exits_75(
    project, tmp_path, capfd, number
):
    path = project("good", "bad", "slow", "slower", "slowest")
    thread = signal_when(tmp_path / "up-slow", tmp_path / "up-slower", number=number)
    assert cli.main(["run", str(path), "--jobs", "2"]) == runner.STOPPED
    thread.join()
    assert (
        names(tmp_path, "saved") == ["slow", "slower"]
        and "slowest" not in names(tmp_path, "began")
        and not names(tmp_path, "evaluated")
    )
    said = capfd.readouterr().err
    assert (
        "stopped in train" in said
        and "run the same command again to go on" in said
        and "Traceback" not in said
        and "not trained" not in said
    )


def test_a_stop_one_cell_at_a_time_does_the_same(project, tmp_path):
    thread = signal_when(tmp_path / "up-slow")
    assert (
        cli.main(["run", str(project("good", "bad", "slow", "slower", ranks=2))]) == runner.STOPPED
    )
    thread.join()
    assert (
        names(tmp_path, "saved") == ["slow"]
        and "slower" not in names(tmp_path, "began")
        and not names(tmp_path, "evaluated")
    )


def test_a_stop_during_the_evaluation_of_what_trained_is_75_too(project, tmp_path, capfd):
    path = project("bad", "slow")
    publish(Path(Layout(recipes.load(path)).train(recipes.load(path).cell("slow", 0))))
    thread = signal_when(tmp_path / "evaluated-slow")
    assert cli.main(["run", str(path), "--jobs", "2"]) == runner.STOPPED
    thread.join()
    assert (
        names(tmp_path, "evaluated") == ["slow"] and "stopped in evaluate" in capfd.readouterr().err
    )


def test_without_a_stop_the_failure_is_told_and_what_trained_is_evaluated(project, tmp_path, capfd):
    assert cli.main(["run", str(project("good", "bad")), "--jobs", "2"]) == 2
    assert (
        names(tmp_path, "evaluated") == ["good"]
        and "not trained: train-bad" in capfd.readouterr().err
    )


@pytest.mark.parametrize("arguments", [[], ["--jobs", "2"]])
def test_after_a_full_disk_nothing_is_begun(project, tmp_path, arguments):
    path = project("good", "full", "other", "another", "last")
    assert cli.main(["run", str(path), *arguments]) == runner.SYSTEM_ERROR
    assert "last" not in names(tmp_path, "began") and not names(tmp_path, "evaluated")


def after_the_devices(capfd: pytest.CaptureFixture) -> str:
    """What stands on stderr after the line that says where ranks will run."""
    line, _, rest = capfd.readouterr().err.partition("\n")
    assert "on the CPU" in line
    return rest


@pytest.mark.parametrize(("jobs", "threads"), [("1", "6"), ("2", "3")])
def test_imports_run_while_the_command_prepares_in_the_process_that_jobs_are_forked_from(
    project, monkeypatch, jobs, threads
):
    """One that imports for another number of threads would be waited for again."""
    begun = []

    class Parent(warm._Parent):
        def __init__(self, preload, environment):
            begun.append(environment["OMP_NUM_THREADS"])
            super().__init__(preload, environment)

    def prepare(experiment: recipe.Experiment) -> None:
        begun.append("prepare")
        publish(Layout(experiment).prepare())
        publish(Layout(experiment).prompts())

    monkeypatch.setattr(warm, "_Parent", Parent)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cli.main(["run", str(project("good", "other", prepare=prepare)), "--jobs", jobs])
    assert begun == [threads, "prepare"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_the_command_itself_prepares_leaves_nothing_half_written(
    project, tmp_path, capfd, number
):
    def prepare(experiment: recipe.Experiment) -> None:
        with artifacts.building(Layout(experiment).prepare(), {}) as folder:
            (folder / "half.parquet").touch()
            os.kill(os.getpid(), number)
            time.sleep(1000)

    assert cli.main(["run", str(project("good", prepare=prepare))]) == runner.STOPPED
    assert (
        after_the_devices(capfd)
        == f"stopped on request ({signal.Signals(number).name}): run the same command again to go on\n"
    )
    assert not list((tmp_path / "runs" / "tiny").iterdir()) and not names(tmp_path, "began")


def test_a_disk_that_fills_up_while_the_command_prepares_is_one_sentence_with_the_folder(
    project, tmp_path, capfd
):
    def prepare(experiment: recipe.Experiment) -> None:
        with artifacts.building(Layout(experiment).prepare(), {}):
            # as pyarrow says it
            raise OSError(
                28,
                "[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device",
            )

    path = project("good", prepare=prepare)
    assert cli.main(["run", str(path)]) == runner.SYSTEM_ERROR
    said = after_the_devices(capfd)
    assert (
        said.startswith(
            f"error: {Layout(recipes.load(path)).prepare()}: No space left on device: free space there"
        )
        and said.count("\n") == 1
    )
