"""The stage filter: which training samples SAFT leaves out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline import artifacts
from pipeline.data.sets import read_rows
from pipeline.defences.saft import SAFT
from pipeline.defences.saft.embeddings import embed
from pipeline.defences.saft.filter import check_labels, decide, highest_scored
from pipeline.defences.saft.filter import write as write_decision
from pipeline.model.models import decoder_layers
from pipeline.recipe.layer_choice import read_layer
from pipeline.recipe.recipe import Cell, Experiment
from pipeline.running.devices import environment
from pipeline.stages.layout import Layout
from pipeline.stages.on_ranks import (
    claimed_together,
    done_alone,
    inputs_of,
    open_start,
    publishing,
    verify_upstream,
)
from pipeline.system.system_errors import naming
from pipeline.tracking.run import open_run


def filter_data(experiment: Experiment, cell: Cell) -> bool:
    """SAFT: which training samples to leave out, by the start model's hidden states.

    Where it refuses, it says so; training on it is an error.
    """
    layout, saft = Layout(experiment), SAFT.of(cell.recipe)
    target = layout.filter(cell)
    if done_alone(target):
        return True
    verify_upstream(layout)
    rows = read_rows(layout.prepare(), "task_train")
    check_labels(rows, saft)
    embeddings = _embeddings(layout, cell, rows)
    if environment()[0] == 0 and (claimed := artifacts.claim_incomplete(target)):
        decision = decide(rows, embeddings, saft, experiment.base.data.seed)
        with open_run(layout, "filter", target.name) as run:
            inputs = {
                "prepare": artifacts.source(layout.prepare()),
                "embeddings": artifacts.source(layout.embeddings(cell)),
            }
            with artifacts.building(target, inputs, claimed) as folder:
                write_decision(decision, rows, folder)
            run.log_facts(decision.facts)
            run.log_artifact(target / "scores.png")
        for sentence in decision.warnings:
            print(
                f"warning: {sentence} (every score is in {target}, with a picture)",
                file=sys.stderr,
                flush=True,
            )
        for line in highest_scored(decision):
            print(line, file=sys.stderr, flush=True)
    return True


def _embeddings(layout: Layout, cell: Cell, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
    """The rows' embeddings (N, D), from their folder, or computed into it."""
    target, saft = layout.embeddings(cell), SAFT.of(cell.recipe)
    if claimed_together(target, cell.recipe.train):
        engine, tokenizer = open_start(layout, cell, target)
        layer = read_layer(saft.layer, len(decoder_layers(engine.module)))
        found = embed(
            engine, rows, layer, saft.position, saft.micro_batch_size, tokenizer.pad_token_id
        )
        with publishing(engine, layout, target, inputs_of(layout)) as folder:
            if engine.rank == 0:
                save_file({"embeddings": found}, folder / "embeddings.safetensors")
    else:
        artifacts.verify(target)
    with naming(target):
        return load_file(target / "embeddings.safetensors")["embeddings"]
