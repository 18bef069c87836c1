"""`make gpu` with tiny shapes: what runs on a GPU machine runs here, and a part that fails is seen."""

import json

import pytest

from tests.gpu import check

pytestmark = pytest.mark.slow


def test_every_part_but_the_chain_runs_on_a_cpu(tmp_path, capsys):
    file = tmp_path / "found.json"
    assert (
        check.main(["--tiny", "--parts", "parity,bench,memory,loading", "--json", str(file)]) == 0
    )
    found = {part["name"]: part for part in json.loads(file.read_text())["parts"]}
    assert [(row["engine"], row["quantization"]) for row in found["parity"]["rows"]] == [
        (engine, kind) for kind in ("none", "nf4") for engine in ("single", "zero3", "fsdp2")
    ]
    assert all(
        row["moved"] and row["restored"] and row["untouched"] for row in found["parity"]["rows"]
    )
    assert {row["system"] for row in found["bench"]["rows"]} == {
        "trainer",
        "single",
        "fsdp2",
        "zero3",
    }
    assert len(found["memory"]["rows"]) == 6 and len(found["loading"]["rows"]) == 4
    assert "| parity |" in capsys.readouterr().out


def test_a_part_that_fails_is_reported_and_the_others_run(tmp_path, capsys, monkeypatch):
    def broken(part, setting):
        part.lines.append("half of it")
        raise RuntimeError("the card fell out")

    monkeypatch.setitem(check.PARTS, "bench", broken)
    monkeypatch.setitem(check.PARTS, "loading", lambda part, setting: part.lines.append("fine"))
    assert (
        check.main(
            ["--tiny", "--parts", "bench,memory,loading", "--json", str(tmp_path / "found.json")]
        )
        == 1
    )
    printed = capsys.readouterr().out
    assert "half of it\nFAILED: RuntimeError: the card fell out" in printed
    assert "FAILED: there is no bench to hold the plan against: run the part bench too" in printed
    assert "| bench | 0 | FAILED |" in printed and "| loading | 0 | ok |" in printed


def test_an_unknown_part_and_a_machine_without_a_gpu_are_one_sentence(capsys):
    assert check.main(["--tiny", "--parts", "speed"]) == 2
    assert "--parts names 'speed': it takes some of parity, bench" in capsys.readouterr().err
    assert check.main(["--tiny", "--json", "/nowhere/found.json"]) == 2
    assert "--json /nowhere/found.json is in no folder that exists" in capsys.readouterr().err
    assert check.main([]) == 2
    assert "there is no GPU here: give --tiny" in capsys.readouterr().err


def test_a_run_that_takes_too_long_or_fails_is_a_problem(tmp_path):
    setting, part = check.Setting(True, tmp_path, None), check.Part("slow")
    setting.run(part, 0.5, "-c", "import time; time.sleep(1000)")
    setting.run(part, 30, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)")
    setting.run(part, 30, "-c", "import os; os.kill(os.getpid(), 11)")
    assert "ended with -11" in part.problems[2], "a signal is no success"
    assert "took longer than 0.5 s" in part.problems[0] and "ended with 3:\nwhy" in part.problems[1]
