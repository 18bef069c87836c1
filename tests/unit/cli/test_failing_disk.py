"""What a user sees of a disk that fails: commands in their own process, failing at one file operation after another."""

import errno
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import artifacts, cli
from pipeline.running import entry, runner
from pipeline.stages import checks, command_line
from pipeline.stages import evaluate as evaluating
from pipeline.stages import train as training
from pipeline.stages.layout import Layout
from tests.project import make_project, write_recipe

_POINTS = 6  # at which a command meets the error, evenly among all there are
_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}


class Disk:
    """Fails every operation below `folder` from the `at`-th on, as a disk that is gone does.

    Python asks before each (sys.addaudithook): nothing of what is tested is replaced.
    """

    def __init__(self) -> None:
        self.folder, self.number, self.at, self.count = Path("/nowhere"), 0, 0, 0

    def asked(self, event: str, arguments: tuple) -> None:
        if event not in _EVENTS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.fsdecode(arguments[0])
        if not path.startswith(str(self.folder)):
            return
        self.count += 1
        if self.number and self.count > self.at:
            raise OSError(self.number, os.strerror(self.number), path)


DISK = Disk()
sys.addaudithook(DISK.asked)  # for the life of this process: it does nothing but below DISK.folder


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A recipe of one engine and method, prepared and trained."""
    folder = tmp_path_factory.mktemp("project")
    off = {"enabled": False}
    recipe = make_project(folder) | {"align": off, "tracking": off, "methods": {"sft": {}}}
    for field in ("refusals", "refusal_samples", "harmless", "harmless_samples"):
        del recipe["data"][field]
    del recipe["train"]["ds_config"]
    recipe["train"] |= {
        "ranks": 1,
        "engine": "single",
        "steps": 1,
        "warmup_steps": 0,
        "export_merged": True,
    }
    path = write_recipe(folder, recipe)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("SAP_CACHE", str(folder / "cache"))
        assert cli.main(["prepare", str(path)]) == 0 == train(path, lr=1e-2)
    return path


def train(path: Path, lr: float = 1e-3) -> int:
    """launch/train.py, in this process."""

    def work() -> None:
        experiment = command_line.open_recipe(str(path), {"train": {"lr": lr}})
        cell = command_line.choose_cell(experiment, None, None)
        checks.check(experiment, cell)
        training.train(experiment, cell)

    return entry.guarded(work)


def evaluate(path: Path) -> int:
    """launch/evaluate.py, in this process."""

    def work() -> None:
        experiment = command_line.open_recipe(str(path), {})
        evaluating.evaluate(
            experiment, Layout(experiment).subject(command_line.choose_cell(experiment, None, None))
        )

    return entry.guarded(work)


COMMANDS: dict[str, Callable[[Path], int]] = {
    "train": train,
    "evaluate": evaluate,
    "template": lambda path: cli.main(["template", str(path.parent / "model")]),
    "plan": lambda path: cli.main(["plan", str(path)]),
    "dry run": lambda path: cli.main(["run", str(path), "--dry-run"]),
    "prepare": lambda path: cli.main(["prepare", str(path), "--data.test_samples", "7"]),
    "status": lambda path: cli.main(["status", str(path)]),
}
PASSES = (runner.SYSTEM_ERROR,)
# A file without a right to read it is bad input where nothing has been read.
INPUT = (runner.SYSTEM_ERROR, entry.BAD_INPUT)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("command", "number", "codes"),
    [
        *((command, errno.EIO, PASSES) for command in COMMANDS if command != "status"),
        ("template", errno.ESTALE, PASSES),
        ("template", errno.EMFILE, PASSES),
        ("status", errno.EACCES, (entry.BAD_INPUT,)),
        ("plan", errno.EACCES, (entry.BAD_INPUT,)),
        ("prepare", errno.EACCES, INPUT),
        ("train", errno.ENOENT, INPUT),
    ],
)
def test_a_disk_that_fails_is_one_sentence_wherever_it_is_met(
    project, monkeypatch, capfd, command, number, codes
):
    monkeypatch.setenv("SAP_CACHE", str(project.parent / "cache"))
    monkeypatch.setattr(DISK, "folder", project.parent)
    runs = project.parent / "runs" / "tiny"
    before = set(runs.iterdir())

    def clean() -> None:
        for path in set(runs.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    # the second time says how many there are: the first fills caches of this process
    for _ in range(2):
        clean()
        monkeypatch.setattr(DISK, "count", 0)
        COMMANDS[command](project)
    for at in range(0, DISK.count, max(1, DISK.count // _POINTS)):
        clean()
        capfd.readouterr()
        with monkeypatch.context() as failing:
            for name, value in (("number", number), ("at", at), ("count", 0)):
                failing.setattr(DISK, name, value)
            code = COMMANDS[command](project)
        said = capfd.readouterr().err
        last = said.rstrip().rpartition("\n")[2]
        if code == 0 and any(map(artifacts.complete, set(runs.iterdir()) - before)):
            continue  # all that was left to do was to tidy up
        assert code in codes and last.startswith("error: ") and "Traceback" not in said, (
            f"at {at}: exit {code}, {said}"
        )
        assert str(project.parent) in last
        if code == runner.SYSTEM_ERROR:
            assert f"{os.strerror(number)}: " in last and last.endswith(
                "finished stages and checkpoints are kept"
            )
    clean()
