"""What ranks tell the batch script, and what they take from it."""

import contextlib

import pytest

from pipeline import artifacts
from pipeline.running import entry, runner
from pipeline.running.batch_job import circumstances


def fails(error: Exception):
    def main() -> None:
        raise error

    return main


def test_a_final_error_is_left_where_the_batch_script_looks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAP_ERROR_FILE", str(tmp_path / "error"))
    assert entry.guarded(fails(ValueError("train.lr is wrong"))) == entry.BAD_INPUT
    assert (
        tmp_path / "error"
    ).read_text() == "train.lr is wrong\n" and "train.lr is wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        artifacts.Busy("another process is writing"),
        RuntimeError("a broken node"),
        OSError(28, "No space left on device", "/runs"),
        runner.Stopped("SIGTERM"),
    ],
)
def test_what_may_pass_is_not_final(tmp_path, monkeypatch, error):
    monkeypatch.setenv("SAP_ERROR_FILE", str(tmp_path / "error"))
    with contextlib.suppress(RuntimeError):
        entry.guarded(fails(error))
    assert not (tmp_path / "error").exists()


def test_an_error_of_the_system_is_left_apart_and_a_full_disk_there_hides_nothing(
    tmp_path, monkeypatch, capsys
):
    for name in ("fault", "gone/fault"):
        monkeypatch.setenv("SAP_FAULT_FILE", str(tmp_path / name))
        assert (
            entry.guarded(fails(OSError(28, "No space left on device", "/runs")))
            == runner.SYSTEM_ERROR
        )
        assert capsys.readouterr().err.startswith(
            "error: /runs: No space left on device: free space there"
        )
    assert (tmp_path / "fault").read_text().startswith("/runs: No space left on device")


def test_without_a_batch_script_nothing_is_written(monkeypatch):
    monkeypatch.delenv("SAP_ERROR_FILE", raising=False)
    assert entry.guarded(fails(ValueError("x"))) == entry.BAD_INPUT


def test_circumstances(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SAP_RESTART_REASON"):
        monkeypatch.delenv(name, raising=False)
    assert circumstances() == ""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert circumstances() == ", Slurm job 12"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SAP_RESTART_REASON", "time limit or preemption")
    assert circumstances() == ", Slurm job 12, restart 2: time limit or preemption"
