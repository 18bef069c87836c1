"""How a launch script ends: exit codes and output as of any program, without finalization."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.running import entry

PROGRAM = """
import atexit, sys
from pipeline.running import entry

class Finalized:
    def __del__(self):
        print("finalized")

held = Finalized()
atexit.register(print, "atexit ran")

def main():
    sys.stdout.write("no newline, not flushed; ")
    {body}

{ending}
"""


def ended(body: str, ending: str = "entry.run(main)") -> tuple[int, str, str]:
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body, ending=ending)],
        capture_output=True,
        text=True,
    )
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize(
    ("body", "code"), [("pass", 0), ("return 1", 1), ("raise ValueError('lr')", 2)]
)
def test_exit_codes_and_output_without_finalization(body, code):
    assert ended(body)[:2] == (code, "no newline, not flushed; atexit ran\n")
    assert "finalized" in ended(body, "sys.exit(entry.guarded(main))")[1], (
        "nothing would be finalized here anyhow"
    )


@pytest.mark.parametrize(
    "error", ["RuntimeError('a broken node')", "__import__('io').UnsupportedOperation('fileno')"]
)
def test_other_errors_are_tracebacks(error):
    """Also where Python calls a fault of ours an OSError and a ValueError at once."""
    code, out, err = ended(f"raise {error}")
    assert (
        code == 1
        and "atexit ran" in out
        and "Traceback" in err
        and error.split("'")[-2] in err.splitlines()[-1]
    )


def test_threads_that_still_run_do_not_hold_the_process():
    assert (
        ended("import threading; threading.Thread(target=threading.Event().wait).start()")[0] == 0
    )


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (
            "raise OSError(28, 'No space left on device', '/runs/demo')",
            74,
            "error: /runs/demo: No space left on device: free space there",
        ),
        (
            "raise Exception('No space left on device (os error 28)')",
            74,
            "error: a file that is not named here: No space left on device: free",
        ),
        (
            "raise Exception('of a library') from OSError(5, 'Input/output error', '/x')",
            74,
            "error: /x: Input/output error: see whether the disk",
        ),
        (
            "raise ConnectionRefusedError(111, 'Connection refused')",
            74,
            "error: the network: Connection refused: see whether this machine reaches",
        ),
        (
            "open('x', 'wb').write(b'1' * 9); from safetensors import safe_open as o; o('x', 'np')",
            74,
            "error: a safetensors file that is not named here",
        ),
        (
            "raise entry.Stopped('SIGTERM')",
            75,
            "stopped on request (SIGTERM): run the same command again to go on",
        ),
        ("raise KeyboardInterrupt", 130, "interrupted"),
    ],
)
def test_the_system_and_requests_to_stop_are_one_sentence(body, code, said, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    found, _, err = ended(body)
    assert found == code and err.startswith(said) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        ("| true", 0, ""),  # sap status | head: what was left to do was to print
        ("2>&1 | true", 141, ""),
        (">/dev/full", 74, "No space left on device"),
    ],
)
def test_nobody_reads_the_output(tmp_path, redirection, code, said):
    """Also not by the interpreter's last words, which sys.exit would bring."""
    text = PROGRAM.format(
        body="time.sleep(0.5); print('x' * 100_000)",
        ending="import time; code = entry.guarded(main); os.write(9, b'%d' % code); sys.exit(code)",
    )
    (tmp_path / "program.py").write_text(
        text.replace("import atexit, sys", "import atexit, os, sys").replace(
            'print("finalized")', "pass"
        )
    )
    command = f"{sys.executable} {tmp_path / 'program.py'} 9>{tmp_path / 'code'} {redirection}"
    found = subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    assert (tmp_path / "code").read_text() == str(code) and said in found.stderr
    assert "Traceback" not in found.stderr and "Exception ignored" not in found.stderr


def test_secrets_in_addresses_stay_out(capsys):
    def fails() -> None:
        raise OSError("cannot reach https://user:hunter2@mlflow.example/api")

    assert entry.guarded(fails) == 74
    assert "hunter2" not in capsys.readouterr().err


TAKEN_LOCK = """
import _imp, atexit, threading
thread = threading.Thread(target=_imp.acquire_lock)
thread.start(), thread.join()  # it ends, and the lock of imports stays taken
atexit.register(lambda: __import__("colorsys"))
"""


@pytest.mark.parametrize(
    "way",
    [
        "entry.run(main)",
        "sys.argv = ['sap']; cli._main = lambda argv: main(); sys.exit(cli.main())",
    ],
)
def test_a_lock_of_imports_that_stays_taken_does_not_keep_a_stopped_program(way):
    """As when a signal came while two threads imported: torch imports at its end."""
    body = (
        "import sys, colorsys\ndel sys.modules['colorsys']\nfrom pipeline import cli; from "
        f"pipeline.running import entry; from pipeline.running import runner\n{TAKEN_LOCK}"
    )
    program = f"{body}\ndef main(): raise runner.Stopped('SIGINT')\nentry._LEAVING = 1.0\n{way}"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 75 and "stopped on request (SIGINT)" in ended.stderr
