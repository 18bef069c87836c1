"""Checkpoints of a run: complete, verified, the last two kept.

A checkpoint is a published artefact folder (manifest, sha256 of every file, marker last) holding the engine's state, the step's state of every
rank (V and the direction's shard), and the position. `load_latest` skips a damaged one with a warning and takes the one before it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from pipeline import artifacts
from pipeline.sharding.engine import Engine

_KEEP = 2


class Stateful(Protocol):
    """A step that carries tensors from step to step."""

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


def save(engine: Engine, step: Stateful, root: Path, number: int, identity: str) -> None:
    """Write the state after `number` steps. identity: digest of what the run is; a checkpoint of another run is refused."""
    target, temporary = root / f"step-{number:06d}", root / f".step-{number:06d}.tmp"
    if engine.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    engine.barrier()
    engine.save(temporary / "engine")
    state = {key: value.detach().cpu().contiguous().clone() for key, value in step.state_dict().items()}
    save_file(state, temporary / f"step-rank{engine.rank}.safetensors")
    engine.barrier()
    if engine.rank == 0:
        artifacts.write_json(temporary / "state.json", {"step": number, "world_size": engine.world_size, "identity": identity})
        (target / artifacts.MARKER).unlink(missing_ok=True)  # one that was damaged, and skipped: its steps ran again
        artifacts.publish(temporary, target, {"identity": identity})
        for old in _folders(root)[:-_KEEP]:
            shutil.rmtree(old)
    engine.barrier()


def load_latest(engine: Engine, step: Stateful, root: Path, identity: str) -> int:
    """Restore the newest sound checkpoint; returns the number of steps done, 0 where there is none. ValueError at another world size."""
    choice: list[Any] = [_newest(root, engine.world_size, identity) if engine.rank == 0 else None]
    if engine.world_size > 1:
        dist.broadcast_object_list(choice)
    if choice[0] is None:
        return 0
    folder, number, problem = choice[0]
    if problem:
        raise ValueError(problem)
    engine.load(Path(folder) / "engine")
    step.load_state_dict(load_file(Path(folder) / f"step-rank{engine.rank}.safetensors"))
    return number


def _newest(root: Path, world_size: int, identity: str) -> tuple[str, int, str | None] | None:
    for folder in reversed(_folders(root)):
        found = artifacts.damage(folder)
        if found:
            warnings.warn(f"a checkpoint is damaged, the one before it is used: {found}", stacklevel=2)
            continue
        state = json.loads((folder / "state.json").read_text())
        problem = None
        if state["identity"] != identity:
            problem = f"{folder} belongs to another run: delete {root}"
        elif state["world_size"] != world_size:
            problem = f"{folder} was written by {state['world_size']} ranks and cannot be resumed with {world_size}: use {state['world_size']} again, or delete {root}"
        return str(folder), state["step"], problem
    return None


def _folders(root: Path) -> list[Path]:
    return sorted(folder for folder in root.glob("step-*") if artifacts.complete(folder))
