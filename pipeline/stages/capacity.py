"""Whether this machine has the memory and the disk that a recipe takes, by the planner's arithmetic. Needs no torch.

found = capacity(experiment, facts, cells)
found.line()        # "8.6 of 80.0 GB a GPU; 0.3 of 412 GB of disk"
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from pipeline import artifacts
from pipeline.defences import DEFENCES
from pipeline.model.model_facts import ModelFacts
from pipeline.model.model_outline import outlined
from pipeline.planner.planner import CUDA_ALLOWANCE, FITTED_SHARE, Plan, estimate_training
from pipeline.recipe.recipe import Cell, Experiment, Recipe
from pipeline.recipe.sections import TrainSection
from pipeline.running import devices
from pipeline.stages.layout import Layout

# bytes of a process that has imported torch, deepspeed, transformers and peft, on a CPU
_PROCESS = 0.6e9
# a CPU run is refused where it needs this many times the machine's memory: the planner's sums are GPUs'
_DOUBT = 1.5
_CHECKPOINTS = 2  # that a run keeps (pipeline/training/checkpoint.py)
_REMEDY = (
    "use more ranks (train.ranks), a smaller train.micro_batch_size (or train.tokens_per_micro_batch) "
    "or data.max_length, train.gradient_checkpointing, or model.quantization nf4 with train.adapter lora"
)


@dataclass(frozen=True)
class Capacity:
    """Bytes needed and there.

    memory: of one GPU, or of this machine without GPUs; None where the planner does not know the model.
    """

    memory: float | None
    memory_there: float
    on_gpus: bool
    disk: float
    disk_there: float
    notes: tuple[str, ...]

    def line(self) -> str:
        """Memory and disk that a stage needs, and what is there, as a sentence."""
        where = "a GPU" if self.on_gpus else "memory"
        need = (
            "memory not known"
            if self.memory is None
            else f"{self.memory / 1e9:.1f} of {self.memory_there / 1e9:.1f} GB {where}"
        )
        return f"needs about {need}, {self.disk / 1e9:.2f} of {self.disk_there / 1e9:.0f} GB disk"


def capacity(experiment: Experiment, facts: ModelFacts, cells: list[Cell]) -> Capacity:
    """What the trainings that are not complete take here.

    ValueError where they cannot fit, with the fields to change.
    """
    layout, base, gpus = Layout(experiment), experiment.base, devices.gpus()
    notes: list[str] = []
    memory: float | None = None
    plans: list[tuple[Plan, Cell | None]] = []
    for what, train, cell in _unfinished(layout, cells):
        try:
            plan = estimate_training(
                base,
                facts,
                train,
                None if cell is None else cell.recipe,
                devices.ranks(train),
                devices.dtype(base.model.dtype),
            )
        except ValueError as error:
            # a model that the planner does not know; all else was refused before
            notes.append(f"memory and disk are not planned: {error}")
            break
        plan = plan.fitted(_fillable(plan.ranks))
        if plan.recomputed is not None:
            notes.append(
                f"{what} recomputes {plan.recomputed} of {plan.model.layers} decoder layers "
                "(gradient_checkpointing auto)"
            )
        if plan.gathered is not None:
            notes.append(
                f"{what} keeps {plan.gathered} of {plan.model.layers} decoder layers gathered (keep_gathered auto)"
            )
        plans.append((plan, cell))
        needed = plan.total() if gpus else plan.ranks * (plan.total() - CUDA_ALLOWANCE + _PROCESS)
        memory = max(memory or 0.0, needed)
        note = devices.check_memory(needed, what, _REMEDY) if gpus else _check_host(needed, what)
        notes += [note] if note else []
    disk, free = _disk(facts, plans), artifacts.free_bytes(layout.root, "output_dir")
    if disk > free:
        raise ValueError(
            f"output_dir {base.output_dir} has {free / 1e9:.2f} GB free, and what is left to run "
            f"writes about {disk / 1e9:.2f} GB: free some space, or set output_dir to a folder on "
            "another disk"
        )
    there = min(gpu.total for gpu in gpus) if gpus else _host_memory()
    return Capacity(memory, there, bool(gpus), disk, free, tuple(dict.fromkeys(notes)))


def fitted_layers(
    base: Recipe, train: TrainSection, of_cell: Recipe | None, ranks: int
) -> tuple[int | None, int | None]:
    """Decoder layers that recompute their activations here, for train.gradient_checkpointing auto, and that stay
    gathered, for train.keep_gathered auto; None otherwise, and for a model that is not planned: all are recomputed
    then, and none is kept. of_cell: as `estimate_training`. Ranks with other GPUs may be told other numbers: they have
    to agree.
    """
    if "auto" not in (train.gradient_checkpointing, train.keep_gathered):
        return None, None
    try:
        plan = estimate_training(
            base, outlined(base.model), train, of_cell, ranks, devices.dtype(base.model.dtype)
        )
    except ValueError:
        return None, None
    plan = plan.fitted(_fillable(ranks))
    return plan.recomputed, plan.gathered


def _fillable(ranks: int) -> float:
    """Bytes that a plan's total may come to: in the smallest GPU here, or in the machine, which its processes share."""
    gpus = devices.gpus()
    if gpus:
        return FITTED_SHARE * min(gpu.total for gpu in gpus)
    # as `capacity` counts a process on a CPU
    return FITTED_SHARE * _host_memory() / ranks + CUDA_ALLOWANCE - _PROCESS


def _unfinished(
    layout: Layout, cells: list[Cell]
) -> Iterator[tuple[str, TrainSection, Cell | None]]:
    """(what, section, cell) of every training that is not complete; the alignment has no cell."""
    if layout.base.align.enabled and not artifacts.complete(layout.align()):
        yield "the alignment (align.train)", layout.base.align.train, None
    for cell in cells:
        if not artifacts.complete(layout.train(cell)):
            yield f"method {cell.method}", cell.recipe.train, cell


def _check_host(needed: float, what: str) -> str | None:
    """A sentence where the processes may not fit into this machine's memory; ValueError where they are far from it."""
    there = _host_memory()
    if needed > _DOUBT * there:
        raise ValueError(
            f"{what} needs about {needed / 1e9:.0f} GB by arithmetic (`sap plan`), and this "
            f"machine has {there / 1e9:.0f} GB and no GPU: use a machine with GPUs, a smaller "
            f"model (model.path), or {_REMEDY}"
        )
    return (
        f"{what} needs about {needed / 1e9:.1f} of this machine's {there / 1e9:.1f} GB: it may not fit"
        if needed > 0.9 * there
        else None
    )


def _disk(facts: ModelFacts, plans: list[tuple[Plan, Cell | None]]) -> float:
    """Bytes that the trainings write: every product, and the checkpoints of the one that keeps the
    most while it runs.
    """
    products, checkpoints = 0.0, 0.0
    weights = sum(prod(tensor.shape) for tensor in facts.tensors.values())
    for plan, cell in plans:
        trained = sum(weight.numel for weight in plan.model.weights if weight.trained)
        whole = cell is None or plan.train.adapter == "full" or plan.train.export_merged
        products += (plan.dtype_bytes * weights if whole else 0) + (
            4 * trained if plan.train.adapter == "lora" else 0
        )
        vectors = (
            0
            if cell is None
            else sum(len(DEFENCES[name].vectors_kept) for name in cell.recipe.parts)
        )
        # weights and AdamW's two moments, in float32
        checkpoints = max(checkpoints, _CHECKPOINTS * 4 * (3 + vectors) * trained)
    return products + checkpoints


def _host_memory() -> float:
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
