"""What goes wrong in a trial: each fault is given the chain's running command,
its folder and a generator of random numbers.

told = FAULTS["kill"](trial)        # what was done, for the record; None where there was nothing to do it to
"""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.tools.faults.chain import Chain, alive, end_group

LONGEST = 25.0  # seconds within which a fault strikes: about what the chain takes


@dataclass
class Trial:
    """A disturbed run. process: the command, once it has been started."""

    chain: Chain
    output: Path
    random: Random
    process: subprocess.Popen | None = None

    def start(self, **environment: str) -> None:
        self.process = self.chain.start(self.output, **environment)

    def wait_some_time(self) -> float:
        """A random part of the chain's time, or until it has ended."""
        assert self.process is not None
        seconds, started = self.random.uniform(0.0, LONGEST), time.monotonic()
        while self.process.poll() is None and time.monotonic() - started < seconds:
            time.sleep(0.02)
        return time.monotonic() - started

    def files(self) -> list[Path]:
        """What exists at this moment below the output folder, but for what MLflow's own database is made of."""
        found = []
        for path in sorted(self.output.rglob("*")):
            with contextlib.suppress(OSError):
                if path.is_file() and path.stat().st_size and "mlflow" not in path.name:
                    found.append(path)
        return found

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.output))


def kill_one(trial: Trial) -> str | None:
    """SIGKILL to any one process: the command, the process that forks, a rank, a cell."""
    trial.start()
    after = trial.wait_some_time()
    processes = alive(trial.process.pid)
    if not processes:
        return None
    pid = trial.random.choice(processes)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return f"one of {len(processes)} processes killed after {after:.1f} s"


def kill_all(trial: Trial) -> str | None:
    """The machine is gone: all at once."""
    trial.start()
    after = trial.wait_some_time()
    if trial.process.poll() is not None:
        return None
    os.killpg(trial.process.pid, signal.SIGKILL)
    return f"all processes killed after {after:.1f} s"


def ask_to_leave(trial: Trial) -> str | None:
    trial.start()
    after = trial.wait_some_time()
    if trial.process.poll() is not None:
        return None
    number = trial.random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
    everybody = trial.random.random() < 0.5  # a terminal's keys and its end reach the whole group
    (os.killpg if everybody else os.kill)(trial.process.pid, number)
    return f"{number.name} to {'the group' if everybody else 'the command'} after {after:.1f} s"


def stop_for_a_while(trial: Trial) -> str | None:
    trial.start()
    after = trial.wait_some_time()
    processes = alive(trial.process.pid)
    if not processes:
        return None
    chosen = processes if trial.random.random() < 0.5 else [trial.random.choice(processes)]
    seconds = trial.random.uniform(0.5, 6.0)
    for number, pause in ((signal.SIGSTOP, seconds), (signal.SIGCONT, 0.0)):
        for pid in chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(pause)
    return f"{len(chosen)} of {len(processes)} processes stopped for {seconds:.1f} s after {after:.1f} s"


def flip_a_bit(trial: Trial) -> str | None:
    """In a file that exists at a random moment, while the chain goes on."""
    trial.start()
    after = trial.wait_some_time()
    path = _chosen(trial)
    return None if path is None else f"{_flip(trial, path)} after {after:.1f} s"


def cut_a_file(trial: Trial) -> str | None:
    trial.start()
    after = trial.wait_some_time()
    path = _chosen(trial)
    if path is None:
        return None
    with contextlib.suppress(FileNotFoundError):
        size = path.stat().st_size
        os.truncate(path, trial.random.randrange(size))
    return f"{trial.name(path)} cut after {after:.1f} s"


def damage_between_runs(trial: Trial) -> str | None:
    """Killed, then damaged while nothing runs: what the next run finds."""
    told = kill_all(trial)
    trial.process.wait()
    path = _chosen(trial)
    if told is None or path is None:
        return told
    if trial.random.random() < 0.5:
        return f"{told}; {_flip(trial, path)}"
    if trial.random.random() < 0.5:
        path.write_bytes(trial.random.choice([b"", b"{}", b"[]", b"null", b"\0" * 64]))
        return f"{told}; {trial.name(path)} overwritten"
    path.unlink()
    return f"{told}; {trial.name(path)} deleted"


