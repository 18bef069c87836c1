"""Checkpoints of a run: complete, verified, the last two kept.

A checkpoint is a published artefact folder (manifest, sha256 of every file, marker last) holding the engine's state
with the step's sharded vectors (the direction), the step's other state (V, its scale, ages), the position, and the
run's metrics so far. Nothing in it depends on the number of ranks, so another number can go on. `load_latest` skips a
damaged one with a warning and takes the one before it. What is not finite is neither written nor read: a run would go
on from it for ever.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from pipeline import artifacts
from pipeline.engines.engine import Engine, ShardedVector
from pipeline.engines.exchange import from_first, leaving_together
from pipeline.system.system_errors import naming
from pipeline.training.checkpoint_folders import checkpoints, start_checkpoint

_KEEP = 2
# in a work folder: the checkpoint of another run that this one started from, and its digest
ORIGIN = "started_from.json"


class Stateful(Protocol):
    """What carries tensors from step to step: some the same on every rank,
    some sharded as the engine shards its weights.
    """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What it carries, the same on every rank."""

    def vectors(self) -> dict[str, ShardedVector]:
        """What it carries of the trained weights' size, this rank's shard of it."""

    def load_state_dict(
        self, state: dict[str, torch.Tensor], vectors: dict[str, ShardedVector]
    ) -> None:
        """Take back what `state_dict` and `vectors` gave."""


class Carried:
    """A step and the callbacks of its training as one Stateful; a callback's names get its class's in front."""

    def __init__(self, step: Stateful, callbacks: Sequence[Stateful]):
        self.parts = {"": step} | {
            f"{type(callback).__name__}.": callback for callback in callbacks
        }
        assert len(self.parts) == 1 + len(callbacks), "two callbacks of one class"

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All parts' state under their names."""
        return {
            prefix + key: value
            for prefix, part in self.parts.items()
            for key, value in part.state_dict().items()
        }

    def vectors(self) -> dict[str, ShardedVector]:
        """All parts' vectors under their names."""
        return {
            prefix + key: value
            for prefix, part in self.parts.items()
            for key, value in part.vectors().items()
        }

    def load_state_dict(
        self, state: dict[str, torch.Tensor], vectors: dict[str, ShardedVector]
    ) -> None:
        """Give every part back its own."""
        for prefix, part in self.parts.items():
            part.load_state_dict(self._of(prefix, state), self._of(prefix, vectors))

    def _of(self, prefix: str, values: dict[str, Any]) -> dict[str, Any]:
        # the step's names have nothing in front
        others = tuple(other for other in self.parts if other and not prefix)
        return {
            key.removeprefix(prefix): value
            for key, value in values.items()
            if key.startswith(prefix) and not key.startswith(others)
        }


