"""Jobs forked from a warm parent: each is what a Python started for it would be, ends alone, and outlives nobody."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import shipped
from pipeline.running import runner
from pipeline.running.warm import WarmParents
from tests.project import ROOT, make_project, sap, write_recipe

pytestmark = [pytest.mark.processes, pytest.mark.slow]
SEPARATE = "note: every process imports for itself, which takes seconds: "

# All that a job may have inherited from the process it was forked from, as its first lines see it.
SEEN = """
import atexit, json, os, pathlib, random, signal, sys, threading
import numpy, torch

folder = pathlib.Path(os.environ["FOLDER"])
atexit.register((folder / "atexit").write_text, "ran")
open_files = [path for path in pathlib.Path("/proc/self/fd").iterdir() if path.exists()]
inodes = {path.name: (path.stat().st_dev, path.stat().st_ino) for path in open_files if path.exists()}
x = torch.linspace(-1, 1, 300 * 300).view(300, 300)
handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD, signal.SIGPIPE)
seen = {
    "argv": sys.argv, "path": sys.path, "name": __name__, "main": sys.modules["__main__"].__file__,
    "folder": os.getcwd(), "environment": dict(os.environ), "descriptors": inodes, "group": os.getpgrp(),
    "parent": os.getppid(), "signals": {number.name: str(signal.getsignal(number)) for number in handled},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "python threads": threading.active_count(),
    "parallel": torch.__config__.parallel_info(), "threads": torch.get_num_threads(), "product": (x @ x).sum().item(),
}
drawn = {"python": random.random(), "numpy": numpy.random.rand(), "torch": torch.rand(1).item()}
(folder / "seen.json").write_text(json.dumps({"seen": seen, **drawn}))
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Write launch/job.py; returns the folder above."""
    (tmp_path / "launch").mkdir()
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)

    def write(body: str) -> Path:
        begin = f"import os, pathlib, signal, sys, time\nout = pathlib.Path({str(tmp_path)!r})\n"
        (tmp_path / "launch" / "job.py").write_text(begin + body)
        return tmp_path

    return write


def within(seconds: float, true: Callable[[], object]) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def children(parent: int) -> list[int]:
    """Those of this process that run or wait to be asked for their exit code."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name_and_rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        if int(name_and_rest[2].split()[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def test_a_job_finds_what_a_python_of_its_own_finds(launch, monkeypatch, tmp_path):
    """Environment, threads, arguments, descriptors, signals, folder: the same. Random numbers: not the same."""
    launch(SEEN)
    for name in ("MASTER_PORT", "OPENBLAS_NUM_THREADS", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runner, "free_port", lambda: "29900")
    monkeypatch.chdir(tmp_path)
    # as a shell would; the one that starts a separate process does
    monkeypatch.setenv("PWD", str(tmp_path))
    found = {}
    with WarmParents(["numpy.random", "torch"]) as warm:
        for threads in ("2", "1"):  # each number of threads has its parent
            monkeypatch.setenv("OMP_NUM_THREADS", threads)
            for way, parents in (("separate", None), ("warm", warm), ("again", warm)):
                folder = tmp_path / f"{way}{threads}"
                folder.mkdir()
                monkeypatch.setenv("FOLDER", str(folder))
                assert runner.run_ranks("job.py", ["a b", way[:0]], 1, parents) == 0
                text = (folder / "seen.json").read_text().replace(str(folder), "FOLDER")
                found[way + threads] = json.loads(text)
                assert (folder / "atexit").read_text() == "ran"
        assert warm.problem is None
    for threads in ("1", "2"):
        separate, first, again = (found[way + threads] for way in ("separate", "warm", "again"))
        assert separate["seen"] == first["seen"] == again["seen"]
        assert first["seen"]["threads"] == int(threads) and first["seen"]["parent"] == os.getpid()
        for generator in ("python", "numpy", "torch"):
            assert first[generator] != again[generator]


