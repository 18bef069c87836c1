"""What the doctor examines: a cell's model on the recipe's engine, with one step's batches.

    case = open_case(experiment, choose_cell(experiment, method=None, seed=None))

Nothing has to be prepared: without the align stage's model it is the recipe's own,
without prepared data random tokens. Nothing is written.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pipeline import artifacts
from pipeline.data.sets import read_rows
from pipeline.defences.sap import SAP
from pipeline.defences.sap.probe import Probe
from pipeline.defences.sap.section import SapSection
from pipeline.engines.engine import Engine
from pipeline.engines.open import init_distributed
from pipeline.model.model_checks import check_model
from pipeline.model.model_files import resolve_model_path
from pipeline.model.model_outline import outlined
from pipeline.model.models import decoder_layers, load_tokenizer, resolve_dtype
from pipeline.objectives.batches import (
    BatchOrder,
    MicroBatch,
    PairBatch,
    micro_batches,
    pair_batches,
)
from pipeline.objectives.losses import useful_loss
from pipeline.recipe.layer_choice import probed_layers
from pipeline.recipe.recipe import Cell, Experiment
from pipeline.running import devices
from pipeline.running.devices import environment
from pipeline.stages import checks
from pipeline.stages.layout import Layout
from pipeline.stages.on_ranks import start_engine

_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)

# ordinary steps first: a fresh LoRA's B is 0, and stale gathered copies only appear on a warm engine
WARM_UP = 3
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """Engine, probe and this rank's batches of one step. facts: for the report's head."""

    engine: Engine
    probe: Probe
    sap: SapSection
    useful: list[MicroBatch]
    pairs: list[PairBatch]
    facts: dict[str, str]


def choose_cell(experiment: Experiment, method: str | None, seed: int | None) -> Cell:
    """The cell meant: without a choice the first method that uses SAP, and the first seed."""
    seed = experiment.base.seeds[0] if seed is None else seed
    if method is not None:
        return experiment.cell(method, seed)
    cells = [experiment.cell(name, seed) for name in experiment.base.methods]
    chosen = next((cell for cell in cells if SAP.of(cell.recipe).enabled), None)
    if chosen is None:
        raise ValueError(
            f"no method of {experiment.path} uses SAP ({', '.join(experiment.base.methods)}): set "
            "sap.enabled in one, or name one with --method"
        )
    return chosen


def open_case(experiment: Experiment, cell: Cell) -> Case:
    """Load, shard and warm up. Raises ValueError for bad input; entered by all ranks together."""
    _check(experiment, cell)
    base, train, sap = experiment.base, cell.recipe.train, SAP.of(cell.recipe)
    init_distributed(train)
    layout, tokenizer = Layout(experiment), load_tokenizer(base.model)
    aligned = base.align.enabled and artifacts.complete(layout.align())
    source = layout.start_model() if aligned else resolve_model_path(base.model)
    dtype = resolve_dtype(base.model.dtype)
    engine = start_engine(base, source, train, cell.seed, cell.recipe)
    silenced = _silence_dropout(engine.module)
    layers = decoder_layers(engine.module)
    configured: Any = engine.module.config
    config = configured.get_text_config()
    probed = probed_layers(sap.layers, len(layers))
    probe = Probe(layers, probed, config.hidden_size)
    rows, pair_rows, data = _rows(layout, cell, config.vocab_size)

    order = BatchOrder(len(rows), train.batch_size, cell.seed)
    sharing = (engine.rank, engine.world_size, tokenizer.pad_token_id, cell.seed)
    steps = [
        micro_batches(
            rows, order.step(number), train.micro_batch_size, *sharing, number, train.tokens_per_micro_batch,
            packing=train.packing,
        )
        for number in range(WARM_UP + 1)
    ]  # fmt: skip
    drawn = cell.recipe.safety_pairs
    chosen = BatchOrder(len(pair_rows), drawn.batch_size, cell.seed).step(0)
    pairs = pair_batches(pair_rows, chosen, drawn.micro_batch_size, *sharing, 0)
    for useful in steps[:WARM_UP]:
        engine.forward_backward(useful_loss, useful)
        engine.step(train.lr)
    unaligned = (
        " (the recipe's own: align is not complete)" if base.align.enabled and not aligned else ""
    )
    facts = {
        "recipe": f"{experiment.path}, method {cell.method}, seed {cell.seed}"
        + ("" if sap.enabled else " (does not use SAP)"),
        "model": f"{source}{unaligned}, {str(dtype).removeprefix('torch.')}"
        + (", dropout set to 0" if silenced else ""),
        "engine": (
            f"{train.engine}, {engine.world_size} rank{'s' * (engine.world_size > 1)} on "
            f"{engine.device.type}, after {WARM_UP} steps at lr {train.lr:g}"
        ),
        "data": f"{data}; {_describe(steps[-1], pairs)}",
        "probe": f"{len(probed)} of {len(layers)} layers, {probed[0]} to {probed[-1]}; sap.eps {sap.eps:g}",
    }
    return Case(engine, probe, sap, steps[-1], pairs, facts)


def _check(experiment: Experiment, cell: Cell) -> None:
    """What can be known to be wrong before weights are read. Data sources are left alone: they may not be there yet."""
    train, sap, ranks = cell.recipe.train, SAP.of(cell.recipe), environment()[1]
    devices.check_attention(experiment.base.model)
    check_model(experiment.base)
    facts = outlined(experiment.base.model)
    checks.check_training("train", train, experiment.base, facts, ranks)
    probed_layers(sap.layers, len(facts.layers))


def _silence_dropout(module: nn.Module) -> bool:
    """Set every dropout to 0, as engine.loss has none: a difference of two losses is held against a gradient.

    True where there was one.
    """
    found = False
    for part in module.modules():
        name = "p" if isinstance(part, _DROPOUTS) else "attention_dropout"
        if isinstance(getattr(part, name, None), float) and getattr(part, name) > 0:
            setattr(part, name, 0.0)
            found = True
    return found


def _rows(layout: Layout, cell: Cell, vocabulary: int) -> tuple[Rows, Rows, str]:
    """Task rows, pairs and where they are from; random tokens at full length where nothing is prepared."""
    prepared = layout.prepare()
    if artifacts.complete(prepared):
        artifacts.verify(prepared)
        return (
            read_rows(prepared, "task_train"),
            read_rows(prepared, "safety_pairs"),
            f"prepared in {_short(prepared)}",
        )
    data, rng = cell.recipe.data, random.Random(0)

    def row(length: int) -> dict[str, list[int]]:
        ids = [rng.randrange(vocabulary) for _ in range(length)]
        return {"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]}

    def pair() -> dict[str, list[int]]:
        sides = {side: row(data.safety_max_length) for side in ("chosen", "rejected")}
        return {
            f"{side}_{key}": value for side, found in sides.items() for key, value in found.items()
        }

    rows = [row(data.max_length) for _ in range(cell.recipe.train.batch_size)]
    return (
        rows,
        [pair() for _ in range(cell.recipe.safety_pairs.batch_size)],
        "random tokens at full length (nothing is prepared)",
    )


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _describe(useful: list[MicroBatch], pairs: list[PairBatch]) -> str:
    longest = [max(batch.input_ids.shape[1] for batch in batches) for batches in (useful, pairs)]
    return (
        f"{useful[0].global_tokens} supervised tokens (longest {longest[0]}), "
        f"{pairs[0].global_pairs} pairs (longest {longest[1]})"
    )
