"""What a local model is, by its files: the same wherever the folder stands, another where other weights are in it.

fingerprint(Path("/models/my-7b-chat"))      # {"config.json": [651, "9f0c..."], "model.safetensors": [...], ...}
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from pipeline import artifacts

# Configuration, index, tokenizer, chat template.
_DESCRIBING = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.*")
_SAMPLE = 1024  # bytes read of every tensor


def fingerprint(folder: Path) -> dict[str, list[int | str]]:
    """Size in bytes and sha256 (hex) of every file that makes up the model, by its name.

    What describes the model is read whole. Of *.safetensors the header and 1 KB from the middle of every tensor are
    read: names and sizes alone are the same for all models of an architecture, and all of a 70B model is 140 GB.
    """
    files: dict[str, list[int | str]] = {}
    for path in sorted({path for pattern in ("*.safetensors", *_DESCRIBING) for path in folder.glob(pattern)}):
        if path.is_file():
            digest = _sampled_digest(path) if path.suffix == ".safetensors" else artifacts.file_digest(path)
            files[path.name] = [path.stat().st_size, digest]
    return files


def _sampled_digest(path: Path) -> str:
    """sha256 of a safetensors file's header and of the middle of every tensor.

    A damaged file has one too: that it is damaged is for the check of the model to say.
    """
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        header = stream.read(min(length, path.stat().st_size))
        digest, start = hashlib.sha256(head + header), len(head) + len(header)
        for first, last in _spans(header):
            stream.seek(start + max(first, (first + last - _SAMPLE) // 2))
            digest.update(stream.read(min(_SAMPLE, last - first)))
    return digest.hexdigest()


def _spans(header: bytes) -> list[tuple[int, int]]:
    """First byte of every tensor and the one behind its last, from the header's end; none where the header is none."""
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        spans = [tuple(map(int, tensor["data_offsets"])) for tensor in tensors]
        return sorted((first, last) for first, last in spans if 0 <= first <= last)
    except (ValueError, TypeError, KeyError, AttributeError):
        return []
