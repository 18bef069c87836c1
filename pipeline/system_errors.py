"""Errors of the system (a full disk, a read-only or vanished folder) as one sentence that names the file.

    with writing(Path("runs/demo/.train-sft.tmp")):      # an error in it names a file, whatever library met it
        save_file(tensors, ...)

Only OSErrors of opening a file name it. Those of writing do not, and libraries in Rust (safetensors, tokenizers) raise an Exception with the
system's number in its text.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

_IN_RUST = re.compile(r"\(os error (\d+)\)")
_OTHER_FOLDER = ", or name another folder (output_dir in the recipe, or SAP_CACHE, HF_HOME, TMPDIR in the environment)"
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space there" + _OTHER_FOLDER),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "let this user read and write there" + _OTHER_FOLDER),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV), "bring it back if it was moved or unmounted" + _OTHER_FOLDER),
    errno.EIO: "see whether the disk or the network file system is sound",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    errno.ENOMEM: "free memory",
}
# What a wrong name or a missing right gives, at every try and on every machine that sees the same files.
BY_THE_INPUT = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EEXIST, errno.EINVAL)
)


def sentence(error: OSError) -> str:
    """What failed, the file where it is known, and what to do: one line, without a full stop."""
    if error.errno is None:  # a library's own: its first line says what
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    files = " -> ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike))
    said = f"{files}: {os.strerror(error.errno)}" if files else f"a file that is not named here: {error.strerror or os.strerror(error.errno)}"
    advice = "set TMPDIR to a folder that can be written" if "temporary directory" in said else _ADVICE.get(error.errno)
    return f"{said}: {advice}, and run the same command again; finished stages and checkpoints are kept" if advice else said


@contextlib.contextmanager
def reading_input() -> Iterator[None]:
    """Inside the block, before anything runs, a file that cannot be read by the input's fault is a ValueError of one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in BY_THE_INPUT or error.filename is None:
            raise
        said = f"{os.fsdecode(error.filename)}: {os.strerror(error.errno)}"
        raise ValueError(f"{said}: see whether the recipe names the right file, and let this user read it") from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside the block every error of the system becomes an OSError with a file's name: its own, or `path` where it has none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        found = _IN_RUST.search(str(error))
        if found is None:
            raise
        number = int(found.group(1))
        raise OSError(number, os.strerror(number), str(path)) from error
