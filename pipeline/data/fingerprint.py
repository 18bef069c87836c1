"""What a local model is, by its files: the same wherever the folder stands,
another where a byte of what is read is another.

fingerprint(Path("/models/my-7b-chat"))      # {"config.json": [651, "9f0c..."], "model.safetensors": [...], ...}
"""

from __future__ import annotations

from pathlib import Path

from pipeline.data.digests import content_digests

# Weights, configuration, index, tokenizer, chat template.
_READ = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.*")


def fingerprint(folder: Path) -> dict[str, list[int | str]]:
    """Size in bytes and sha256 (hex) of every file that makes up the model, by its name."""
    paths = sorted({path for pattern in _READ for path in folder.glob(pattern) if path.is_file()})
    return {
        path.name: [path.stat().st_size, digest]
        for path, digest in zip(paths, content_digests(paths), strict=True)
    }
