"""What two ranks do for tests/distributed/test_sharded.py; each kind of finding goes to the parent
as one file of rank 0's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline import artifacts
from pipeline.defences.plain import PlainStep
from pipeline.defences.saft.embeddings import embed
from pipeline.defences.sap.probe import Probe
from pipeline.defences.sap.section import SapSection
from pipeline.defences.sap.step import SapStep
from pipeline.engines import open as launch
from pipeline.engines.engine import Engine
from pipeline.engines.fsdp2 import Fsdp2Engine
from pipeline.engines.open import init_distributed, open_engine
from pipeline.model.models import decoder_layers, enable_checkpointing
from pipeline.objectives import head
from pipeline.objectives.losses import safety_loss, useful_loss
from pipeline.recipe.sections import TrainSection
from tests import companions as methods
from tests.reads import counted, fused
from tests.tiny import HIDDEN, VOCABULARY, StepBatches, tiny_lora, tiny_model, tiny_rows

LR, STEPS = 1e-2, 5
DISTANCE = 3e-3  # between weights: a loss moves by its gradient over it, and far more than rounding
TOKEN_BUDGET = 80  # rows of up to 60 tokens: micro-batches of 1 to 16 rows
# The default probe_step: V's scale is found at the first V, and moved at every other step.
SAP = {
    "enabled": True,
    "target_correction": 0.2,
    "beta": 0.02,
    "noise_every": 2,
    "correction_every": 2,
}


def train_section(
    folder: Path, engine: str, persistence: int, offload: bool = False
) -> TrainSection:
    path = folder / f"ds-{persistence}-{offload}.json"
    zero = {
        "stage": 3, "overlap_comm": False, "reduce_bucket_size": 100_000, "stage3_prefetch_bucket_size": 1_000,
        "stage3_param_persistence_threshold": persistence, "stage3_max_reuse_distance": persistence,
    }  # fmt: skip
    config = {"zero_optimization": zero}
    if offload:
        offloaded = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
        config = {"zero_optimization": zero | offloaded}
    artifacts.write_json(path, config)  # atomically: both ranks write it, and read it at once
    return TrainSection(
        engine=engine, steps=STEPS, batch_size=8, micro_batch_size=2, lr=LR, ds_config=path
    )


def make_step(engine: Engine, schedule: str | None) -> SapStep | PlainStep:
    if schedule is None:
        return PlainStep(engine)
    return SapStep(
        engine,
        Probe(decoder_layers(engine.module), [1, 2], HIDDEN),
        SapSection(**SAP, schedule=schedule),
        refresh_every=2,
    )


def one_step(engine: Engine, step: SapStep | PlainStep, batches: StepBatches, number: int) -> None:
    step(batches.useful(number), lambda: batches.pairs(number), number)
    engine.step(LR)


def run_steps(
    engine: Engine, step: SapStep | PlainStep, steps: int = STEPS
) -> dict[str, torch.Tensor]:
    batches = StepBatches(engine.rank, engine.world_size)
    for number in range(steps):
        one_step(engine, step, batches, number)
    return engine.gather(engine.weights())


@dataclass(frozen=True)
class Setting:
    """persistence: ZeRO-3's threshold and reuse distance, whether gathered copies outlive a pass.

    offload: of its weights and optimizer.
    """

    engine: str
    persistence: int = 0
    offload: bool = False
    adapter: str = "lora"


SETTINGS = {
    "zero3-0": Setting("zero3"),
    "zero3-1000000": Setting("zero3", persistence=10**6),
    "zero3-offload": Setting("zero3", offload=True),
    "zero3-full": Setting("zero3", persistence=10**6, adapter="full"),
    "fsdp2": Setting("fsdp2"),
    "fsdp2-full": Setting("fsdp2", adapter="full"),
}


def open_setting(
    folder: Path, name: str, checkpointing: bool = False, dropout: float = 0.1
) -> Engine:
    setting = SETTINGS[name]
    model = tiny_lora(dropout=dropout) if setting.adapter == "lora" else tiny_model().train()
    if checkpointing:
        enable_checkpointing(model)
    return open_engine(
        model, train_section(folder, setting.engine, setting.persistence, setting.offload)
    )


def parity(folder: Path, name: str) -> dict:
    """Weights after five steps, for either schedule; with dropout, with and without recomputation."""
    results = {}
    for schedule in ("exact", "lagged"):
        engine = open_setting(folder, name, checkpointing=name != "zero3-1000000")
        results[schedule] = run_steps(engine, make_step(engine, schedule))
    return results


def bits(engine: Engine) -> list[torch.Tensor]:
    """The bytes of every shard. As numbers, what pads a shard would differ from itself where it happens to be NaN."""
    return [tensor.detach().clone().view(torch.uint8) for tensor in engine.storage()]


def restore(folder: Path, name: str) -> dict:
    """Perturb after warm steps: the loss must move, and every shard must come back bit for bit."""
    engine = open_setting(folder, name, dropout=0.0)  # of which a loss without backward has none
    run_steps(engine, make_step(engine, "exact"), 3)
    batches = StepBatches(engine.rank, engine.world_size).useful(3)
    _, g = engine.gradient(useful_loss, batches)
    before = bits(engine)
    # A forward pass without backward comes first, as validation does: it is what leaves gathered weights behind.
    loss = engine.loss(useful_loss, batches)
    norm = engine.norm(g)
    with engine.perturbed(g, DISTANCE / norm):
        moved = engine.loss(useful_loss, batches)
    after = bits(engine)
    try:
        with engine.perturbed(g, 1.0):
            raise RuntimeError("inside")
    except RuntimeError:
        pass
    same = all(
        torch.equal(a, b) and torch.equal(a, c)
        for a, b, c in zip(before, after, bits(engine), strict=True)
    )
    return {
        "bitwise": not engine.any_rank(not same),
        "slope": (moved - loss) / (DISTANCE * norm),
        "loss_back": engine.loss(useful_loss, batches) == loss,
    }


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


def counters(engine: Engine) -> tuple[int, int]:
    """Steps done as the engine and the optimizer count them; no auxiliary pass may move them."""
    if isinstance(engine, Fsdp2Engine):
        done = int(
            max((state["step"].item() for state in engine.optimizer.state.values()), default=0)
        )
        return done, done
    return engine.ds.global_steps, engine.ds.micro_steps


def clean(engine: Engine) -> bool:
    """No gradient is left anywhere."""
    buffered = not isinstance(engine, Fsdp2Engine) and engine._partitions.gradient.any()
    return not buffered and all(p.grad is None for p in engine.module.parameters())


def traces(folder: Path, name: str) -> dict:
    """Auxiliary passes between steps must change nothing that a later step can see,
    also for a parameter that only they use.
    """
    return {
        key: _traces(folder, name, auxiliary)
        for key, auxiliary in (("without", False), ("with", True))
    }


def _traces(folder: Path, name: str, auxiliary: bool) -> dict:
    setting = SETTINGS[name]
    engine = open_engine(
        SometimesMore(tiny_lora(dropout=0.1)),
        train_section(folder, setting.engine, setting.persistence, setting.offload),
    )
    probe = Probe(decoder_layers(engine.module), [1, 2], HIDDEN)
    batches = StepBatches(engine.rank, engine.world_size)
    counted, left_clean = [], True
    for number in range(3):
        if auxiliary:

            def with_more(m, b):
                return useful_loss(lambda **k: m(use_more=True, **k), b)

            _, g = engine.gradient(with_more, batches.useful(number))
            reached = engine.gather(g).get("more.weight", torch.ones(1)).any()
            assert reached, "the control: the safety pass does reach the extra parameter"
            engine.gradient(safety_loss("difference"), batches.pairs(number))
            with probe.active(probe.zeros()) as rows, engine.perturbed(g, 1e-3):
                engine.probe_gradient(useful_loss, batches.useful(number), rows)
            left_clean &= clean(engine)
            counted.append(counters(engine))
        engine.forward_backward(useful_loss, batches.useful(number))
        engine.step(LR)
    return {"weights": engine.gather(engine.weights()), "counters": counted, "clean": left_clean}


def vectors(folder: Path, name: str) -> dict:
    """gather and shard are inverse; norms ignore the padding, which here is poisoned (FSDP2 keeps
    none: its shards are uneven).
    """
    engine = open_setting(folder, name)
    if isinstance(engine, Fsdp2Engine):
        missing = sum(
            -(-p.shape[0] // engine.world_size) - p.to_local().shape[0] for p in engine.parameters
        )
    else:
        for shards in (engine._partitions.compute, engine._masters()):
            for shard, mask in zip(shards, engine._padding, strict=True):
                shard.masked_fill_(mask, float("nan"))
        missing = sum(int(mask.sum()) for mask in engine._padding)
    named = engine.gather(engine.weights())
    shared = [named if engine.rank == 0 else None]
    torch.distributed.broadcast_object_list(shared)
    back = engine.shard(shared[0])
    same = all(torch.equal(a, b) for a, b in zip(back, engine.weights(), strict=True))
    return {
        "named": named,
        "norm": engine.norm(engine.weights()),
        "round_trip": not engine.any_rank(not same),
        "missing": engine.sum_over_ranks(torch.tensor(float(missing))).item(),
    }


def companions(folder: Path, name: str) -> dict:
    """The weights that count after some steps of every companion method, without dropout:
    the dense reference has none.
    """
    setting = SETTINGS[name]
    section = train_section(folder, setting.engine, setting.persistence, setting.offload)
    if setting.adapter == "lora":
        return {
            method: methods.train(open_engine(tiny_lora(), section), method)
            for method in methods.METHODS
        }
    section = section.model_copy(update={"adapter": "full", "adam_eps": methods.FULL_EPS})
    return {
        method: methods.train(open_engine(tiny_model().train(), section), method)
        for method in methods.METHODS
    }


def replaced(folder: Path, name: str) -> dict:
    """Other weights for a while, after warm steps: they must be seen,
    be what `weights` says, and go without a trace.
    """
    engine = open_setting(folder, name)
    run_steps(engine, make_step(engine, "exact"), 3)
    batches = StepBatches(engine.rank, engine.world_size).useful(3)
    before, loss, weights = bits(engine), engine.loss(useful_loss, batches), engine.weights()
    other = [part * 1.1 for part in weights]
    with engine.replaced(other):
        inside = engine.loss(useful_loss, batches)
        exact = all(map(torch.equal, engine.weights(), other))
    back = all(map(torch.equal, before, bits(engine)))
    loss_back = engine.loss(useful_loss, batches) == loss
    engine.assign(other)
    return {
        "exact": not engine.any_rank(not exact),
        "bitwise": not engine.any_rank(not back),
        "loss_back": loss_back,
        "seen": inside != loss,
        "assigned": engine.loss(useful_loss, batches) == inside,
    }


def embeddings(folder: Path, name: str) -> dict:
    """A vector a sample, on every rank; three micro-batches are shared by two ranks, so that one runs a filler.

    Then a step: no trace.
    """
    engine = open_setting(folder, name)
    found = embed(engine, tiny_rows(11), 2, "response_mean", 4, 0)
    other = engine.sum_over_ranks(found.clone().to(engine.device)) - found
    batches, step = StepBatches(engine.rank, engine.world_size), make_step(engine, None)
    one_step(engine, step, batches, 0)
    return {
        "embeddings": found,
        "same": not engine.any_rank(not torch.equal(other, found)),
        "weights": engine.gather(engine.weights()),
    }


def budgeted(engine: Engine, token_budget: int | None, packing: bool = False) -> dict:
    """Per step the loss, the gradient and this rank's passes, and the weights at the end. Ragged rows, no dropout.

    SAP's step: its passes discard gradients between those of the main pass, over as many micro-batches as the step has.
    """
    rows = tiny_rows(longest=60)
    batches = StepBatches(
        engine.rank, engine.world_size, rows=rows, token_budget=token_budget, packing=packing
    )
    step, found = make_step(engine, "exact"), {"losses": [], "gradients": [], "passes": []}
    for number in range(STEPS):
        useful = batches.useful(number)
        metrics = step(useful, lambda number=number: batches.pairs(number), number)
        found["losses"].append(metrics["train/loss"].item())
        found["gradients"].append(engine.gather(engine.accumulated_gradient()))
        found["passes"].append(len(useful))
        engine.step(LR)
    return found | {"weights": engine.gather(engine.weights())}


def shares(engine: Engine) -> dict[str, dict]:
    """Weights after steps whose V is computed from two, and from one, of eight samples;
    a rank without one runs a filler.
    """
    found, batches, start = {}, StepBatches(engine.rank, engine.world_size), engine.weights()
    for samples in (2, 1):
        settings = SapSection(**SAP, schedule="exact", probe_share=samples / batches.batch_size)
        step = SapStep(
            engine, Probe(decoder_layers(engine.module), [1, 2], HIDDEN), settings, refresh_every=2
        )
        for number in range(STEPS):
            step(
                batches.useful(number),
                lambda number=number: batches.pairs(number),
                number,
                batches.useful(number, samples),
            )
            engine.step(LR)
        found[str(samples)] = engine.gather(engine.weights())
        engine.assign(start)
    return found


def discarded(folder: Path, name: str) -> dict:
    """Weights after plain steps, and after the same with a main pass before each whose gradient is thrown away."""
    found = {}
    for way in ("straight", "discarding"):
        engine = open_setting(folder, name)
        batches, step = StepBatches(engine.rank, engine.world_size), make_step(engine, None)
        for number in range(STEPS):
            if way == "discarding":
                engine.forward_backward(useful_loss, batches.useful(number + 7))
                engine.add_gradient(engine.weights(), 0.5)
                engine.discard()
            one_step(engine, step, batches, number)
        found[way] = engine.gather(engine.weights())
    return found


def without_dropout(folder: Path, name: str) -> Engine:
    """For what is cut into other micro-batches on other ranks: masks belong to a micro-batch."""
    setting = SETTINGS[name]
    return open_engine(
        tiny_lora(), train_section(folder, setting.engine, setting.persistence, setting.offload)
    )


def share(folder: Path, name: str) -> dict:
    return shares(without_dropout(folder, name))


def budget(folder: Path, name: str) -> dict:
    return budgeted(without_dropout(folder, name), TOKEN_BUDGET)


def packed(folder: Path, name: str) -> dict:
    return budgeted(without_dropout(folder, name), TOKEN_BUDGET, packing=True)


def chunks(folder: Path, name: str) -> dict:
    """Weights after SAP's steps with all logits at once, and with those of two tokens at a time;
    how many were seen at most.
    """
    results, seen, error, most = {}, [], head._error, head.MOST_LOGITS
    try:
        head._error = lambda logits, *rest: seen.append(len(logits)) or error(logits, *rest)
        for way, limit in (("whole", most), ("chunks", 2 * VOCABULARY)):
            head.MOST_LOGITS = limit
            engine = open_setting(folder, name, checkpointing=True)
            results[way] = run_steps(engine, make_step(engine, "exact"))
            assert bool(seen) is (way == "chunks"), "the case tells nothing"
    finally:
        head._error, head.MOST_LOGITS = error, most
    return results | {"most": max(seen)}


def reads(folder: Path, name: str) -> list[list[str]]:
    """What plain steps read of the device, each as the loop takes it."""
    launch.adamw, formed = fused, launch.adamw
    try:
        engine = open_setting(folder, name)
    finally:
        launch.adamw = formed
    batches, step, found = StepBatches(engine.rank, engine.world_size), PlainStep(engine), []
    for number in range(STEPS):
        useful = batches.useful(number)
        with counted() as seen:
            metrics = step(useful, None, number)
            asked = {"norm": engine.gradient_norm(), "stop": engine.ranks_with(engine.rank == 1)}
            numbers = engine.read({**metrics, **asked})
            engine.step(LR, numbers["norm"])
        assert numbers["stop"] == 1
        found.append(seen)
    return found


_ALL = (
    reads,
    discarded,
    parity,
    restore,
    traces,
    vectors,
    companions,
    replaced,
    embeddings,
    share,
    budget,
    packed,
    chunks,
)
CASES = {case.__name__: case for case in _ALL}


def main(rank: int, folder: Path, wanted: list[tuple[str, str]]) -> None:
    """What one rank does (tests.distributed.ranks). wanted: names of CASES and SETTINGS."""
    shared = folder / "shared"
    shared.mkdir(exist_ok=True)
    init_distributed(train_section(shared, "zero3", 0))
    for name, setting in wanted:
        found = CASES[name](shared, setting)
        if rank == 0:
            torch.save(found, folder / f"{name}-{setting}.pt")
