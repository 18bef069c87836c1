"""Artefact folders that exist completely or not at all.

A stage writes into a temporary folder beside its target; `publish` adds a manifest (sizes, sha256, inputs, versions,
git revision), renames the folder into place and writes the marker last, with the manifest's own sha256. `verify` reads
it all back: what the manifest lists must be there as it was, and nothing else. With SAP_SIGNING_KEY in the environment
the marker holds an HMAC of the manifest too, and a folder without the right one is damaged. Python:

    with artifacts.building(Path("runs/demo/prepare-1a2b3c4d"), inputs={"recipe": "..."}) as folder:
        (folder / "train.jsonl").write_text(...)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.system.locks import locked
from pipeline.system.system_errors import BY_THE_INPUT, naming

MANIFEST = "manifest.json"
MARKER = "DONE"
FACTS = "facts.json"
# holds times, so that no two are alike; nothing is made from it but the report
_TIMED = "metrics.jsonl"
# for another process that makes what this one needs: data sets may have to be fetched
_WAIT_SECONDS = 3600.0
_started_with: dict[str, int] = {}  # the umask, once it has been changed
_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "safetensors", "mlflow")


class Busy(ValueError):
    """Another process is writing the folder: no fault of the input, and over some time."""


def digest(value: Any) -> str:
    """sha256 (hex, 64 characters) of a JSON-serialisable value; key order does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with naming(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Atomic and durable write of a small text file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), temporary.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        _fsync(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def complete(folder: Path) -> bool:
    """Whether the folder was published (its marker is there); says nothing of later damage: see `verify`."""
    return (folder / MARKER).is_file()


def check_writable(folder: Path, field: str) -> None:
    """ValueError where `folder` cannot be made, or nothing can be written into it.

    field: what names the folder, for the message.

    OSError where that may pass (a full disk). Tried on the nearest folder that exists, with a nameless file: rights say
    little on a read-only or remote file system.
    """
    there = _nearest(folder, field)
    if not there.is_dir():
        raise ValueError(
            f"{field} {folder} cannot be written, because {there} is not a folder: set {field} to another one"
        )
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        if error.errno not in BY_THE_INPUT:
            raise OSError(error.errno, reason, str(there)) from None
        raise ValueError(
            f"{field} {folder} cannot be written ({there}: {reason}): set {field} to another folder"
        ) from None


def free_bytes(folder: Path, field: str) -> int:
    """Bytes that this user may still write where `folder` is or will be.

    ValueError as `check_writable` where it cannot be reached.
    """
    return shutil.disk_usage(_nearest(folder, field)).free


def _nearest(folder: Path, field: str) -> Path:
    """The folder, or the first of its parents that exists."""
    for path in (absolute := folder.absolute(), *absolute.parents):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno not in BY_THE_INPUT:
                raise
            raise ValueError(
                f"{field} {folder} cannot be reached ({os.strerror(error.errno)}): set {field} to another folder"
            ) from None
        return path
    raise AssertionError("the root exists")


def source(folder: Path) -> dict[str, str]:
    """What a stage that reads `folder` records of it among its inputs: its name, and what it held.

    `verify` checks it.
    """
    return {"folder": folder.name, "content": _content(read_manifest(folder))}


def _content(manifest: dict[str, Any]) -> str:
    return digest({name: entry for name, entry in manifest["files"].items() if name != _TIMED})


def require(*folders: Path) -> None:
    """ValueError naming the first folder that is not complete."""
    for folder in folders:
        if not complete(folder):
            raise ValueError(f"{folder} is not complete: run the stage that writes it again")


def verify(folder: Path, *names: str) -> dict[str, Any]:
    """The manifest of a published folder, after checking every file's size and sha256 against it.

    names: the files that are read of a folder too large to be read as a whole; only they are checked then. Raises
    ValueError where the folder is incomplete, a file does not match, or one is there that the manifest does not list.
    """
    require(folder)
    found = damage(folder, names)
    if found:
        raise ValueError(f"{found}: delete {folder} and run its stage again")
    return read_manifest(folder)


def damage(folder: Path, names: Sequence[str] = ()) -> str | None:
    """What is wrong with a published folder, in half a sentence;
    None where it holds what its manifest lists, and nothing else.

    names: as `verify`.
    """
    try:
        manifest = read_manifest(folder)
        other = _other_source(folder, manifest.get("inputs"))
    except ValueError as error:
        return str(error)
    if other:
        return other
    listed = manifest["files"]
    for name in names or listed:
        path = folder / name
        if name not in listed:
            return f"{folder / MANIFEST} does not list {name}"
        if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
            return f"{path} is a link, or leads out of the folder"
        if not path.is_file():
            return f"{path} is missing, though {folder / MANIFEST} lists it"
        if (
            path.stat().st_size != listed[name]["bytes"]
            or file_digest(path) != listed[name]["sha256"]
        ):
            return f"{path} does not match {folder / MANIFEST}"
    return None if names else _unlisted(folder, listed)


def _other_source(folder: Path, inputs: Any) -> str | None:
    """The half sentence where what a folder was made from is there, and is not what it was:
    made again, and otherwise.
    """
    for recorded in inputs.values() if isinstance(inputs, dict) else ():
        if (
            isinstance(recorded, dict)
            and isinstance(recorded.get("folder"), str)
            and "content" in recorded
        ):
            path = folder.parent / recorded["folder"]
            if complete(path) and _content(read_manifest(path)) != recorded["content"]:
                return f"{folder} was made from another content of {path}"
    return None


def _unlisted(folder: Path, listed: dict[str, Any]) -> str | None:
    """The half sentence for a file or a link that the manifest does not list.

    NFS keeps a file that is deleted while it is open as .nfs*.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            return f"{path} is a link, or leads out of the folder"
        name = path.relative_to(folder).as_posix()
        if (
            not path.is_dir()
            and name not in (*listed, MANIFEST, MARKER)
            and not path.name.startswith(".nfs")
        ):
            return f"{path} is not in {folder / MANIFEST}"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest without checking the files.

    ValueError where it is missing, no manifest, or another than was published; OSError where this machine cannot read
    it.
    """
    path = folder / MANIFEST
    try:
        with naming(path):
            raw = path.read_bytes()
        manifest = json.loads(raw)
    except (FileNotFoundError, ValueError, RecursionError) as error:
        # other OSErrors pass: they say nothing of the file
        raise ValueError(f"{path} cannot be read ({type(error).__name__})") from None
    if not (
        isinstance(manifest, dict)
        and isinstance(manifest.get("files"), dict)
        and all(map(_is_entry, manifest["files"].values()))
    ):
        raise ValueError(f"{path} is not a manifest")
    if (folder / MARKER).is_file():
        _check_marker(folder, raw)
    return manifest


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
    )


