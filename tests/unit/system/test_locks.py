"""A file system that cannot lock files is said once, and worked on."""

import errno
import fcntl
import os
import warnings

import pytest

from pipeline import artifacts
from pipeline.data import digests
from pipeline.system import locks
from pipeline.tracking import mlflow_store


@pytest.fixture
def without_locks(monkeypatch):
    def refuse(stream, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "_told", set())


def claimed(folder):
    artifacts.claim(folder / "stage")()


def read(folder):
    with digests._alone(folder / "data.jsonl"):
        pass


def delivered(folder):
    with mlflow_store._locked(folder / ".lock", wait=True) as held:
        assert held


@pytest.mark.parametrize("use", [claimed, read, delivered])
def test_it_is_said_once_and_worked_on(tmp_path, monkeypatch, without_locks, use):
    monkeypatch.setenv("SAP_CACHE", str(tmp_path))
    (tmp_path / "data.jsonl").write_text("{}\n")
    sentence = f"^{tmp_path}.* cannot lock files \\(No locks available\\): .*start no two at once"
    with pytest.warns(UserWarning, match=sentence) as said:
        use(tmp_path)
        use(tmp_path)
    assert len(said) == 1


def test_another_one_s_lock_is_no_lack_of_locks(tmp_path):
    path = tmp_path / "lock"
    with path.open("w") as first, path.open("w") as second, warnings.catch_warnings(action="error"):
        assert locks.locked(first, wait=False) and not locks.locked(second, wait=False)
