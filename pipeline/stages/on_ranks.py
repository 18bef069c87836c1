"""What the stages on ranks share: who makes a folder, the engine that a cell starts from,
and how a folder is published together.

A stage's function returns True when its folder is complete afterwards. Present and complete: it returns at once
(docs/stages.md says what a change of the recipe runs again). Interrupted: nothing half-written is ever read. Upstream
folders are verified by manifest. These functions are entered by all ranks together.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifacts
from pipeline.defences.callback import Callback
from pipeline.defences.step import Step
from pipeline.engines.engine import Engine
from pipeline.engines.exchange import from_first
from pipeline.engines.open import init_distributed, largest_of_ranks, open_engine
from pipeline.model.loading import open_model
from pipeline.model.models import load_tokenizer, make_trainable
from pipeline.recipe.recipe import Cell, Recipe
from pipeline.recipe.sections import TrainSection
from pipeline.running import lean_imports
from pipeline.running.devices import environment
from pipeline.stages.capacity import fitted_layers
from pipeline.stages.layout import Layout
from pipeline.system.system_errors import naming
from pipeline.tracking.run import Run
from pipeline.training.callbacks import Console, Tracked, Watched
from pipeline.training.checkpoint import ORIGIN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def inputs_of(layout: Layout, *folders: Path) -> dict[str, Any]:
    """What a training stage records of what it was made from: the prepared data, the start model, and these folders."""
    read = [layout.prepare(), *([layout.align()] if layout.base.align.enabled else []), *folders]
    return {folder.name.split("-")[0]: artifacts.source(folder) for folder in read} | {
        "model": layout.model_digest
    }


def verify_upstream(layout: Layout) -> None:
    """ValueError where the data, or the aligned model where there is one, is not what was published."""
    artifacts.verify(layout.prepare())
    if layout.base.align.enabled:
        artifacts.verify(layout.align())


def done_alone(target: Path) -> bool:
    """Whether a process alone finds it complete.

    Ranks decide together (`claimed_together`): on two nodes a shared folder may look different for a while.
    """
    return environment()[1] == 1 and artifacts.complete(target)


def claimed_together(target: Path, train_section: TrainSection) -> bool:
    """Let the ranks meet, and hold `target` until this process ends.

    False where it is complete by now: another run was faster.

    All ranks raise Busy where another run holds it.
    """
    init_distributed(train_section)
    found: str | bool = True
    if environment()[0] == 0:
        try:
            release = artifacts.claim_incomplete(target)
            found = release is not None
            if release is not None:
                atexit.register(release)
        except artifacts.Busy as error:
            found = str(error)
    found = from_first(found)
    if isinstance(found, str):
        raise artifacts.Busy(found)
    return found


def open_start(layout: Layout, cell: Cell, target: Path) -> tuple[Engine, PreTrainedTokenizerBase]:
    """Engine and tokenizer of a cell at its start: the same weights (and fresh adapter) for every method of a seed."""
    base, train_section = layout.base, cell.recipe.train
    tokenizer = load_tokenizer(base.model)
    if target != layout.train(cell):
        # Other passes than the training's, which are what is planned: their pairs may be longer, or more.
        safe = {"gradient_checkpointing": True, "keep_gathered": False}
        update = {key: value for key, value in safe.items() if vars(train_section)[key] == "auto"}
        train_section = train_section.model_copy(update=update)
    return start_engine(
        base, layout.start_model(), train_section, cell.seed, cell.recipe
    ), tokenizer


def start_engine(
    base: Recipe,
    location: str,
    train_section: TrainSection,
    seed: int,
    of_cell: Recipe | None = None,
) -> Engine:
    """The engine of a training that starts from the model at `location`; adapter and dropout are drawn from `seed`.

    of_cell: whose memory is planned; None for the alignment's. Entered by all ranks together.
    """
    if train_section.adapter == "lora":
        lean_imports.import_peft()  # what it lacks is said before weights are read
    again, kept = fitted_layers(base, train_section, of_cell, environment()[1])
    again = None if again is None else largest_of_ranks(again)
    kept = None if kept is None else -largest_of_ranks(-kept)  # what the smallest of them holds
    if again is not None:
        _say(f"{again} decoder layers recompute their activations (gradient_checkpointing auto)")
    if kept is not None:
        _say(f"{kept} decoder layers stay gathered (keep_gathered auto)")
    model, sources = open_model(base.model, location, sharded=train_section.engine != "single")
    return open_engine(
        make_trainable(model, train_section, seed, again), train_section, sources, kept
    )


def _say(sentence: str) -> None:
    if environment()[0] == 0:
        print(sentence, file=sys.stderr, flush=True)


def told_to(label: str, step: Step, run: Run) -> list[Callback]:
    """The callbacks that say and log how a training goes."""
    return [Console(label, step.summary_keys), Tracked(run)]


def watched(train_section: TrainSection, engine: Engine) -> Callback:
    """The callback that ends a training which hangs (train.watchdog_seconds)."""
    return Watched(train_section.watchdog_seconds, engine.rank)


@contextlib.contextmanager
def publishing(
    engine: Engine, layout: Layout, target: Path, inputs: dict[str, Any]
) -> Iterator[Path]:
    """artifacts.building for a stage of several ranks: all enter and leave together,
    rank 0 publishes and clears the work folder.
    """
    folder, work = target.with_name(f".{target.name}.tmp"), layout.work(target)
    try:
        with naming(target):
            if engine.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            engine.barrier()
            yield folder
            engine.barrier()
            if engine.rank == 0:
                if (work / "metrics.jsonl").is_file():
                    shutil.copy(work / "metrics.jsonl", folder)
                origin = work / ORIGIN
                started = (
                    {"resume_from": json.loads(origin.read_text())} if origin.is_file() else {}
                )
                artifacts.publish(folder, target, inputs | started, world_size=engine.world_size)
                shutil.rmtree(work, ignore_errors=True)
            engine.barrier()
    except OSError:
        # gigabytes, perhaps on a full disk; after any other error the next attempt removes it
        if engine.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def say(engine: Engine, text: str) -> None:
    """Print a line to stderr, on the first rank alone."""
    if engine.rank == 0:
        print(text, file=sys.stderr, flush=True)
