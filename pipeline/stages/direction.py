"""The stage direction: the safety direction at the initial weights."""

from __future__ import annotations

from dataclasses import replace

from pipeline import artifacts
from pipeline.data.sets import read_rows
from pipeline.defences.sap import SAP
from pipeline.defences.sap.diagnostics import safety_direction
from pipeline.objectives.batches import micro_batches, pair_batches
from pipeline.recipe.recipe import Cell, Experiment
from pipeline.stages.layout import Layout
from pipeline.stages.on_ranks import (
    claimed_together,
    done_alone,
    inputs_of,
    open_start,
    publishing,
    say,
    verify_upstream,
)
from pipeline.tracking.run import open_run
from pipeline.training.product import save_gathered

_USEFUL_FOR_SUMMARY = 24  # samples behind the direction's cosine with the useful gradient


def direction(experiment: Experiment, cell: Cell) -> bool:
    """g_s over all contrastive pairs at the initial weights, and its per-layer summary;
    with the initial adapter, where one is trained.
    """
    layout = Layout(experiment)
    target = layout.direction(cell)
    if done_alone(target):
        return True
    verify_upstream(layout)
    resolved = cell.recipe
    if not claimed_together(target, resolved.train):
        return True
    engine, tokenizer = open_start(layout, cell, target)
    pairs, useful = (
        read_rows(layout.prepare(), "safety_pairs"),
        read_rows(layout.prepare(), "task_train")[:_USEFUL_FOR_SUMMARY],
    )
    sharing = (engine.rank, engine.world_size, tokenizer.pad_token_id, cell.seed, 0)
    size = resolved.direction.micro_batch_size
    # Halves of the pairs, not of this rank's batches: they must not depend on the number of ranks.
    halves = [
        pair_batches(pairs, list(range(start, len(pairs), 2)), size, *sharing) for start in (0, 1)
    ]
    first, second = ([replace(batch, global_pairs=len(pairs)) for batch in half] for half in halves)
    rows, cut = list(range(len(useful))), resolved.train
    most = -(-cut.batch_size // engine.world_size)
    how = (cut.tokens_per_micro_batch, most, cut.packing)
    useful_batches = micro_batches(useful, rows, cut.micro_batch_size, *sharing, *how)
    with open_run(layout, f"direction-s{cell.seed}", target.name, engine.rank) as run:
        say(engine, f"[direction s{cell.seed}] {len(pairs)} pairs, {len(useful)} task samples")
        vector, summary = safety_direction(
            engine, (first, second), useful_batches, SAP.of(resolved).contrastive
        )
        summary["weights_checksum"] = engine.checksum(engine.weights())
        vectors = {"direction": vector} | (
            {"adapter": engine.weights()} if resolved.train.adapter == "lora" else {}
        )
        with publishing(engine, layout, target, inputs_of(layout)) as folder:
            for name, shard in vectors.items():
                save_gathered(engine, engine.gathered(shard), folder, name)
            if engine.rank == 0:
                artifacts.write_json(folder / "summary.json", summary)
        run.log_facts(
            {
                key: value
                for key, value in summary.items()
                if key not in ("layers", "weights_checksum")
            }
        )
    return True
