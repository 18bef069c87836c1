"""`sap bench`: the table is of what was measured, and systems that compute different losses are an error."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.bench import command as bench
from pipeline.bench.cases import SHAPES, Case, forward_flops, plain_step_flops
from pipeline.bench.processes import Processes
from pipeline.cli import main
from tests.project import ROOT


def test_systems_are_measured_and_agree(tmp_path, capsys):
    file = tmp_path / "bench.json"
    given = [
        "--shape",
        "tiny",
        "--rounds",
        "1",
        "--steps",
        "2",
        "--systems",
        "trainer,zero3",
        "--lengths",
        "real",
        "--json",
        str(file),
    ]
    assert main(["bench", *given]) == 0
    found = json.loads(file.read_text())["rows"]
    assert [(row["system"], row["checkpointing"]) for row in found] == [
        (name, on) for on in (True, False) for name in ("trainer", "zero3")
    ]
    assert all(
        row["ms"] > 0
        and len(row["times"]) == 2
        and row["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
        for row in found
    )
    assert "| off | zero3 | plain |" in capsys.readouterr().out


def test_ranks_share_a_step_and_lose_as_one(tmp_path, capsys):
    """Two ranks, layers kept and not, samples packed and not: the same losses."""
    found = []
    for more in (["--keep-gathered"], ["--tokens", "40", "--packing"]):
        file = tmp_path / "bench.json"
        given = (
            "--shape tiny --rounds 1 --steps 2 --systems fsdp2,zero3 --ranks 2 --checkpointing off"
        )
        arguments = [
            *given.split(),
            "--length",
            "20",
            "--lengths",
            "real",
            *more,
            "--json",
            str(file),
        ]
        assert main(["bench", *arguments]) == 0, capsys.readouterr().err
        found += json.loads(file.read_text())["rows"]
    assert [row["keep_gathered"] for row in found] == [True, True, False, False]
    assert all(row["loss"] == pytest.approx(found[0]["loss"], rel=1e-5) for row in found)
    assert all(len(row["times"]) == 2 and row["ranks"] == 2 for row in found)


def rows(times: dict[str, list[float]], losses: dict[str, float] | None = None, **more):
    """What processes would have answered: a system's times, one a round."""
    return [
        {
            "system": system, "method": "plain", "checkpointing": False, "lengths": "fixed", "ms": ms,
            "tokens_per_s": 1e6 / ms, "flops": 4e9, "peak_gib": None, "before_s": 1.0, "device": "cpu",
            "loss": (losses or {}).get(system, 4.5), "profile": None, **more,
        }
        for system, found in times.items() for ms in found
    ]  # fmt: skip


def test_the_table_has_medians_spread_and_ratios():
    lines = bench.table(
        rows({"trainer": [10.0, 12.0, 50.0], "zero3": [24.0, 36.0, 30.0]}), rate=1e12
    ).splitlines()
    assert lines[0] == "on cpu; a large matrix product runs at 1 TFLOP/s"
    assert "| off | trainer | plain | 12 | 10 to 50 | 1.00 | 83333 | 0.33 |  | 1.0 |" in lines
    assert "| off | zero3 | plain | 30 | 24 to 36 | 2.50 | 33333 | 0.13 |  | 1.0 |" in lines


