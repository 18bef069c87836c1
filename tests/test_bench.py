"""`sap bench`: the table is of what was measured, and engines that compute different losses are an error."""

import json

import pytest

from pipeline import bench
from pipeline.cli import main


def test_engines_are_measured_and_agree(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert main(["bench", "--layers", "2", "--rounds", "1", "--engines", "single,zero3", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [(row["engine"], row["checkpointing"]) for row in found] == [
        (engine, on) for engine in ("single", "zero3") for on in (True, False)
    ]
    assert all(row["ms"] > 0 and row["loss"] == pytest.approx(found[0]["loss"], rel=1e-5) for row in found)
    assert "| off | zero3 |" in capsys.readouterr().out


def measured(losses: dict[str, float], times: dict[str, list[float]]):
    """A stand-in for the processes: an engine's times, one a round, twice that with checkpointing."""
    rounds = {engine: iter([ms * factor for ms in found for factor in (2, 1)]) for engine, found in times.items()}
    return lambda engine, checkpointing, layers: {
        "engine": engine, "checkpointing": checkpointing, "ms": next(rounds[engine]), "loss": losses[engine],
    }  # fmt: skip


def test_the_table_has_medians_spread_and_ratios(monkeypatch, capsys):
    times = {"single": [10.0, 12.0, 50.0], "fsdp2": [18.0, 17.0, 24.0], "zero3": [24.0, 36.0, 30.0]}
    monkeypatch.setattr(bench, "_measured", measured(dict.fromkeys(times, 4.5), times))
    assert main(["bench", "--layers", "4", "--rounds", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| on | single | 24 | 20 to 100 | 1.00 | 3.00 |" in lines
    assert "| off | fsdp2 | 18 | 17 to 24 | 1.50 | 2.25 |" in lines and "| off | zero3 | 30 | 24 to 36 | 2.50 | 3.75 |" in lines


def test_a_fast_wrong_step_fails(monkeypatch, capsys):
    times = {"single": [10.0], "fsdp2": [1.0], "zero3": [10.0]}
    monkeypatch.setattr(bench, "_measured", measured({"single": 4.5, "fsdp2": 4.6, "zero3": 4.5}, times))
    assert main(["bench", "--rounds", "1"]) == 1
    assert "different losses, 4.500000 to 4.600000: one of them is wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--engines", "zero2"], "--engines names 'zero2': it takes some of single, fsdp2, zero3"), (["--layers", "0"], "--layers is 0: it must be")],
)
def test_what_cannot_be_measured_is_one_sentence(arguments, sentence, capsys):
    assert main(["bench", *arguments]) == 2
    assert sentence in capsys.readouterr().err
