"""A large file is read once, and every change of it is noticed: in place, of the same size, with its times set back."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.data import digests
from pipeline.data.digests import content_digest, content_digests
from pipeline.data.fingerprint import fingerprint


@pytest.fixture
def reads(tmp_path, monkeypatch) -> list[Path]:
    """A cache of its own, for files of any size; returns the list of what is read."""
    monkeypatch.setenv("SAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SMALL", 0)
    monkeypatch.setattr(digests, "_SETTLED", -1.0)
    original, found = artifacts.file_digest, []
    monkeypatch.setattr(artifacts, "file_digest", lambda path: found.append(path) or original(path))
    return found


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights" * 100)
    return path


def test_a_file_is_read_once_and_again_when_it_is_another(reads, file):
    first = content_digest(file)
    assert content_digest(file) == first and len(reads) == 1
    file.write_bytes(b"Weights" * 100)
    assert content_digest(file) not in (first,) and len(reads) == 2


def test_a_change_in_place_whose_times_are_set_back_is_noticed(reads, file):
    before, status = content_digest(file), file.stat()
    with file.open("r+b") as stream:
        stream.seek(300)
        stream.write(b"X")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert content_digest(file) != before and len(reads) == 2


def test_another_file_in_its_place_is_noticed(reads, file, tmp_path):
    before = content_digest(file)
    other = tmp_path / "other"
    other.write_bytes(b"weightS" * 100)
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)
    assert content_digest(file) != before


def test_a_file_that_has_just_changed_is_not_remembered(reads, file, monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED", 2.0)
    assert content_digest(file) == content_digest(file) and len(reads) == 2


def test_a_cache_that_is_damaged_or_cannot_be_written_costs_time_only(
    reads, file, tmp_path, monkeypatch
):
    expected = content_digest(file)
    (entry,) = (tmp_path / "cache" / "digests").glob("*.json")
    for text in ("", "[]", "{}", json.dumps({**json.loads(entry.read_text()), "sha256": 5}), "\0"):
        entry.write_text(text)
        assert content_digest(file) == expected
    (tmp_path / "blocked").write_text("no folder")
    monkeypatch.setenv("SAP_CACHE", str(tmp_path / "blocked"))
    assert content_digest(file) == expected


def test_who_asks_at_once_waits_for_the_one_that_reads(reads, file, monkeypatch):
    slow = artifacts.file_digest
    monkeypatch.setattr(artifacts, "file_digest", lambda path: (time.sleep(0.3), slow(path))[1])
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(content_digest, [file] * 4))
    assert len(found) == 1 and len(reads) == 1


def test_what_takes_long_is_said_once(reads, file, monkeypatch, capfd):
    monkeypatch.setattr(digests, "_TOLD", 100)
    for _ in range(2):
        content_digests([file])
    assert capfd.readouterr().err.count("once, to know these files by their content") == 1


def test_a_byte_anywhere_is_another_model(tmp_path):
    """Weights were once known by their header and a part of every tensor."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x02" + bytes(7) + b"{}" + bytes(10_000))
    before = fingerprint(tmp_path)
    content = bytearray(path.read_bytes())
    content[11] = 1
    path.write_bytes(content)
    assert fingerprint(tmp_path) != before
