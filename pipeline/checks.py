"""Everything that can be known to be wrong before any weight is read: what `sap` and the launch scripts look at first.

    checks.check(experiment, cell)                     # of a recipe, its data sources and its model's outline
    checks.check_upstream(experiment, "train", cell)   # of the stages before
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from pipeline import artifacts
from pipeline.data.batches import check_divides
from pipeline.filtering.embeddings import resolve_layer
from pipeline.filtering.filter import NO_LABELS, check_not_refused
from pipeline.layout import Layout
from pipeline.models import check_targets, decoder_layers, load_tokenizer, outline, resolve_dtype
from pipeline.quantization import check_quantisable
from pipeline.recipe import Cell, Experiment, Recipe
from pipeline.sap.probe import resolve_layers
from pipeline.sections import TrainSection
from pipeline.sharding.launch import check_engine, environment
from pipeline.system_errors import reading_input


@reading_input()
def check(experiment: Experiment, here: Cell | Literal["align"] | None = None) -> None:
    """Everything that can be known to be wrong before any weight is read. Raises ValueError, one sentence.

    here: what this process runs, under its launcher's world size: checked are the model, the data and that. Without it, every cell of the
    recipe on the ranks that it names; methods left out by `sap --methods` must not stop the others.
    """
    from pipeline.data.prepare import check_sources

    base = experiment.base
    artifacts.check_writable(base.output_dir / base.name, "output_dir")
    check_sources(base)
    load_tokenizer(base.model)
    model = outline(base.model)
    layers = len(decoder_layers(model))
    world_size = environment()[1]
    if base.align.enabled:
        check_training("align.train", base.align.train, base, model, world_size if here == "align" else base.align.train.ranks)
    if here is None:
        cells = list(experiment.cells())
    else:
        cells = [] if here == "align" else [here]
    for cell in cells:
        ranks = cell.recipe.train.ranks if here is None else world_size
        check_training("train", cell.recipe.train, base, model, ranks)
        sap = cell.recipe.sap
        if sap.enabled:
            resolve_layers(sap.layers, layers)
        if cell.recipe.saft.enabled:
            resolve_layer(cell.recipe.saft.layer, layers)
            mixed, mapped = base.data.harmful_fraction > 0, "harmful" in base.data.task.columns
            if cell.recipe.saft.contamination is None and not (mixed or mapped):
                raise ValueError(NO_LABELS)
        if cell.recipe.draws_pairs:
            check_divides("sap.safety", sap.safety_batch_size, sap.safety_micro_batch_size, ranks)


def check_upstream(experiment: Experiment, stage: Literal["align", "filter", "direction", "train"], cell: Cell | None = None) -> None:
    """ValueError where a folder that the stage reads is not complete (its files are verified when they are read)."""
    layout = Layout(experiment)
    artifacts.require(layout.prepare())
    if experiment.base.align.enabled and stage != "align":
        artifacts.require(layout.align())
    if stage == "train" and cell is not None:
        if direction_given(cell):
            artifacts.require(layout.direction(cell))
        if layout.needs_filter(cell):
            artifacts.require(layout.filter(cell))
            check_not_refused(layout.filter(cell))


def direction_given(cell: Cell) -> bool:
    """Whether training starts from the direction stage's product."""
    return cell.recipe.sap.enabled and cell.recipe.sap.direction == "precomputed"


def check_training(field: str, train: TrainSection, base: Recipe, model: nn.Module, ranks: int) -> None:
    """ValueError where a training section does not go with the model (its outline), its quantization or the number of ranks."""
    check_engine(train, ranks)
    check_divides(field, train.batch_size, train.micro_batch_size, ranks)
    if base.model.quantization == "nf4":
        if train.adapter == "full":
            raise ValueError(f"{field}.adapter full cannot train weights in 4 bits: set model.quantization to none, or {field}.adapter to lora")
        check_quantisable(model, base.model.path)
    if train.adapter == "lora":
        check_targets(model, train.lora, field)
    elif train.engine == "single" and resolve_dtype(base.model.dtype) != torch.float32:
        raise ValueError(
            f"{field}.adapter full with engine single has no float32 master for {resolve_dtype(base.model.dtype)} weights: "
            "set model.dtype to float32, or use engine zero3 or fsdp2"
        )
