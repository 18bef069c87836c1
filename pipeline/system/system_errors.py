"""Errors of the system (a full disk, a vanished folder, a broken weight file, the network) as one sentence.

    with naming(Path("runs/demo/.train-sft.tmp")):      # an error in it names a file, whatever library met it
        save_file(tensors, ...)
    found = behind(error)      # what of the system is behind an exception; None: a fault of ours, which is a traceback
    sentence(found)            # what failed, where, what to do, what is kept

entry.guarded is the one place that says it. Only OSErrors of opening a file name it; those of reading and writing do
not. Libraries in Rust (safetensors, tokenizers) raise an Exception with the system's number in its text, or
FileNotFoundError whatever the reason was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_IN_RUST = re.compile(r'\(os error (\d+)\)(?: at path "([^"]*)")?')
# of safetensors, also where the file is there and cannot be opened
_NOT_THERE = "No such file or directory: "
AGAIN = "run the same command again; finished stages and checkpoints are kept"
_OTHER_FOLDER = ", or name another folder (output_dir in the recipe, or SAP_CACHE, HF_HOME, TMPDIR in the environment)"
_GONE = "bring it back if it was moved or unmounted" + _OTHER_FOLDER
_UNSOUND = "see whether the disk or the network file system is sound"
_OF_CONNECTIONS = frozenset(
    (
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ETIMEDOUT,
        errno.EADDRINUSE,
        errno.EADDRNOTAVAIL,
    )
)
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space there" + _OTHER_FOLDER),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM),
        "let this user read and write there" + _OTHER_FOLDER,
    ),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV, errno.ENXIO), _GONE),
    # ENOTCONN: a file system in user space whose program has ended.
    **dict.fromkeys((errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT), _GONE),
    **dict.fromkeys((errno.EIO, errno.EREMOTEIO), _UNSOUND),
    **dict.fromkeys(
        (errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY), "move away what stands there" + _OTHER_FOLDER
    ),
    **dict.fromkeys((errno.EBUSY, errno.ETXTBSY), "see which other program uses it"),
    errno.ENAMETOOLONG: "give shorter names (name and methods in the recipe)" + _OTHER_FOLDER,
    errno.ELOOP: "mend the links that lead there",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    errno.EAGAIN: "raise the limit of processes (ulimit -u)",
    errno.ENOMEM: "free memory",
}
# What a wrong name or a missing right gives, at every try and on every machine that sees the same files.
BY_THE_INPUT = frozenset(
    (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EEXIST,
        errno.EINVAL,
    )
)
# What no program can be at fault for: it counts also where a library has put an exception of its own on top.
OF_THE_MACHINE = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EIO,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.EFBIG,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
    )
)


class BrokenFile(OSError):
    """A file of weights that is not whole: a disk's error, or of who copied it, and none of the system.

    Its text names it.
    """


def behind(error: BaseException | None) -> OSError | None:
    """What of the system is behind an exception; None for any other, as for a fault of ours.

    What it was raised from (`raise ... from`) counts where a machine does it to any program:
    a full disk, and not a file that is not there.
    """
    found, of_the_top = None, True
    while error is not None and found is None:
        own = _as_system(error)
        if own is not None and (of_the_top or own.errno in OF_THE_MACHINE):
            found = own
        error, of_the_top = error.__cause__, False
    return found


def passes(error: BaseException) -> OSError | None:
    """What is behind an error that says nothing of the input:
    it may pass, or not be there on another machine; else None.
    """
    found = behind(error)
    if found is None or isinstance(found, BrokenFile):
        return found
    return None if found.errno is None or found.errno in BY_THE_INPUT else found


def parts(error: OSError) -> tuple[str, int | None, str, str | None]:
    """What another process needs to raise the same (`from_parts`), as JSON: kind, number, text, file."""
    text = str(error) if error.errno is None else error.strerror or os.strerror(error.errno)
    kind = (
        "broken"
        if isinstance(error, BrokenFile)
        else "network"
        if error.errno is not None and _of_a_connection(error)
        else "other"
    )
    return kind, error.errno, text, None if error.filename is None else os.fsdecode(error.filename)


def from_parts(given: Sequence[Any]) -> OSError:
    """The error that `parts` took apart."""
    kind, number, text, file = given
    if kind == "broken":
        return BrokenFile(text)
    if kind == "network":  # SSL's numbers and those of names mean other things among files
        return socket.gaierror(number, text)
    return OSError(text) if number is None else OSError(number, text, file)


def sentence(error: OSError) -> str:
    """What failed, the file where it is known, and what to do: one line, without a full stop."""
    if error.errno is None:  # a library's own: its first line says what
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return f"{first}, and {AGAIN}" if isinstance(error, BrokenFile) else first
    if _of_a_connection(error):
        reason = error.strerror or os.strerror(error.errno)
        return (
            f"the network: {reason}: see whether this machine reaches the other side, and {AGAIN}"
        )
    names = (
        name
        for name in (error.filename, error.filename2)
        if isinstance(name, str | bytes | os.PathLike)
    )
    files = " -> ".join(map(os.fsdecode, names))
    if error.errno == errno.ENOENT and not files and not _in_a_folder():
        return f"the working folder is gone: change to one that is there, and {AGAIN}"
    reason = os.strerror(error.errno)  # with a name behind it: libraries repeat theirs
    said = (
        f"{files}: {reason}"
        if files
        else f"a file that is not named here: {error.strerror or reason}"
    )
    advice = (
        "set TMPDIR to a folder that can be written"
        if "temporary directory" in said
        else _ADVICE.get(error.errno)
    )
    return f"{said}: {advice}, and {AGAIN}" if advice else said


def _of_a_connection(error: OSError) -> bool:
    """Whether it is the network's: SSL's numbers and those of names mean other things among files."""
    if isinstance(error, socket.gaierror) or type(error).__module__ == "ssl":
        return True
    return error.filename is None and error.errno in _OF_CONNECTIONS


def _in_a_folder() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def reading_input() -> Iterator[None]:
    """Inside the block, before anything runs, a file that cannot be read by the input's fault is a
    ValueError of one sentence.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in BY_THE_INPUT or error.filename is None:
            raise
        said = f"{os.fsdecode(error.filename)}: {os.strerror(error.errno)}"
        raise ValueError(
            f"{said}: see whether the recipe names the right file, and let this user read it"
        ) from None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside the block every error of the system has a file's name: its own, or `path` where it has none.

    path: the file, or a folder in which a file of weights that is not whole is looked for. Other exceptions pass.
    """
    try:
        yield
    except Exception as error:
        found = _as_system(error)
        if found is None:
            raise
        if found is error:
            if found.errno is not None and found.filename is None:
                found.filename = str(path)
            raise
        if isinstance(found, BrokenFile):
            found = BrokenFile(_of_broken(_broken_in(path), error))
        elif not str(error).startswith(_NOT_THERE):
            found.filename = str(path)
        raise found from error


def _as_system(error: BaseException) -> OSError | None:
    """The exception itself where it is the system's, or what it says of it where a library has its own."""
    # a sentence of ours, which may quote a library; io.UnsupportedOperation, a fault of ours, is one
    if isinstance(error, ValueError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error
    in_rust = _IN_RUST.search(str(error))
    if in_rust is not None:
        number = int(in_rust.group(1))
        return OSError(number, os.strerror(number), in_rust.group(2))
    if isinstance(error, FileNotFoundError) and str(error).startswith(_NOT_THERE):
        return _why_not_there(str(error).removeprefix(_NOT_THERE))
    if isinstance(error, OSError):
        return error
    safetensors = sys.modules.get("safetensors")  # not imported for this: what raises it has
    broken = safetensors is not None and isinstance(error, safetensors.SafetensorError)
    return BrokenFile(_of_broken(None, error)) if broken else None


def _why_not_there(path: str) -> OSError:
    """The system's own word on a file of which a library says no more than that it could not open it."""
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        return error
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _of_broken(path: Path | None, error: BaseException) -> str:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    file = path or "a safetensors file that is not named here"
    return f"{file} is not a complete weight file ({reason}): copy or download it again"


def _broken_in(path: Path) -> Path:
    """The first file of weights below a folder that cannot be opened; `path` where it is a file, or all can."""
    from safetensors import safe_open

    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else ():
        try:
            with safe_open(file, framework="np"):
                pass
        except Exception:  # whatever it is, it is this file's
            return file
    return path