def test_what_imports_put_into_the_environment_is_there_and_what_is_a_job_s_own_stands(
    launch, monkeypatch
):
    """As DS_ACCELERATOR, without which DeepSpeed looks for a device."""
    out = launch(
        "(out / 'seen').write_text(' '.join(os.environ[name] for name in ('TOLD', 'GIVEN', 'RANK')))"
    )
    (out / "ahead.py").write_text(
        "import os\nfor name in ('TOLD', 'GIVEN', 'RANK'):\n    os.environ.setdefault(name, 'import')"
    )
    monkeypatch.setenv("PYTHONPATH", str(out))
    monkeypatch.setenv("GIVEN", "user")
    monkeypatch.delenv("RANK", raising=False)
    with WarmParents(["ahead"]) as warm:
        assert runner.run_ranks("job.py", [], 1, warm) == 0
    assert (out / "seen").read_text() == "import user 0"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.abort()", -signal.SIGABRT),
        ("raise KeyError('lost')", 1),
        ("sys.exit(7)", 7),
        ("os._exit(8)", 8),
    ],
)
def test_a_job_ends_alone_and_its_exit_code_is_told(launch, capfd, body, code):
    out = launch(
        f"if sys.argv[1] == 'bad':\n    {body}\ntime.sleep(0.2)\n(out / sys.argv[1]).touch()"
    )
    with WarmParents([]) as warm:
        assert runner.run_side_by_side("job.py", [["bad"], ["beside"], ["after"]], 2, warm) == code
        assert runner.run_ranks("job.py", ["later"], 1, warm) == 0
        assert warm.problem is None
    assert all((out / name).exists() for name in ("beside", "after", "later"))
    assert ("KeyError: 'lost'" in capfd.readouterr().err) == ("KeyError" in body)


