"""The stage train: one cell, from the start model to its product."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline import artifacts
from pipeline.data.sets import read_rows
from pipeline.defences.making import make_callbacks, make_step
from pipeline.defences.saft.filter import kept
from pipeline.engines import engine as engines
from pipeline.engines.engine import Engine
from pipeline.model.weights import WeightFiles
from pipeline.recipe import recipe
from pipeline.recipe.recipe import Cell, Experiment
from pipeline.stages.layout import Layout
from pipeline.stages.on_ranks import (
    claimed_together,
    done_alone,
    inputs_of,
    open_start,
    publishing,
    told_to,
    verify_upstream,
    watched,
)
from pipeline.tracking.run import open_run
from pipeline.training.loop import Loop, Rows, TrainingData
from pipeline.training.product import save_product


def train(experiment: Experiment, cell: Cell) -> bool:
    """Fine-tune one cell; the product is a PEFT adapter, or a model folder.

    False when a stop was requested first (run it again to go on).
    """
    layout = Layout(experiment)
    target = layout.train(cell)
    if done_alone(target):
        return True
    verify_upstream(layout)
    read = layout.read_by(cell)
    for folder in read.values():
        artifacts.verify(folder)
    resolved, prepared = cell.recipe, layout.prepare()
    inputs = inputs_of(layout, *read.values())
    rows = read_rows(prepared, "task_train", kept(read["filter"]) if "filter" in read else None)
    if not claimed_together(target, resolved.train):
        return True
    engine, tokenizer = open_start(layout, cell, target)
    step = make_step(
        resolved,
        engine,
        _given_direction(read["direction"], engine) if "direction" in read else None,
    )
    data = TrainingData(
        rows, read_rows(prepared, "safety_pairs"), tokenizer.pad_token_id,
        resolved.safety_pairs.batch_size, resolved.safety_pairs.micro_batch_size, _validation_rows(prepared),
    )  # fmt: skip
    label = f"{cell.method} s{cell.seed}"
    with open_run(layout, f"{cell.method}-s{cell.seed}", target.name, engine.rank, cell) as run:
        # Its checkpoints are another run's where what it was made from has become another:
        # the start model, aligned again on a GPU.
        identity = artifacts.digest([target.name, inputs])
        work, basis = (
            layout.work(target),
            layout.basis(cell)
            | {"the start model's content": inputs.get("align", inputs["model"])},
        )
        callbacks = [
            *make_callbacks(resolved, engine),
            *told_to(label, step, run),
            watched(resolved.train, engine),
        ]
        loop = Loop(engine, step, data, resolved.train, cell.seed, work, identity, callbacks, basis)
        if not loop.run():
            run.stopped()
            return False
        with loop.counted_weights(), publishing(engine, layout, target, inputs) as folder:
            save_product(
                engine, resolved.train, layout.start_model(), resolved.model, folder, tokenizer
            )
            if engine.rank == 0:
                artifacts.write_json(folder / "recipe.json", recipe.dump(resolved))
    return True


def _validation_rows(prepared: Path) -> dict[str, Rows]:
    sets = {"task": "task_validation", "harmful": "harmful_validation"}
    return {
        name: read_rows(prepared, file)
        for name, file in sets.items()
        if (prepared / f"{file}.parquet").is_file()
    }


def _given_direction(folder: Path, engine: Engine) -> engines.ShardedVector:
    """The direction stage's product as the engine's shard."""
    if json.loads((folder / "summary.json").read_text())["weights_checksum"] != engine.checksum(
        engine.weights()
    ):
        raise ValueError(
            f"the direction in {folder} belongs to other initial weights: delete the folder and run its stage again"
        )
    return engine.shard(WeightFiles(folder, "direction"))
