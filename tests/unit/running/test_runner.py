"""Local processes: who they are told to be, what becomes of a failure,
and that a request to stop ends the chain in order.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

import pipeline
from pipeline import shipped
from pipeline.running import devices, runner
from pipeline.running.warm import WarmParents


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Write launch/job.py and return the folder it may write into."""
    (tmp_path / "launch").mkdir()
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)

    def write(body: str) -> Path:
        (tmp_path / "launch" / "job.py").write_text(
            f"import json, os, pathlib, signal, sys, time\nout = pathlib.Path({str(tmp_path)!r})\n{body}"
        )
        return tmp_path

    return write


@pytest.fixture(params=["warm", "separate"])
def warm(request):
    """What processes are forked from, with nothing imported; None where each is a Python of its own."""
    if request.param == "separate":
        yield None
        return
    with WarmParents([]) as parents:
        yield parents
    assert parents.problem is None, "processes were started another way"


def signal_when(path: Path) -> threading.Thread:
    """Send this process SIGTERM as soon as the file is there."""

    def wait() -> None:
        while not path.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_ranks_are_distinct_and_share_an_address_and_the_cores(launch, warm, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    out = launch("(out / os.environ['RANK']).write_text(json.dumps(dict(os.environ)))")
    assert runner.run_ranks("job.py", [], 2, warm) == 0
    first, second = (json.loads((out / rank).read_text()) for rank in "01")
    assert (
        (first["RANK"], second["RANK"]) == ("0", "1") == (first["LOCAL_RANK"], second["LOCAL_RANK"])
    )
    assert first["MASTER_PORT"] == second["MASTER_PORT"] and first["WORLD_SIZE"] == "2"
    assert int(first["OMP_NUM_THREADS"]) == runner.threads_per_process(2)


def test_a_rank_imports_the_package_that_started_it(launch, warm, tmp_path, monkeypatch):
    """A checkout that is run in place need not be what the environment has installed."""
    (tmp_path / "other" / "pipeline").mkdir(parents=True)
    (tmp_path / "other" / "pipeline" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    out = launch(
        "import pipeline\n(out / 'imported').write_text(pipeline.__file__ + '\\n' + os.environ['PYTHONPATH'])"
    )
    assert runner.run_ranks("job.py", [], 1, warm) == 0
    imported, path = (out / "imported").read_text().splitlines()
    assert imported == pipeline.__file__ and path.endswith(f":{tmp_path}/other")


def test_the_allocator_is_told_to_keep_memory_and_the_user_has_the_last_word(
    launch, warm, monkeypatch
):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    monkeypatch.setattr(devices, "gpus", lambda: ())
    out = launch("(out / 'environment').write_text(json.dumps(dict(os.environ)))")
    assert runner.run_ranks("job.py", [], 1, warm) == 0
    seen = json.loads((out / "environment").read_text())
    assert seen["MALLOC_ARENA_MAX"] == "3" and seen["MALLOC_MMAP_MAX_"] == "0"


def test_a_failed_rank_ends_the_others_and_gives_its_code(launch, warm, monkeypatch):
    monkeypatch.setattr(runner, "_GRACE", 0.5)
    launch("sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(1000)")
    assert runner.run_ranks("job.py", [], 2, warm) == 7  # nobody waits for the rank that hangs


@pytest.mark.parametrize("handler", ["lambda *_: sys.exit(0)", "signal.SIG_DFL"])
def test_a_request_to_stop_is_passed_on_and_remembered(launch, warm, handler):
    """Also where the processes then end with 0, because the work was done, or have no handler yet."""
    out = launch(
        f"signal.signal(signal.SIGTERM, {handler})\n(out / 'up').touch()\ntime.sleep(1000)"
    )
    thread = signal_when(out / "up")
    assert runner.run_ranks("job.py", [], 1, warm) == runner.STOPPED
    thread.join()


def test_jobs_side_by_side_all_run_and_no_more_at_once_than_slots(launch, warm):
    out = launch(
        "name = sys.argv[1]\n(out / f'{name}.on').touch()\ntime.sleep(0.3)\n"
        "(out / f'{name}.saw').write_text(str(len(list(out.glob('*.on')))))\n(out / f'{name}.on').unlink()"
    )
    assert runner.run_side_by_side("job.py", [[str(i)] for i in range(5)], slots=2, warm=warm) == 0
    seen = [int((out / f"{i}.saw").read_text()) for i in range(5)]
    assert max(seen) <= 2


def test_a_failure_leaves_the_other_jobs_alone_and_is_told_in_the_end(launch, warm):
    out = launch(
        "(out / sys.argv[1]).touch()\nsys.exit({'first': 3, 'second': 4}.get(sys.argv[1], 0))"
    )
    assert (
        runner.run_side_by_side("job.py", [["first"], ["second"], ["third"]], slots=1, warm=warm)
        == 3
    )
    assert all((out / name).exists() for name in ("first", "second", "third"))


def test_after_a_stop_nothing_new_is_started(launch, warm):
    out = launch("(out / sys.argv[1]).touch()\ntime.sleep(1000)")
    thread = signal_when(out / "third")
    assert (
        runner.run_side_by_side("job.py", [["third"], ["fourth"]], slots=1, warm=warm)
        == runner.STOPPED
    )
    thread.join()
    assert not (out / "fourth").exists()


def test_a_request_to_stop_outweighs_what_failed_before_it(launch, warm, monkeypatch):
    """What failed is met again by the same command; what was saved must not be taken for a failure."""
    monkeypatch.setattr(runner, "_GRACE", 60)
    saves = "signal.signal(signal.SIGTERM, lambda *_: ((out / 'saved').touch(), sys.exit(0)))\n"
    out = launch(
        f"name = (sys.argv + [os.environ.get('RANK')])[1]\nif name in ('bad', '1'): sys.exit(3)\n{saves}"
        "time.sleep(0.3)\n(out / 'up').touch()\ntime.sleep(1000)"
    )

    def beside():
        return runner.run_side_by_side("job.py", [["bad"], ["good"]], slots=2, warm=warm)

    for start in (beside, lambda: runner.run_ranks("job.py", [], 2, warm)):
        (out / "up").unlink(missing_ok=True)
        thread = signal_when(out / "up")
        assert start() == runner.STOPPED
        thread.join()
        assert (out / "saved").exists()
        (out / "saved").unlink()


def test_a_request_that_comes_while_ranks_are_started_reaches_those_and_starts_no_more(
    launch, warm, monkeypatch
):
    launch("sys.argv[1:] == ['at once'] or time.sleep(1000)")
    # a parent that still imports would start none at all
    assert runner.run_ranks("job.py", ["at once"], 1, warm) == 0
    started, start = [], runner._start

    def and_signal(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(runner, "_start", and_signal)
    assert runner.run_ranks("job.py", [], 3, warm) == runner.STOPPED and len(started) == 1
    assert (
        runner.run_side_by_side("job.py", [["a"], ["b"]], slots=2, warm=warm) == runner.STOPPED
        and len(started) == 2
    )
    assert all(job.returncode == -signal.SIGTERM for job in started)


def test_a_ctrl_c_reaches_jobs_through_us_alone(launch, warm):
    """The terminal sends it to every process; one that still imports would end with a traceback."""
    out = launch("os.kill(os.getpid(), signal.SIGINT)\n(out / 'went on').touch()")
    assert runner.run_ranks("job.py", [], 1, warm) == 0 and (out / "went on").exists()


def test_an_error_of_the_system_ends_the_other_ranks_soon_and_is_said_once(
    launch, warm, capfd, monkeypatch
):
    """Nobody waits for the rank that hangs in a collective."""
    monkeypatch.setattr(runner, "_GRACE", 1000.0)
    launch(
        f"sys.path.insert(0, {str(Path(__file__).parents[3])!r})\nfrom pipeline.running import entry\n"
        "def main():\n    if os.environ['RANK'] == '2': time.sleep(1000)\n    raise OSError(28, 'No "
        "space left on device', '/runs')\nentry.run(main)"
    )
    assert runner.run_ranks("job.py", [], 3, warm) == runner.SYSTEM_ERROR
    said = capfd.readouterr().err
    assert (
        said.count("error: /runs: No space left on device") == 1
        and "(rank" not in said
        and "Traceback" not in said
    )


def test_a_rank_that_alone_meets_an_error_of_the_system_says_so(launch, warm, capfd):
    launch(
        f"sys.path.insert(0, {str(Path(__file__).parents[3])!r})\nfrom pipeline.running import "
        "entry\nentry._BEHIND_THE_FIRST = 0.1\n"
        "def main():\n    if os.environ['RANK'] == '0': time.sleep(1000)\n    raise OSError(5, "
        "'Input/output error', '/data')\nentry.run(main)"
    )
    assert runner.run_ranks("job.py", [], 2, warm) == runner.SYSTEM_ERROR
    assert (
        "error: /data: Input/output error" in (said := capfd.readouterr().err)
        and "(rank 1)" in said
    )


def test_a_rank_whose_connection_to_a_failed_one_breaks_adds_nothing_to_its_sentence(
    launch, warm, capfd
):
    """gloo's error is a RuntimeError of the ranks that were left; it comes a moment after the first has ended."""
    launch(
        f"sys.path.insert(0, {str(Path(__file__).parents[3])!r})\nfrom pipeline.running import entry\n"
        "def main():\n    if os.environ['RANK'] == '1': raise OSError(28, 'No space left on device', '/runs')\n"
        "    raise RuntimeError('[pair.cc:553] Connection closed by peer "
        "[127.0.0.1]:58513')\nentry._BEHIND_THE_FIRST = 0.1\nentry.run(main)"
    )
    assert runner.run_ranks("job.py", [], 2, warm) == runner.SYSTEM_ERROR
    said = capfd.readouterr().err
    assert (
        "error: /runs: No space left on device" in said
        and "Traceback" not in said
        and "connection" not in said
    )


@pytest.mark.parametrize(
    ("end", "code", "sentence"),
    [
        ("os._exit(9)", 9, "the connection to another rank is lost"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            -signal.SIGKILL,
            "a process was killed (SIGKILL), as the system does where memory is full",
        ),
    ],
    ids=["without a word", "killed"],
)
def test_ranks_that_are_left_alone_are_no_second_sentence(launch, warm, capfd, end, code, sentence):
    launch(
        f"sys.path.insert(0, {str(Path(__file__).parents[3])!r})\nfrom pipeline.running import entry\n"
        f"def main():\n    if os.environ['RANK'] == '1': {end}\n"
        "    raise RuntimeError('[pair.cc:553] Connection closed by peer [127.0.0.1]:58513')\nentry.run(main)"
    )
    assert runner.run_ranks("job.py", [], 2, warm) == code
    said = capfd.readouterr().err
    assert said.startswith(f"error: {sentence}") and said.count("\n") == 1


CUT_WHILE_READ = (
    "import mmap\nf = open(out / 'f', 'w+b'); f.truncate(8192); m = mmap.mmap(f.fileno(), 8192); "
    "f.truncate(0); m[5000]"
)


def test_a_mapped_file_that_is_cut_ends_a_rank_without_a_word_so_we_say_it(
    launch, warm, capfd, monkeypatch
):
    """Nor is the grace waited for."""
    monkeypatch.setattr(runner, "_GRACE", 1000.0)
    launch(f"if os.environ['RANK'] == '0': time.sleep(1000)\n{CUT_WHILE_READ}")
    assert runner.run_ranks("job.py", [], 2, warm) == runner.SYSTEM_ERROR
    said = capfd.readouterr().err
    assert (
        said.startswith("error: a file of weights was cut short while it was read")
        and said.count("\n") == 1
    )


def test_what_we_kill_after_another_one_s_failure_is_no_error_of_its_own(
    launch, warm, capfd, monkeypatch
):
    monkeypatch.setattr(runner, "_GRACE", 0.5)
    launch("if os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(1000)")
    assert runner.run_ranks("job.py", [], 2, warm) == 3 and "SIGKILL" not in capfd.readouterr().err


@pytest.mark.parametrize("ending", [f"sys.exit({runner.SYSTEM_ERROR})", CUT_WHILE_READ])
def test_after_an_error_of_the_system_no_job_is_begun(launch, warm, ending):
    out = launch(f"(out / sys.argv[1]).touch()\n{ending}")
    assert (
        runner.run_side_by_side("job.py", [["first"], ["second"]], slots=1, warm=warm)
        == runner.SYSTEM_ERROR
    )
    assert not (out / "second").exists()


def test_a_request_while_we_work_ourselves_is_raised_once_and_handlers_come_back():
    before, tidied = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(runner.Stopped, match="SIGUSR1"), runner.stoppable():
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(1000)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a scheduler that grows impatient
            tidied.append(True)
    assert tidied and signal.getsignal(signal.SIGTERM) is before
