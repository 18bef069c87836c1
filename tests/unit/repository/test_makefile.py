"""`make setup` is done when pip says so, and not before."""

import os
import subprocess

import pytest

from tests.project import ROOT

# A Python that makes a folder with itself for `-m venv FOLDER`, and answers `-m pip` with what a test asks for.
PYTHON = """#!/bin/sh
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip install"*) echo "WARNING: Location is odd"; echo "said by pip"; exit {code} ;;
esac
"""


@pytest.mark.parametrize(("code", "ready"), [(0, True), (1, False), (2, False)])
def test_setup_is_not_complete_where_pip_has_failed(tmp_path, code, ready):
    python, venv = tmp_path / "python", tmp_path / "venv"
    python.write_text(PYTHON.format(code=code))
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "setup", f"PYTHON={python}", f"VENV={venv}"]
    made = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment
    )
    assert (made.returncode == 0, (venv / "ready").exists()) == (ready, ready), made.stderr
    assert "said by pip" in made.stdout and "WARNING: Location" not in made.stdout
    assert ("pip could not install" in made.stderr) is not ready
