"""An engine's state in a checkpoint: one safetensors file a rank, of which any number of ranks can read their parts.

    write(folder, rank, {"weight.model.norm.weight": part, ...})       # parts: flat, this rank's piece of the whole
    with RankFiles(folder) as files:
        files.read("weight.model.norm.weight", start, stop)

The files hold every tensor's pieces in the order of ranks: end to end they are the whole flat tensor, and behind it
padding, where the engine pads. torch.distributed.checkpoint would do the same and read a pickle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.system.system_errors import naming


def write(folder: Path, rank: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """This rank's file. tensors: flat pieces, and what is alike on all ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    # Clones: pieces may share storage, which safetensors refuses.
    state = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(state, folder / f"rank{rank:05d}.safetensors")


class RankFiles:
    """What the ranks of a checkpoint wrote. ValueError where there is no file of a rank."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("rank*.safetensors"))
        if not self.paths:
            raise ValueError(
                f"{folder} holds no file of a rank, so another version has written it: delete "
                f"{folder.parent.parent} to begin again"
            )

    def __enter__(self) -> RankFiles:
        self._open = contextlib.ExitStack()
        self.files = []
        for path in self.paths:
            with naming(path):
                self.files.append(self._open.enter_context(safe_open(path, framework="pt")))
        self.keys = list(self.files[0].keys())
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def alike(self, key: str) -> torch.Tensor:
        """A tensor that every rank has written as a whole."""
        return self.files[0].get_tensor(key)

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of the whole flat tensor; none where start is not below stop."""
        pieces = [file.get_slice(key) for file in self.files]
        ends = list(accumulate(piece.get_shape()[0] for piece in pieces))
        found = [
            piece[max(start - begin, 0) : min(stop, end) - begin]
            for piece, begin, end in zip(pieces, [0, *ends], ends, strict=False)
            if begin < min(stop, end) and max(start, begin) < min(stop, end)
        ]
        return torch.cat(found) if found else torch.empty(0)
