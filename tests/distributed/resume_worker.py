"""What some ranks do for tests/distributed/test_resume.py: train, save,
and go on at this or another number of ranks.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.engines.engine import Engine
from pipeline.engines.open import init_distributed, open_engine
from pipeline.model.models import add_lora
from pipeline.recipe.sections import LoraSection
from pipeline.training import checkpoint
from tests.distributed.worker import LR, make_step, train_section
from tests.tiny import StepBatches, tiny_model

SAVED, STEPS, BATCH = 3, 6, 12
CASES = [
    (engine, adapter, schedule)
    for engine in ("zero3", "fsdp2")
    for adapter, schedule in (("lora", "exact"), ("lora", "lagged"), ("full", "exact"))
]


def name_of(case: tuple[str, str, str]) -> str:
    return "-".join(case)


def open_case(folder: Path, engine: str, adapter: str) -> Engine:
    """Without dropout: its masks belong to micro-batches, and three ranks share the four pairs in other ones."""
    section = train_section(folder, engine, 0).model_copy(update={"batch_size": BATCH})
    model = tiny_model()
    return open_engine(
        add_lora(model, LoraSection(r=3, alpha=6), seed=0) if adapter == "lora" else model, section
    )


def go_on(engine: Engine, schedule: str, root: Path, save: bool) -> dict:
    """From the newest checkpoint to the last step; with `save`, a checkpoint on the way."""
    step, batches = (
        make_step(engine, schedule),
        StepBatches(engine.rank, engine.world_size, batch_size=BATCH),
    )
    done = checkpoint.load_latest(engine, step, root, "same")
    ages = []
    for number in range(done, STEPS):
        if save and number == SAVED:
            checkpoint.save(engine, step, root, number, "same")
        metrics = step(batches.useful(number), lambda n=number: batches.pairs(n), number)
        ages.append(metrics["sap/direction_age"])
        engine.step(LR)
    return {"done": done, "ages": ages, "weights": engine.gather(engine.weights())}


def main(rank: int, folder: Path, world_size: int, save: bool) -> None:
    """What one rank does (tests.distributed.ranks)."""
    init_distributed(train_section(folder, "zero3", 0))
    results = {}
    for case in CASES:
        engine, adapter, schedule = case
        root = folder / name_of(case)
        if save:
            results[f"{name_of(case)}-straight"] = go_on(
                open_case(folder, engine, adapter), schedule, root, save=True
            )
        results[name_of(case)] = go_on(
            open_case(folder, engine, adapter), schedule, root, save=False
        )
    if rank == 0:
        torch.save(results, folder / f"found-{world_size}{'-save' if save else ''}.pt")