def test_a_fast_wrong_step_fails(monkeypatch, capsys):
    answers = iter(rows({"single": [10.0], "fsdp2": [1.0], "zero3": [10.0]}, {"fsdp2": 4.6}))
    monkeypatch.setattr(
        Processes, "call", lambda self, function, *given: next(answers) if given else 1e12
    )
    assert main(["bench", "--rounds", "1", "--checkpointing", "off"]) == 1
    sentence = (
        "single plain, checkpointing off ends with loss 4.500000, fsdp2 plain, checkpointing off "
        "with 4.600000: one of them is wrong"
    )
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("loss", [float("nan"), 4.6])
def test_losses_of_different_methods_are_not_compared(loss):
    plain, sap = rows({"single": [1.0]}), rows({"single": [1.0]}, {"single": loss}, method="sap")
    assert bench.unlike([*plain, *sap]) is None or loss != loss
    wrong = rows({"zero3": [1.0]}, {"zero3": loss})
    assert bench.unlike([*plain, *wrong]) and bench.unlike(
        [*plain, *wrong, *rows({"zero3": [1.0]})]
    ), "in whatever round"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--systems", "zero2"],
            "--systems names 'zero2': it takes some of single, fsdp2, zero3, trainer, trl",
        ),
        (["--methods", "dpo"], "--methods names 'dpo': it takes some of plain, sap"),
        (["--shape", "9b"], "--shape names '9b': it takes one of host, tiny"),
        (["--shape", "host,tiny"], "--shape names 'host,tiny': it takes one of host, tiny"),
        (
            ["--systems", "trainer", "--methods", "sap"],
            "--systems trainer and --methods sap go together in no case: methods other than plain need",
        ),
        (
            ["--json", "/nowhere/bench.json"],
            "--json /nowhere/bench.json is in no folder that exists: make it first",
        ),
        (["--layers", "0"], "--layers is 0: it must be at least 1"),
        (["--length", "0"], "--length is 0: it must be at least 1"),
        (["--ranks", "2"], "--ranks 2 goes with systems that shard, fsdp2 and zero3, and not with"),
        (
            ["--systems", "single", "--keep-gathered"],
            "--keep-gathered is for fsdp2 and zero3: name one with --systems",
        ),
        (["--packing"], "--packing needs --tokens, the budget of a packed row"),
        (["--tokens", "15"], "--tokens is 15, less than a row of 16: raise it, or lower --length"),
        (
            ["--systems", "trl"],
            "--systems names trl, which is not installed: pip install trl, or leave it out",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments, sentence, capsys):
    assert main(["bench", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_the_arithmetic_is_that_of_the_weights():
    """An 8B model: 8.03e9 weights, of which the embedding multiplies nothing;
    a plain LoRA step is forward, backward and a recomputation.
    """
    shape = SHAPES["8b"]
    tokens = 8 * 512
    multiplied = (
        forward_flops(shape, tokens, tokens)
        - 2 * tokens * shape.length * shape.hidden_size * shape.num_hidden_layers
    )
    assert multiplied / (2 * tokens) == pytest.approx(
        8.03e9 - shape.vocab_size * shape.hidden_size, rel=1e-3
    )
    on, off = (
        plain_step_flops(Case("single", shape="8b", checkpointing=which)) for which in (True, False)
    )
    assert on / off == pytest.approx(1.5)


def test_rows_are_the_same_for_all_systems_and_never_begin_with_padding():
    real = Case("single", shape="135m", lengths="real").rows()
    assert real == Case("trainer", shape="135m", lengths="real").rows()
    lengths = [len(row["input_ids"]) for row in real]
    assert min(lengths) < max(lengths) <= 128 and all(min(row["input_ids"]) > 2 for row in real)


def ended(code: int) -> None:
    os._exit(code)


def slept(seconds: float) -> None:
    time.sleep(seconds)


def failed(why: str) -> None:
    raise ValueError(why)


def environment(name: str) -> str | None:
    return os.environ.get(name)


def wait_as_parent(file: str) -> None:
    with Processes() as processes:
        processes.call("tests.unit.bench.test_bench:write_and_wait", file)


def write_and_wait(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(1000)


def test_a_measurement_goes_with_the_program_that_asked_for_it(tmp_path):
    file = tmp_path / "pid"
    program = (
        f"from tests.unit.bench.test_bench import wait_as_parent; wait_as_parent({str(file)!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    within(600, lambda: file.is_file() and file.read_text())
    parent.kill()
    parent.wait(600)
    within(600, lambda: not Path(f"/proc/{file.read_text()}").exists())


def within(seconds: float, true: Callable[[], object]) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.1)


def test_a_process_that_gives_no_answer_is_an_error():
    with Processes() as processes:
        assert (
            processes.call(
                "tests.unit.bench.test_bench:environment", "GIVEN", environment={"GIVEN": "this"}
            )
            == "this"
        )
        assert processes.call("tests.unit.bench.test_bench:environment", "GIVEN") is None, (
            "a process of its own each time"
        )
        cases = (
            ("ended", 3, "its process ended"), ("slept", 600.0, "gave no answer within 1 s"),
            ("failed", "why", "failed: ValueError: why"),
        )  # fmt: skip
        for function, given, reason in cases:
            with pytest.raises(RuntimeError, match=f"{function}.* {reason}"):
                processes.call(
                    f"tests.unit.bench.test_bench:{function}",
                    given,
                    seconds=1 if function == "slept" else 600,
                )


@pytest.mark.parametrize(
    ("function", "given", "seconds", "separate", "reason"),
    [
        ("slept", 600.0, 1, False, "gave no answer within 1 s"),
        ("ended", 3, 600, True, "its process ended"),
    ],
)
def test_only_what_a_fork_may_have_broken_is_tried_again(
    function, given, seconds, separate, reason
):
    with Processes() as processes:
        with pytest.raises(RuntimeError, match=f"{function}.* {reason}"):
            processes.call(f"tests.unit.bench.test_bench:{function}", given, seconds=seconds)
        assert processes._separate is separate


def read(path: str) -> str:
    return Path(path).read_text()


@pytest.mark.processes
def test_an_error_of_the_system_in_a_process_is_the_command_s(capfd):
    with Processes() as processes, pytest.raises(FileNotFoundError) as met:
        processes.call("tests.unit.bench.test_bench:read", "/nowhere/at/all")
    assert met.value.filename == "/nowhere/at/all" and "Traceback" not in capfd.readouterr().err
