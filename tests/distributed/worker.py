"""What two ZeRO-3 ranks do for the tests; results go to the parent as one dictionary of rank 0's (and some rank-wise) findings."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from pipeline import artifacts
from pipeline.models import decoder_layers, enable_checkpointing
from pipeline.recipe import SapSection, TrainSection
from pipeline.sap.losses import safety_loss, useful_loss
from pipeline.sap.probe import Probe
from pipeline.sap.step import SapStep
from pipeline.sharding.engine import Engine
from pipeline.sharding.launch import init_distributed, open_engine
from pipeline.training.plain import PlainStep
from tests.tiny import HIDDEN, StepBatches, tiny_lora

LR, STEPS, WORLD = 1e-2, 5, 2
SAP = {
    "enabled": True,
    "probe_step": "rms",
    "beta": 0.02,
    "noise_every": 2,
    "correction_every": 2,
    "refresh_every": 2,
    "safety_micro_batch_size": 1,
}


def train_section(folder: Path, engine: str, persistence: int) -> TrainSection:
    path = folder / f"ds-{persistence}.json"
    zero = {
        "stage": 3, "overlap_comm": False, "reduce_bucket_size": 100_000, "stage3_prefetch_bucket_size": 1_000,
        "stage3_param_persistence_threshold": persistence, "stage3_max_reuse_distance": persistence,
    }  # fmt: skip
    artifacts.write_json(path, {"zero_optimization": zero})  # atomically: both ranks write it, and read it at once
    return TrainSection(engine=engine, steps=STEPS, batch_size=8, micro_batch_size=2, lr=LR, ds_config=path)


def open_tiny(folder: Path, engine: str = "zero3", persistence: int = 0, checkpointing: bool = False, dropout: float = 0.1) -> Engine:
    model = tiny_lora(dropout=dropout)
    if checkpointing:
        enable_checkpointing(model)
    return open_engine(model, train_section(folder, engine, persistence))


def make_step(engine: Engine, schedule: str | None) -> SapStep | PlainStep:
    if schedule is None:
        return PlainStep(engine)
    return SapStep(engine, Probe(decoder_layers(engine.module), [1, 2], HIDDEN), SapSection(**SAP, schedule=schedule))


def one_step(engine: Engine, step: SapStep | PlainStep, batches: StepBatches, number: int) -> None:
    step(batches.useful(number), lambda: batches.pairs(number), number)
    engine.step(LR)


def run_steps(engine: Engine, step: SapStep | PlainStep, steps: int = STEPS) -> dict[str, torch.Tensor]:
    batches = StepBatches(engine.rank, engine.world_size)
    for number in range(steps):
        one_step(engine, step, batches, number)
    return engine.gather(engine.weights())


def parity(folder: Path) -> dict:
    """Weights after five steps, for every schedule, with gathered copies kept or not."""
    results = {}
    for schedule in ("exact", "lagged"):
        for persistence in (0, 10**6):
            engine = open_tiny(folder, persistence=persistence, checkpointing=persistence == 0)
            results[f"{schedule}-{persistence}"] = run_steps(engine, make_step(engine, schedule))
    return results


def restore(folder: Path) -> dict:
    """Perturb after warm steps: the loss must move, and every shard must come back bit for bit."""
    results = {}
    for persistence in (0, 10**6):
        engine = open_tiny(folder, persistence=persistence)
        run_steps(engine, make_step(engine, "exact"), 3)
        batches = StepBatches(engine.rank, engine.world_size).useful(3)
        _, g = engine.gradient(useful_loss, batches)
        before = [*(t.clone() for t in engine._compute_shards()), *(t.clone() for t in engine._masters())]
        loss = engine.loss(useful_loss, batches)
        norm, slope = engine.norm(g), None
        with engine.perturbed(g, 1e-2 / norm):
            moved = engine.loss(useful_loss, batches)
            slope = (moved - loss) / (1e-2 * norm)
        after = [*engine._compute_shards(), *engine._masters()]
        try:
            with engine.perturbed(g, 1.0):
                raise RuntimeError("inside")
        except RuntimeError:
            pass
        again = [*engine._compute_shards(), *engine._masters()]
        same = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(before, after, again, strict=True))
        results[str(persistence)] = {
            "bitwise": not engine.any_rank(not same),
            "slope": slope,
            "loss_back": engine.loss(useful_loss, batches) == loss,
        }
    return results


class SometimesMore(nn.Module):
    """The tiny model plus a bias that only the safety pass uses."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.more = model, nn.Linear(1, 97, bias=False)

    def forward(self, use_more: bool = False, **inputs):
        output = self.model(**inputs)
        if use_more:
            output.logits = output.logits + self.more(torch.ones(1, 1, 1))
        return output