def test_nothing_is_left_behind_and_memory_is_given_back(launch):
    launch("held = bytearray(10**8)")
    before = children(os.getpid())
    with WarmParents(["json"]) as warm:
        assert runner.run_ranks("job.py", [], 2, warm) == 0
        (parent,) = set(children(os.getpid())) - set(before)
        held = int(Path(f"/proc/{parent}/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
        assert held < 5e7 and children(parent) == []
    assert children(os.getpid()) == before


CLIENT = """
import contextlib, os, sys
from pathlib import Path
from pipeline import shipped
from pipeline.running import runner
from pipeline.running.warm import WarmParents

shipped.FOLDER = Path(sys.argv[1])
with WarmParents([]) if sys.argv[2] == "warm" else contextlib.nullcontext() as warm:
    sys.exit(runner.run_ranks("job.py", [], 2, warm))
"""


@pytest.mark.parametrize("way", ["warm", "separate"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_jobs_go_with_the_program_that_started_them_and_may_save_first(launch, number, way):
    """However it ends: what is left of it would keep its GPU."""
    out = launch(
        "from pipeline.running.entry import run\nrank = os.environ['RANK']\n"
        "def save(*_):\n    (out / f'saved{rank}').touch()\n    os._exit(0)\n"
        "def main():\n    signal.signal(signal.SIGTERM, save)\n    (out / "
        "f'up{rank}').write_text(str(os.getpid()))\n    time.sleep(100)\n"
        "run(main)"
    )
    program = subprocess.Popen([sys.executable, "-c", CLIENT, str(out), way], cwd=ROOT)
    within(
        600,
        lambda: all(
            (out / f"up{rank}").exists() and (out / f"up{rank}").read_text() for rank in (0, 1)
        ),
    )
    started = children(program.pid)
    assert {int((out / f"up{rank}").read_text()) for rank in (0, 1)} <= set(started) and len(
        started
    ) == 2 + (way == "warm")
    program.send_signal(number)
    assert program.wait(600) == (-signal.SIGKILL if number == signal.SIGKILL else runner.STOPPED)
    # a planted fault leaves them: it should not take ten minutes to say so
    within(60, lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
    assert (out / "saved0").exists() and (out / "saved1").exists()


def test_a_parent_that_is_killed_takes_no_job_with_it_and_others_start_on_their_own(launch, capfd):
    out = launch(
        "(out / sys.argv[1]).touch()\nif sys.argv[1] == 'first':\n"
        "    os.kill(int((out / 'parent').read_text()), signal.SIGKILL)\n    time.sleep(0.5)\n    sys.exit(5)"
    )
    before = children(os.getpid())
    with WarmParents([]) as warm:
        warm.begin(runner.environment(1))
        (parent,) = set(children(os.getpid())) - set(before)
        (out / "parent").write_text(str(parent))
        assert runner.run_side_by_side("job.py", [["first"], ["second"], ["third"]], 1, warm) == 5
        assert warm.problem
    assert (out / "second").exists() and (out / "third").exists()
    said = capfd.readouterr().err
    assert (
        said.count(SEPARATE) == 1
        and f"{SEPARATE}the process that imports ahead has ended\n" in said
    )


@pytest.mark.parametrize(
    ("preload", "reason"),
    [
        (
            "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
            "started a thread",
        ),
        (
            "import no_such_package",
            "cannot be imported ahead (ModuleNotFoundError: No module named 'no_such_package')",
        ),
        (
            "import sys; from types import SimpleNamespace as Stand\n"
            "sys.modules['torch'] = Stand(cuda=Stand(_is_in_bad_fork=lambda: True))",
            "an import has asked CUDA",
        ),
    ],
    ids=["thread", "missing", "CUDA"],
)
def test_what_cannot_be_forked_is_said_once_and_jobs_import_for_themselves(
    launch, monkeypatch, capfd, preload, reason
):
    out = launch("(out / sys.argv[1]).touch()")
    (out / "ahead.py").write_text(preload)
    monkeypatch.setenv("PYTHONPATH", str(out))
    with WarmParents(["ahead"]) as warm:
        assert runner.run_side_by_side("job.py", [["first"], ["second"]], 1, warm) == 0
    assert (out / "first").exists() and (out / "second").exists()
    said = capfd.readouterr().err
    assert said.count(SEPARATE) == 1 and reason in said


def test_another_system_has_separate_processes(launch, monkeypatch, capfd):
    out = launch("(out / 'ran').touch()")
    monkeypatch.setattr("pipeline.running.warm.sys.platform", "darwin")
    with WarmParents([]) as warm:
        assert runner.run_ranks("job.py", [], 1, warm) == 0 and (out / "ran").exists()
    assert f"{SEPARATE}darwin has no subreapers\n" in capfd.readouterr().err


def test_a_stop_is_not_kept_waiting_by_imports(launch, monkeypatch):
    out = launch("(out / 'ran').touch()")
    (out / "ahead.py").write_text("import time; time.sleep(1000)")
    monkeypatch.setenv("PYTHONPATH", str(out))
    with WarmParents(["ahead"]) as warm:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        previous = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        try:
            assert (
                runner.run_side_by_side("job.py", [["first"], ["second"]], 1, warm)
                == runner.STOPPED
            )
        finally:
            signal.signal(signal.SIGALRM, previous)
    assert not (out / "ran").exists()


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> tuple[Path, Path]:
    """Runs of one recipe on engine single: all of it warm, and method sap with each process a Python of its own."""
    folder = tmp_path_factory.mktemp("grid")
    content = make_project(folder)
    content["align"]["enabled"] = content["evaluate"]["baselines"] = False
    content["tracking"] = {"enabled": False}
    content["train"] |= {"engine": "single", "ranks": 1, "steps": 3, "lora": {"dropout": 0.1}}
    path = write_recipe(folder, content)
    for name, options in (("warm", []), ("separate", ["--no-warm", "--method", "sap"])):
        found = sap("run", path, f"--output_dir={folder / name}", *options)
        assert found.returncode == 0 and "imports for itself" not in found.stderr, found.stderr
    return folder / "warm" / "tiny", folder / "separate" / "tiny"


@pytest.mark.parametrize(
    "files",
    [
        "direction-s0-*/*",
        "train-sap-*/adapter/*.safetensors",
        "evaluate-sap-*/answers.jsonl",
        "evaluate-sap-*/metrics.json",
    ],
)
def test_products_are_the_same_to_the_bit(grid, files):
    found = [
        {path.relative_to(folder): path.read_bytes() for path in folder.glob(files)}
        for folder in grid
    ]
    warm, separate = (
        {path: text for path, text in one.items() if path.name not in ("manifest.json", "DONE")}
        for one in found
    )
    assert warm == separate and warm
