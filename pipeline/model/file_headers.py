"""Files of a model folder, as far as they can be read at once: JSON whole, safetensors by their header. No torch.

    safetensors_header("model.path models/llama", Path("models/llama/model.safetensors"))       # name -> Tensor

label: how messages name the model. Every ValueError is one sentence that begins with it.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.system.system_errors import naming

_LFS = b"version https://git-lfs"
_DTYPES = {
    1: ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"),
    2: ("I16", "U16", "F16", "BF16"),
    4: ("I32", "U32", "F32"),
    8: ("I64", "U64", "F64"),
}
_BYTES = {dtype: width for width, dtypes in _DTYPES.items() for dtype in dtypes}


class Tensor(NamedTuple):
    """A tensor of a safetensors file: dtype as it is named there (BF16), shape, file name,
    and its bytes start..stop.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int


def safetensors_header(label: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, after its length was held against what its header says."""
    check_whole(label, path)
    size = path.stat().st_size
    broken = f"{label}: {path.name} is not a safetensors file (its header cannot be read): copy or download it again"
    with naming(path), path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= 100 * 10**6:  # what the format allows
            raise ValueError(broken)
        text = stream.read(length)
    if len(text) < length:
        raise ValueError(
            f"{label}: {path.name} is cut short, within its header: copy or download it again"
        )
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        found = {name: _tensor(entry, path.name, 8 + length) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(broken) from None
    end = max((tensor.stop for tensor in found.values()), default=8 + length)
    if size != end:
        what = "cut short" if size < end else "too long"
        raise ValueError(
            f"{label}: {path.name} is {what} ({size:,} bytes, its header says {end:,}): copy or download it again"
        )
    return found


def _tensor(entry: dict[str, Any], file: str, offset: int) -> Tensor:
    shape, (start, stop) = tuple(map(int, entry["shape"])), entry["data_offsets"]
    # None: a dtype newer than this table, or one of parts of bytes
    width = _BYTES.get(entry["dtype"])
    if not 0 <= start <= stop or (width and math.prod(shape) * width != stop - start):
        raise ValueError
    return Tensor(entry["dtype"], shape, file, offset + start, offset + stop)


def check_whole(label: str, path: Path) -> None:
    """ValueError for a file that is empty, or Git's stand-in for one."""
    if not path.is_file():
        return
    with naming(path), path.open("rb") as stream:
        start = stream.read(len(_LFS))
    if not start:
        raise ValueError(f"{label}: {path.name} is empty: copy or download it again")
    if start == _LFS:
        raise ValueError(
            f"{label}: {path.name} is a Git LFS pointer, not the file itself: run `git lfs pull` where it comes from"
        )


def json_object(label: str, path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    check_whole(label, path)
    try:
        with naming(path):
            value = json.loads(path.read_bytes())
    except ValueError as error:  # also bytes that are not valid UTF-8
        where = (
            f"line {error.lineno}: {error.msg}"
            if isinstance(error, json.JSONDecodeError)
            else "it is not UTF-8 text"
        )
        raise ValueError(
            f"{label}: {path.name} is not valid JSON ({where}): copy or download it again"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{label}: {path.name} does not hold a JSON object: copy or download it again"
        )
    return value
