"""sha256 of files that are read again and again, each computed once: a 70B model is 140 GB.

    content_digests([Path("model-00001-of-00030.safetensors"), ...])      # hex, in the order given

Remembered below SAP_CACHE by path, size, times and inode, the time of the inode's own change among them: whoever sets a
file's times back changes that. A file that changed within the last seconds is not remembered, or a second change in the
same tick would go unnoticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.data.builtin import cache_folder
from pipeline.system.locks import locked

_SMALL = 2**20  # bytes up to which a file is read rather than looked up
_TOLD = 2**31  # bytes from which reading takes long enough to say so
_SETTLED = 2.0  # seconds
# seconds and bytes a second: how long another process may take to read a file
_PATIENCE, _SLOWEST = 10.0, 1e8


def content_digests(paths: Sequence[Path]) -> list[str]:
    """sha256 (hex) of every file's bytes, several read at a time.

    Processes of one machine that ask at once share the work.
    """
    waiting = sum(
        path.stat().st_size
        for path in paths
        if path.stat().st_size > _SMALL and _remembered(path) is None
    )
    if waiting > _TOLD and os.environ.get("RANK", "0") == "0":
        print(
            f"reading {waiting / 1e9:.0f} GB once, to know these files by their content",
            file=sys.stderr,
            flush=True,
        )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        return list(pool.map(content_digest, paths))


def content_digest(path: Path) -> str:
    """sha256 (hex) of the file's bytes. OSError where it cannot be read."""
    if path.stat().st_size <= _SMALL:
        return artifacts.file_digest(path)
    found = _remembered(path)
    if found is not None:
        return found
    with _alone(path):
        found = _remembered(path)
        return _computed(path) if found is None else found


def _computed(path: Path) -> str:
    before = _facts(path)
    digest = artifacts.file_digest(path)
    settled = time.time() - max(before["changed"], before["modified"]) / 1e9 > _SETTLED
    if settled and _facts(path) == before:
        # a cache that cannot be written: read again the next time
        with contextlib.suppress(OSError), artifacts.shared():
            artifacts.write_json(_entry(path), {**before, "sha256": digest})
    return digest


def _remembered(path: Path) -> str | None:
    try:
        entry = json.loads(_entry(path).read_text())
    except (OSError, ValueError):
        return None
    digest = entry.pop("sha256", None) if isinstance(entry, dict) else None
    return digest if isinstance(digest, str) and entry == _facts(path) else None


def _facts(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {
        "path": str(path.absolute()), "bytes": status.st_size, "modified": status.st_mtime_ns,
        "changed": status.st_ctime_ns, "inode": status.st_ino,
    }  # fmt: skip


def _entry(path: Path) -> Path:
    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()
    try:
        return cache_folder() / "digests" / f"{name}.json"
    except RuntimeError as error:  # a user without a home
        raise FileNotFoundError(str(error)) from None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time, where the cache can be written; the others then find what it has remembered.

    Whoever waits longer than the file takes to read reads it:
    the one that holds the lock may be stopped, or on a node that is lost.
    """
    try:
        lock = _entry(path).with_suffix(".lock")
        with artifacts.shared():
            lock.parent.mkdir(parents=True, exist_ok=True)
            stream = lock.open("w")
    except OSError:
        yield
        return
    deadline = time.monotonic() + _PATIENCE + path.stat().st_size / _SLOWEST
    with stream:
        while time.monotonic() < deadline:
            if locked(stream, wait=False):
                break
            time.sleep(0.2)
        yield