def traces(folder: Path) -> dict:
    """Auxiliary passes between steps must change nothing that a later step can see, also for a parameter that only they use."""
    results = {}
    for auxiliary in (False, True):
        model = SometimesMore(tiny_lora(dropout=0.1))
        engine = open_engine(model, train_section(folder, "zero3", 0))
        probe = Probe(decoder_layers(engine.module), [1, 2], HIDDEN)
        batches = StepBatches(engine.rank, engine.world_size)
        counters, clean = [], True
        for number in range(3):
            if auxiliary:
                with_more = lambda m, b: useful_loss(lambda **k: m(use_more=True, **k), b)  # noqa: E731
                _, g = engine.gradient(with_more, batches.useful(number))
                assert engine.gather(g).get("more.weight", torch.ones(1)).any(), (
                    "the control: the safety pass does reach the extra parameter"
                )
                engine.gradient(safety_loss("difference"), batches.pairs(number))
                with probe.active(probe.zeros()) as rows, engine.perturbed(g, 1e-3):
                    engine.probe_gradient(useful_loss, batches.useful(number), rows)
                clean &= not engine.optimizer.grad_partitions_flat_buffer.any() and all(p.grad is None for p in engine.module.parameters())
                counters.append((engine.ds.global_steps, engine.ds.micro_steps))
            engine.forward_backward(useful_loss, batches.useful(number))
            engine.step(LR)
        results[str(auxiliary)] = {"weights": engine.gather(engine.weights()), "counters": counters, "clean": clean}
    return results


def vectors(folder: Path) -> dict:
    """gather and shard are inverse; norms ignore the padding, which here is poisoned."""
    engine = open_tiny(folder)
    for shards in (engine._compute_shards(), engine._masters()):
        for shard, mask in zip(shards, engine._padding, strict=True):
            shard.masked_fill_(mask, float("nan"))
    named = engine.gather(engine.weights())
    shared = [named if engine.rank == 0 else None]
    torch.distributed.broadcast_object_list(shared)
    back = engine.shard(shared[0])
    same = all(torch.equal(a, b) for a, b in zip(back, engine.weights(), strict=True))
    padding = sum(int(mask.sum()) for mask in engine._padding)
    total = engine.sum_over_ranks(torch.tensor(float(padding)))
    return {"named": named, "norm": engine.norm(engine.weights()), "round_trip": not engine.any_rank(not same), "padding": total.item()}


def resume(folder: Path) -> dict:
    """Save after three steps, load into a fresh engine, go on: the bits of six steps in one go."""
    from pipeline.training import checkpoint

    results = {}
    for schedule in ("exact", "lagged"):
        engine = open_tiny(folder)
        step = make_step(engine, schedule)
        batches = StepBatches(engine.rank, engine.world_size)
        root = folder / f"checkpoints-{schedule}"
        for number in range(6):
            if number == 3:
                checkpoint.save(engine, step, root, 3, "same")
            one_step(engine, step, batches, number)
        straight = engine.gather(engine.weights())
        engine = open_tiny(folder)
        step = make_step(engine, schedule)
        done = checkpoint.load_latest(engine, step, root, "same")
        for number in range(done, 6):
            one_step(engine, step, batches, number)
        resumed = engine.gather(engine.weights())
        results[schedule] = {"done": done, "equal": all(torch.equal(straight[name], resumed[name]) for name in straight)}
    return results


CASES = (parity, restore, traces, vectors, resume)


def main(rank: int, port: int, folder: str) -> None:
    """Entry of one rank (torch.multiprocessing.spawn)."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    path = Path(folder) / f"rank{rank}"
    path.mkdir()
    init_distributed(train_section(path, "zero3", 0))
    shared = Path(folder) / "shared"
    shared.mkdir(exist_ok=True)
    results = {case.__name__: case(shared) for case in CASES}
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
