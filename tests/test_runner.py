"""Local processes: who they are told to be, what becomes of a failure, and that a request to stop ends the chain in order."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

import pipeline
from pipeline import runner, shipped


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Write launch/job.py and return the folder it may write into."""
    (tmp_path / "launch").mkdir()
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)

    def write(body: str) -> Path:
        (tmp_path / "launch" / "job.py").write_text(f"import json, os, pathlib, signal, sys, time\nout = pathlib.Path({str(tmp_path)!r})\n{body}")
        return tmp_path

    return write


def signal_when(path: Path) -> threading.Thread:
    """Send this process SIGTERM as soon as the file is there."""

    def wait() -> None:
        while not path.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_ranks_are_distinct_and_share_an_address_and_the_cores(launch, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    out = launch("(out / os.environ['RANK']).write_text(json.dumps(dict(os.environ)))")
    assert runner.run_ranks("job.py", [], 2) == 0
    first, second = (json.loads((out / rank).read_text()) for rank in "01")
    assert (first["RANK"], second["RANK"]) == ("0", "1") == (first["LOCAL_RANK"], second["LOCAL_RANK"])
    assert first["MASTER_PORT"] == second["MASTER_PORT"] and first["WORLD_SIZE"] == "2"
    assert int(first["OMP_NUM_THREADS"]) == runner.threads_per_process(2)


def test_a_rank_imports_the_package_that_started_it(launch, tmp_path, monkeypatch):
    """A checkout that is run in place need not be what the environment has installed."""
    (tmp_path / "other" / "pipeline").mkdir(parents=True)
    (tmp_path / "other" / "pipeline" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    out = launch("import pipeline\n(out / 'imported').write_text(pipeline.__file__ + '\\n' + os.environ['PYTHONPATH'])")
    assert runner.run_ranks("job.py", [], 1) == 0
    imported, path = (out / "imported").read_text().splitlines()
    assert imported == pipeline.__file__ and path.endswith(f":{tmp_path}/other")


def test_the_allocator_is_told_to_keep_memory_and_the_user_has_the_last_word(launch, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    monkeypatch.setattr(runner, "_GPU_DEVICES", ())
    out = launch("(out / 'environment').write_text(json.dumps(dict(os.environ)))")
    assert runner.run_ranks("job.py", [], 1) == 0
    seen = json.loads((out / "environment").read_text())
    assert seen["MALLOC_ARENA_MAX"] == "3" and seen["MALLOC_MMAP_MAX_"] == "0"


def test_a_failed_rank_ends_the_others_and_gives_its_code(launch, monkeypatch):
    monkeypatch.setattr(runner, "_GRACE", 0.5)
    launch("sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)")
    started = time.monotonic()
    assert runner.run_ranks("job.py", [], 2) == 7
    assert time.monotonic() - started < 30, "the hanging rank was not waited for"


@pytest.mark.parametrize("handler", ["lambda *_: sys.exit(0)", "signal.SIG_DFL"])
def test_a_request_to_stop_is_passed_on_and_remembered(launch, handler):
    """Also where the processes then end with 0, because the work was done, or have no handler yet."""
    out = launch(f"signal.signal(signal.SIGTERM, {handler})\n(out / 'up').touch()\ntime.sleep(60)")
    thread = signal_when(out / "up")
    assert runner.run_ranks("job.py", [], 1) == runner.STOPPED
    thread.join()


def test_jobs_side_by_side_all_run_and_no_more_at_once_than_slots(launch):
    out = launch(
        "name = sys.argv[1]\n(out / f'{name}.on').touch()\ntime.sleep(0.3)\n"
        "(out / f'{name}.saw').write_text(str(len(list(out.glob('*.on')))))\n(out / f'{name}.on').unlink()"
    )
    assert runner.run_side_by_side("job.py", [[str(i)] for i in range(5)], slots=2) == 0
    seen = [int((out / f"{i}.saw").read_text()) for i in range(5)]
    assert max(seen) <= 2


def test_a_failure_leaves_the_other_jobs_alone_and_is_told_in_the_end(launch):
    out = launch("(out / sys.argv[1]).touch()\nsys.exit({'first': 3, 'second': 4}.get(sys.argv[1], 0))")
    assert runner.run_side_by_side("job.py", [["first"], ["second"], ["third"]], slots=1) == 3
    assert all((out / name).exists() for name in ("first", "second", "third"))


def test_after_a_stop_nothing_new_is_started(launch):
    out = launch("(out / sys.argv[1]).touch()\ntime.sleep(60)")
    thread = signal_when(out / "third")
    assert runner.run_side_by_side("job.py", [["third"], ["fourth"]], slots=1) == runner.STOPPED
    thread.join()
    assert not (out / "fourth").exists()
