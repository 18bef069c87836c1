"""What tests/tools/faults calls a loss, on stand-ins for chains: a harness that cannot fail would prove nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from pipeline import artifacts
from tests.tools.faults import chain as chains
from tests.tools.faults.__main__ import table
from tests.tools.faults.chain import Chain, Ended
from tests.tools.faults.kinds import FAULTS, Trial
from tests.tools.faults.trial import Verdict, settled

WRITES = """
import pathlib, sys
from pipeline import artifacts
folder = pathlib.Path(sys.argv[1]) / "tiny" / "train-sft-s0-0123456789"
if not artifacts.complete(folder):
    with artifacts.building(folder, {}) as target:
        (target / "adapter.bin").write_text(sys.argv[2] if len(sys.argv) > 2 else "weights")
"""


class StandIn(Chain):
    """A chain whose command is a few lines of Python."""

    def __init__(self, folder: Path, code: str, *arguments: str):
        self.folder, self.engine, self.environment, self.code, self.arguments = (
            folder,
            "single",
            {},
            code,
            arguments,
        )

    def command(self, output: Path) -> list[str]:
        return [sys.executable, "-c", self.code, str(output), *self.arguments]


def verdict(
    folder: Path, code: str, *arguments: str, first: Ended | None = None
) -> tuple[str, str]:
    output = folder / "trial"
    (output / "tiny").mkdir(parents=True)
    ended = subprocess.Popen(["true"], start_new_session=True)
    ended.wait()
    trial = Trial(StandIn(folder, code, *arguments), output, Random(0), ended)
    expected = {"tiny/train-sft-s0-0123456789/adapter.bin": artifacts.digest("x")}
    (folder / "weights").write_text("weights")
    expected = dict.fromkeys(expected, artifacts.file_digest(folder / "weights"))
    return settled(trial.chain, trial, first or Ended(0, ""), expected)[:2]


def test_the_same_artefacts_are_identical_however_often_the_command_has_to_run(tmp_path):
    fails_once = (
        "import os, sys\nif not os.path.exists(sys.argv[1] + '/once'):\n    open(sys.argv[1] + "
        f"'/once', 'w'); sys.exit(75)\n{WRITES}"
    )
    assert verdict(tmp_path, fails_once) == ("identical", "")


def test_other_artefacts_are_a_loss(tmp_path):
    result, reason = verdict(tmp_path, WRITES, "other weights")
    assert (
        result == "lost"
        and "1 files differ, tiny/train-sft-s0-0123456789/adapter.bin first" in reason
    )


def test_a_refusal_that_names_the_file_is_followed_and_the_command_run_again(tmp_path):
    refuses = (
        "import os, sys\nfolder = sys.argv[1] + '/tiny/prepare-1'\n"
        "if not os.path.exists(sys.argv[1] + '/once'):\n    os.mkdir(folder); open(sys.argv[1] + '/once', 'w')\n"
        f"if os.path.exists(folder):\n    print(f'error: {{folder}}/data.txt does not match', "
        f"file=sys.stderr); sys.exit(2)\n{WRITES}"
    )
    assert verdict(tmp_path, refuses) == ("refused", "tiny/prepare-1/data.txt")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "import sys; print('error: something is wrong', file=sys.stderr); sys.exit(2)",
            "no file is named: error: something is wrong",
        ),
        ("raise KeyError('files')", "a traceback: KeyError: 'files'"),
        ("import sys; sys.exit(74)", "not done after 6 runs"),
        (
            "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])",
            "1 processes were left behind",
        ),
        ("import time; time.sleep(1000)", "the command hangs when it is run again"),
    ],
)
def test_what_ends_in_no_good_way_is_a_loss(tmp_path, monkeypatch, code, reason):
    monkeypatch.setattr(chains, "PATIENCE", 3.0)
    monkeypatch.setattr(
        "tests.tools.faults.trial.left_behind", lambda group: chains.left_behind(group, 1.0)
    )
    result, found = verdict(tmp_path, code)
    assert result == "lost" and reason in found


def test_a_disturbed_command_that_hangs_is_a_loss(tmp_path):
    assert verdict(tmp_path, WRITES, first=Ended(None, "")) == (
        "lost",
        "the disturbed command hangs",
    )


def test_the_table_counts_every_verdict():
    kinds = list(FAULTS)
    verdicts = [
        Verdict("single", kinds[number % 2], number, "", result, "", 1)
        for number, result in enumerate(["identical", "refused", "lost", "identical"])
    ]
    lines = table(verdicts).splitlines()
    assert lines[2:5] == [
        f"| {kinds[0]} | 2 | 1 | 0 | 1 |",
        f"| {kinds[1]} | 2 | 1 | 1 | 0 |",
        "| all | 4 | 2 | 1 | 1 |",
    ]
