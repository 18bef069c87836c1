"""How a launch script ends: exit codes and output as of any program, without finalization."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from pipeline import entry

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
    found = subprocess.run([sys.executable, "-c", PROGRAM.format(body=body, ending=ending)], capture_output=True, text=True)
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize(("body", "code"), [("pass", 0), ("return 1", 1), ("raise ValueError('lr')", 2)])
def test_exit_codes_and_output_without_finalization(body, code):
    assert ended(body)[:2] == (code, "no newline, not flushed; atexit ran\n")
    assert "finalized" in ended(body, "sys.exit(entry.guarded(main))")[1], "nothing would be finalized here anyhow"


def test_other_errors_are_tracebacks():
    code, out, err = ended("raise RuntimeError('a broken node')")
    assert code == 1 and "atexit ran" in out and "RuntimeError: a broken node" in err


def test_threads_that_still_run_do_not_hold_the_process():
    assert ended("import threading; threading.Thread(target=threading.Event().wait).start()")[0] == 0