def _check_marker(folder: Path, manifest: bytes) -> None:
    """ValueError where the manifest is not the one that the marker was written for.

    An empty marker says nothing of it: older versions wrote those.
    """
    marker = (folder / MARKER).read_bytes().decode(errors="replace").splitlines()
    digest, *signature = _marks(manifest)
    if marker and marker[0] != digest:
        raise ValueError(f"{folder / MANIFEST} does not match {folder / MARKER}")
    if signature and not (
        len(marker) > 1 and hmac.compare_digest(marker[1].encode(), signature[0].encode())
    ):
        raise ValueError(f"{folder / MARKER} is not signed with the SAP_SIGNING_KEY that is set")


def _marks(manifest: bytes) -> list[str]:
    """The marker's lines: the manifest's sha256, and its HMAC where there is a key."""
    key = os.environ.get("SAP_SIGNING_KEY", "").encode()
    digest = f"sha256 {hashlib.sha256(manifest).hexdigest()}"
    return (
        [digest, f"hmac-sha256 {hmac.new(key, manifest, 'sha256').hexdigest()}"]
        if key
        else [digest]
    )


def claim(target: Path) -> Callable[[], None]:
    """Keep other processes from writing `target`; returns what gives it up.

    Busy (a ValueError) where another one holds it.
    """
    path = target.with_name(f".{target.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("w")
    try:
        # Not ours either where it was given up and deleted between our open and our lock.
        ours = locked(lock, wait=False) and path.stat().st_ino == os.fstat(lock.fileno()).st_ino
    except OSError as error:
        lock_is_gone = error.errno in (errno.ENOENT, errno.ESTALE)  # as NFS says it
        if not lock_is_gone:
            lock.close()
            raise
        ours = False
    if not ours:
        lock.close()
        raise Busy(f"another process is writing {target}: wait for it to end, or stop it")

    def release() -> None:
        path.unlink(missing_ok=True)
        lock.close()

    return release


def claim_incomplete(target: Path) -> Callable[[], None] | None:
    """Like `claim`; None where another process has completed `target` since the caller last looked."""
    release = claim(target)
    if not complete(target):
        return release
    release()
    return None


def claim_unless_complete(
    target: Path, seconds: float = _WAIT_SECONDS
) -> Callable[[], None] | None:
    """Like `claim`, but waits for a process that is writing `target`; None once the folder is complete.

    Busy (a ValueError) where it is still being written after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not complete(target):
        try:
            return claim_incomplete(target)
        except Busy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    return None


@contextlib.contextmanager
def building(
    target: Path, inputs: dict[str, Any], claimed: Callable[[], None] | None = None, **facts: Any
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an exception.

    inputs: hashes of what the artefact was made from; facts: further manifest entries (counts, times).
    claimed: what `claim` returned, where the caller has claimed the target.
    A `facts.json` written inside the folder becomes part of the manifest.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    release = claimed or claim(target)
    started = time.time()
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with naming(target):
            yield temporary
            publish(temporary, target, inputs, seconds=round(time.time() - started, 1), **facts)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        release()


def publish(temporary: Path, target: Path, inputs: dict[str, Any], **facts: Any) -> None:
    """Write the manifest of `temporary`, move it to `target`, and mark it done.

    A facts.json in it becomes part of the manifest.

    The marker is written when all before it is on the disk:
    a machine that dies on the way leaves a folder that is not complete.
    """
    assert not any(path.is_symlink() for path in temporary.rglob("*")), (
        f"a link in {temporary} would not be what its manifest says"
    )
    files = sorted(
        path
        for path in temporary.rglob("*")
        if path.is_file() and path.name not in (MANIFEST, MARKER)
    )
    manifest = {
        "files": {
            str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": file_digest(p)}
            for p in files
        },
        "inputs": inputs,
        "versions": versions(),
        "git_revision": git_revision(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
    }
    if (temporary / FACTS).is_file():
        manifest["facts"] = json.loads((temporary / FACTS).read_text())
    write_json(temporary / MANIFEST, manifest)
    _permit(temporary)
    # Files first, then the folders that name them, innermost first.
    for path in (
        *files,
        *sorted((path for path in temporary.rglob("*") if path.is_dir()), reverse=True),
        temporary,
    ):
        _fsync(path)
    if target.exists():  # an interrupted publish: moved, but never marked
        assert not complete(target), f"{target} is complete and would be overwritten"
        shutil.rmtree(target)
    temporary.rename(target)
    _fsync(target.parent)
    write_text(
        target / MARKER, "".join(f"{line}\n" for line in _marks((target / MANIFEST).read_bytes()))
    )


def keep_from_others(umask: int) -> None:
    """Set the umask of this process, for what a recipe's stages write;
    `shared` brings back the one that it was started with.
    """
    before = os.umask(umask)
    _started_with.setdefault("umask", before)


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Inside the block files have the modes of the user's shell: caches, which several users may share."""
    before = os.umask(0o077)
    os.umask(_started_with.get("umask", before))
    try:
        yield
    finally:
        os.umask(before)


def _permit(folder: Path) -> None:
    """Give all of a folder the modes that this process's umask says:
    copied files have those of what they were copied from.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        mode = (0o777 if path.is_dir() else 0o666) & ~umask
        if path.stat().st_mode & 0o777 != mode:
            try:
                path.chmod(mode)
            except PermissionError:  # a file system whose modes are fixed
                warnings.warn(
                    f"{folder} keeps modes of its own, and who may read it is not what permissions says",
                    stacklevel=2,
                )
                return


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_revision() -> str | None:
    """Commit of the checkout that this package is, with '+changes' where it is dirty; None for an installed package."""
    root = Path(__file__).resolve().parent.parent

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)

    try:
        if run("ls-files", "--error-unmatch", str(Path(__file__).resolve())).returncode:
            return None  # also in an environment that lies inside somebody's own repository
        head = run("rev-parse", "HEAD")
        dirty = run("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except OSError:
        return None
    return head.stdout.strip() + ("+changes" if dirty else "") if head.returncode == 0 else None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