def _chosen(trial: Trial) -> Path | None:
    files = trial.files()
    return trial.random.choice(files) if files else None


def _flip(trial: Trial, path: Path) -> str:
    try:
        content = bytearray(path.read_bytes())
        place = trial.random.randrange(len(content))
        content[place] ^= 1 << trial.random.randrange(8)
        path.write_bytes(content)
    except (FileNotFoundError, ValueError):  # gone, or empty, by now
        return f"{trial.name(path)} was gone"
    return f"a bit of {trial.name(path)} flipped"


def two_at_once(trial: Trial) -> str | None:
    """The same command twice; the second begins at a random moment."""
    trial.start()
    after = trial.wait_some_time()
    second = trial.chain.start(trial.output)
    try:
        second.wait(200)
    except subprocess.TimeoutExpired:
        end_group(second.pid)
        return f"a second command, begun after {after:.1f} s, never ended"
    return f"a second command, begun after {after:.1f} s, ended with {second.returncode}"


# What the interpreters of a run import first: after some time, the clock of the wall says something else.
_CLOCK = """
import os, time
_real, _start, _at, _by = time.time, time.monotonic(), float(os.environ["FAULT_AT"]), float(os.environ["FAULT_BY"])
time.time = lambda: _real() + (_by if time.monotonic() - _start > _at else 0.0)
"""


def clock_jumps(trial: Trial) -> str | None:
    folder = trial.output.parent / f"{trial.output.name}-clock"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_CLOCK)
    at, by = (
        trial.random.uniform(0.0, 5.0),
        trial.random.choice([-86400.0 * 400, -3600.0, 3600.0, 86400.0 * 4000]),
    )
    trial.start(
        PYTHONPATH=f"{folder}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"),
        FAULT_AT=str(at),
        FAULT_BY=str(by),
    )
    trial.process.wait(240)
    return f"the clock of every process jumps by {by / 3600:.0f} h after {at:.1f} s"


def full_disk(trial: Trial) -> str | None:
    """A file takes all the space there is left on the trial's small file system, and goes again."""
    filler = trial.output.parent / "filler"
    trial.start()
    after = trial.wait_some_time()
    status = os.statvfs(trial.output.parent)
    if status.f_blocks * status.f_frsize > 2**31:
        return None  # not a file system of its own: others would meet the full disk, too
    left = trial.random.choice([0, 4096, 65536])
    with contextlib.suppress(OSError), filler.open("wb") as stream:
        stream.write(b"\0" * max(0, status.f_bavail * status.f_frsize - left))
    with contextlib.suppress(subprocess.TimeoutExpired):
        trial.process.wait(trial.random.uniform(3.0, 20.0))
    filler.unlink(missing_ok=True)
    return f"the disk full but for {left} bytes after {after:.1f} s"


@contextlib.contextmanager
def _server(how: str) -> Iterator[str]:
    """An address at which MLflow's server refuses, hangs, or dies after some answers."""
    if how == "refuses":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        return
    if how == "hangs":
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(64)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        return

    class Fails(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(500)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fails)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def tracking_fails(trial: Trial) -> str | None:
    """The chain must not mind; what it could not deliver waits.

    How the server is after this trial is the next command's affair.
    """
    how = trial.random.choice(["refuses", "hangs", "fails"])
    with _server(how) as address:
        before = trial.chain.environment
        trial.chain.environment = {
            **before,
            "MLFLOW_TRACKING_URI": address,
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        }
        try:
            trial.start()
            trial.process.wait(240)
        finally:
            trial.chain.environment = before
    return f"a tracking server that {how}"


FAULTS: dict[str, Callable[[Trial], str | None]] = {
    "one process killed": kill_one,
    "all processes killed": kill_all,
    "asked to leave": ask_to_leave,
    "stopped for a while": stop_for_a_while,
    "a bit flipped": flip_a_bit,
    "a file cut": cut_a_file,
    "killed and damaged": damage_between_runs,
    "two commands at once": two_at_once,
    "the clock jumps": clock_jumps,
    "the disk is full": full_disk,
    "tracking fails": tracking_fails,
}