def save(
    engine: Engine, step: Stateful, root: Path, number: int, identity: str, metrics: Path | None = None,
    basis: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write the state after `number` steps.

    identity: digest of what the run is; a checkpoint of another run is refused.

    metrics: the file that grows with the run, of which a copy is kept. basis: what a run must have in common with this
    one to start from here (`start_from`), by the recipe's fields, as JSON. ValueError where the state is not finite.
    """
    target, temporary = root / f"step-{number:06d}", root / f".step-{number:06d}.tmp"
    what = _not_finite(engine, step)
    if what:
        before = checkpoints(root)
        kept = f"the last checkpoint is {before[-1]}" if before else "there is no checkpoint yet"
        raise ValueError(
            f"{what} after the update of step {number}: lower train.lr or check the data; {kept}"
        )
    with leaving_together(), naming(root):
        if engine.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    try:
        vectors = step.vectors()
        with leaving_together(), naming(root):
            engine.save(temporary / "engine", vectors)
        state = {
            "step": number, "world_size": engine.world_size, "identity": identity, "vectors": list(vectors),
            "basis": basis or {},
        }  # fmt: skip
        with leaving_together():
            if engine.rank == 0:
                _complete(step, state, temporary, metrics)
                # one that was damaged, and skipped: its steps ran again
                (target / artifacts.MARKER).unlink(missing_ok=True)
                artifacts.publish(temporary, target, {"identity": identity})
                for old in checkpoints(root)[:-_KEEP]:
                    shutil.rmtree(old)
    except OSError:
        if engine.rank == 0:  # gigabytes, perhaps on a full disk; no rank writes there any more
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _complete(step: Stateful, state: dict[str, Any], folder: Path, metrics: Path | None) -> None:
    """Add what is the same on every rank to the folder that holds the ranks' files."""
    with naming(folder.parent):
        carried = {
            key: value.detach().cpu().contiguous().clone()
            for key, value in step.state_dict().items()
        }
        save_file(carried, folder / "step.safetensors")
        artifacts.write_json(folder / "state.json", state)
        if metrics and metrics.is_file():
            shutil.copy(metrics, folder / metrics.name)


def load_latest(
    engine: Engine, step: Stateful, root: Path, identity: str, metrics: Path | None = None
) -> int:
    """Restore the newest sound checkpoint, of any world size; returns the number of steps done, 0 where there is none.

    metrics: the file of which `save` kept a copy; it becomes that copy.
    ValueError where the checkpoint is another run's, or not finite.
    """
    choice = from_first(_newest(root) if engine.rank == 0 else None)
    if choice is None:
        return 0
    folder, state = choice
    if state["identity"] != identity:
        raise ValueError(
            f"{folder} belongs to another run, or to this one on another start model or other "
            f"data: delete {root} to begin again"
        )
    return _load(engine, step, folder, state, metrics)


def start_from(
    engine: Engine, step: Stateful, given: Path, basis: dict[str, Any], steps: int, metrics: Path
) -> int:
    """Restore a checkpoint of another run, given as FOLDER@STEP; returns STEP.

    ValueError, on all ranks, where it does not go with this one.

    basis: what this run's own checkpoints fit on (`save`). steps: of this run. metrics: becomes the other run's, up to
    there; beside it is written what was started from.
    """
    folder = state = sentence = None
    with leaving_together():
        if engine.rank == 0:
            try:
                found = start_checkpoint(given, basis, steps)
            except ValueError as error:
                sentence = str(error)
            else:
                folder, state = str(found), json.loads((found / "state.json").read_text())
                if (found / metrics.name).is_file():
                    shutil.copy(found / metrics.name, metrics)
                artifacts.write_json(
                    metrics.with_name(ORIGIN),
                    {"checkpoint": given.name, "digest": artifacts.source(found)["content"]},
                )
    folder, state, sentence = from_first([folder, state, sentence])
    if sentence:
        raise ValueError(sentence)
    return _load(engine, step, folder, state, None)


def _load(
    engine: Engine, step: Stateful, folder: str, state: dict[str, Any], metrics: Path | None
) -> int:
    with leaving_together(), naming(Path(folder)):
        vectors = engine.load(Path(folder) / "engine", state["vectors"])
        step.load_state_dict(load_file(Path(folder) / "step.safetensors"), vectors)
    what = _not_finite(engine, step)
    if what:
        raise ValueError(
            f"{what} in {folder}: delete {Path(folder).parent} and lower train.lr, or check the data"
        )
    if metrics and engine.rank == 0:
        _restore(Path(folder) / metrics.name, metrics)
    return state["step"]


def _not_finite(engine: Engine, step: Stateful) -> str | None:
    """Half a sentence where a weight, or what the step carries, is not finite on some rank. A collective call."""

    def sound(tensors: Iterable[torch.Tensor]) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    carried = [
        *step.state_dict().values(),
        *(part for shard in step.vectors().values() for part in shard),
    ]
    if engine.any_rank(not sound(engine.weights())):
        return "the weights are not finite"
    return (
        "what the method carries from step to step is not finite"
        if engine.any_rank(not sound(carried))
        else None
    )


def _restore(copy: Path, metrics: Path) -> None:
    """What was written after the checkpoint will be written again; what was before must be what it was."""
    kept = copy.read_bytes() if copy.is_file() else b""
    found = metrics.read_bytes() if metrics.is_file() else b""
    if not found.startswith(kept):
        warnings.warn(
            f"{metrics} is not what it was at the checkpoint, whose copy is put in its place",
            stacklevel=2,
        )
    if found != kept:
        artifacts.write_text(metrics, kept.decode())


def _newest(root: Path) -> tuple[str, dict[str, Any]] | None:
    for folder in reversed(checkpoints(root)):
        found = artifacts.damage(folder)
        if not found:
            return str(folder), json.loads((folder / "state.json").read_text())
        warnings.warn(f"a checkpoint is damaged, the one before it is used: {found}", stacklevel=2)
    return None
