"""Trains the equivalence cases in warm process groups and measures how far each ends from the single process.

    results = measure(matrix_cases(), Path("work"))       # {str(case): {"difference": ..., "control": ..., ...}}

The single process is trained once for everything the weights may depend on (cases.Reference), with a micro-batch that
no case has. The measure is |W_case - W_single| / |W_single - W_start|; a control is the same number for the single
process with SAP left out.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import get_z3_leaf_modules
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from pipeline import artifacts
from pipeline.defences.plain import PlainStep
from pipeline.defences.sap.probe import Probe
from pipeline.defences.sap.section import SapSection
from pipeline.defences.sap.step import SapStep
from pipeline.engines.engine import Engine
from pipeline.engines.open import init_distributed, open_engine
from pipeline.engines.zero3 import Zero3Engine
from pipeline.model.models import decoder_layers, make_trainable
from pipeline.recipe.sections import LoraSection, TrainSection
from tests.distributed.cases import Case, Reference
from tests.distributed.ranks import spawn
from tests.tiny import FAMILY_HIDDEN, FAMILY_RANK, StepBatches, family_model, tiny_pairs, tiny_rows

STEPS, BATCH, PROBED = 4, 18, [1, 2]
LR = {"lora": 1e-2, "wide": 1e-2, "full": 2e-3}
MAX_NORM = 0.1
BOUND = {"lora": 1e-5, "wide": 1e-5, "full": 1e-4}
ADAPTED = {"lora": ["v_proj"], "wide": ["q_proj", "v_proj"], "full": []}
CONTROL_BOUND = 1e-2
REFERENCE_ACCUMULATION = 2
# AdamW divides by the gradient's running size, so an element whose gradient passes through zero multiplies its
# rounding: with the default 1e-8 two runs of the *single process* that cut the batch otherwise differ by up to 9e-5
# (LoRA) and 3e-3 (full), nearly all of it in one element (tests/distributed/rounding.py). 1e-3 is far above that
# rounding. |dW| is a tenth of |W|: p(1) - p(0) too is far above its rounding.
ADAM_EPS = 1e-3
# The default probe_step: V's scale is found at the first V, and moved at every other step.
SAP = {
    "enabled": True,
    "target_correction": 0.5,
    "beta": 0.2,
    "eps": 0.1,
    "noise_every": 3,
    "correction_every": 2,
}
SCHEDULES = {
    "exact": {"schedule": "exact"},
    "lagged": {"schedule": "lagged"},
    "reused": {"schedule": "exact"},
}
EVERY = {"reused": 3}  # steps that a direction serves, where that is more than one
AGES = {"exact": [0, 0, 0, 0], "lagged": [0, 0, 0, 0], "reused": [0, 1, 2, 0]}
_FEW = 6
COMPARED = ("train/loss", "train/grad_norm", "sap/direction_norm")

Results = dict[str, dict[str, Any]]


class StepData(StepBatches):
    """One rank's share of every step: 18 sequences whatever the accumulation, and 4 pairs,
    which do not divide by 3 ranks.
    """

    def __init__(self, unequal: bool, accumulation: int, rank: int, ranks: int):
        rows, pairs = tiny_rows(STEPS * BATCH, equal=not unequal), tiny_pairs(equal=not unequal)
        super().__init__(rank, ranks, pairs, rows, BATCH, BATCH // (ranks * accumulation))


def trainable(of: Reference, train: TrainSection) -> nn.Module:
    """The module at its start: LoRA's B is not zero, as after some training, or A would get no gradient."""
    module = make_trainable(family_model(of.family, of.tied), train, seed=0)
    if of.adapter != "full":
        torch.manual_seed(7)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    return module


def train_section(
    of: Reference, engine: str, ranks: int, accumulation: int, checkpointing: bool, ds_config: Path
) -> TrainSection:
    return TrainSection(
        engine=engine,
        adapter="full" if of.adapter == "full" else "lora",
        steps=STEPS,
        batch_size=BATCH,
        micro_batch_size=BATCH // (ranks * accumulation),
        lr=LR[of.adapter],
        adam_eps=ADAM_EPS,
        max_grad_norm=MAX_NORM if of.clipping else None,
        gradient_checkpointing=checkpointing,
        lora=LoraSection(
            r=FAMILY_RANK, alpha=2 * FAMILY_RANK, target_modules=ADAPTED[of.adapter] or ["q_proj"]
        ),
        ds_config=ds_config,
    )


def ds_config(folder: Path, case: Case) -> Path:
    size = 10**6 if case.persistence else 0
    zero: dict[str, Any] = {
        "stage": 3, "overlap_comm": False, "reduce_bucket_size": 100_000, "stage3_prefetch_bucket_size": 1_000,
        "stage3_param_persistence_threshold": size, "stage3_max_reuse_distance": size,
    }  # fmt: skip
    if case.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if case.offload_param:
        zero["offload_param"] = {"device": "cpu"}
    path = folder / f"ds-{size}-{case.offload_optimizer}-{case.offload_param}.json"
    # atomically: all ranks write it, and read it at once
    artifacts.write_json(path, {"zero_optimization": zero})
    return path


def trajectory(engine: Engine, of: Reference, data: StepData, **sap: Any) -> dict[str, Any]:
    """The weights after STEPS steps (on rank 0) and what was logged on the way. sap: settings other than SAP's."""
    step: SapStep | PlainStep = PlainStep(engine)
    if of.schedule != "none":
        step = SapStep(
            engine,
            Probe(decoder_layers(engine.module), PROBED, FAMILY_HIDDEN),
            SapSection(**SAP | SCHEDULES[of.schedule] | sap),
            refresh_every=EVERY.get(of.schedule, 1),
        )
    logged = []
    for number in range(STEPS):
        metrics = step(data.useful(number), lambda number=number: data.pairs(number), number)
        logged.append(engine.read(metrics | {"train/grad_norm": engine.gradient_norm()}))
        engine.step(LR[of.adapter])
    return {"weights": engine.gather(engine.weights()), "logged": logged}


def run_case(case: Case, rank: int, folder: Path) -> dict[str, Any]:
    started, of = time.perf_counter(), case.reference
    train = train_section(
        of, case.engine, case.ranks, case.accumulation, case.checkpointing, ds_config(folder, case)
    )
    module = trainable(of, train)
    shapes = [p.shape for p in module.parameters() if p.requires_grad]
    engine = open_engine(module, train)
    groups = fetched_groups(engine)
    found = trajectory(engine, of, StepData(case.unequal, case.accumulation, rank, case.ranks))
    del engine
    gc.collect()
    return (
        {}
        if rank
        else compare(found, of, folder)
        | {
            "uneven": uneven(case, shapes),
            "groups": groups,
            "seconds": time.perf_counter() - started,
        }
    )


def fetched_groups(engine: Engine) -> int:
    """Of how many groups of parameters, each fetched as a whole, an engine makes the model's layers."""
    if isinstance(engine, Zero3Engine):
        return len(get_z3_leaf_modules(engine.module))
    return sum(isinstance(module, FSDPModule) for module in engine.module.modules())


def uneven(case: Case, shapes: Sequence[torch.Size]) -> int:
    """How many trained weights do not divide by the ranks: ZeRO-3 cuts flattened weights, FSDP2 cuts rows."""
    return sum(
        (shape.numel() if case.engine == "zero3" else shape[0]) % case.ranks != 0
        for shape in shapes
    )


def compare(found: dict[str, Any], of: Reference, folder: Path) -> dict[str, Any]:
    expected, control = (
        torch.load(folder / f"reference-{key}.pt", weights_only=True) for key in (of, of.control)
    )
    update = distance(expected["weights"], expected["start"])
    return {
        "difference": distance(found["weights"], expected["weights"]) / update,
        "control": distance(control["weights"], expected["weights"]) / update,
        "logged": max(
            abs(mine[key] - its[key]) / abs(its[key])
            for mine, its in zip(found["logged"], expected["logged"], strict=True)
            for key in COMPARED
            if key in its
        ),
        "ages": [metrics["sap/direction_age"] for metrics in found["logged"]],
        "norms": [metrics["train/grad_norm"] for metrics in expected["logged"]],
    }


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    return torch.sqrt(
        sum((a[name].double() - b[name].double()).square().sum() for name in a)
    ).item()


def run_reference(of: Reference, folder: Path) -> None:
    train = train_section(of, "single", 1, REFERENCE_ACCUMULATION, False, folder)
    module = trainable(of, train)
    start = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    found = trajectory(
        open_engine(module, train), of, StepData(of.unequal, REFERENCE_ACCUMULATION, 0, 1)
    )
    torch.save(found | {"start": start}, folder / f"reference-{of}.pt")


def measure(cases: Sequence[Case], folder: Path) -> Results:
    """Train all cases; one that failed has "error" and "message" in place of numbers."""
    references = sorted(
        {key for case in cases for key in (case.reference, case.reference.control)}, key=str
    )
    if len(references) <= _FEW:
        # processes of their own would take longer to start
        references_main(0, 1, references, folder)
    else:
        spawn(2, references_main, 2, references, folder)
    for ranks in sorted({case.ranks for case in cases}):
        _run_group(ranks, [case for case in cases if case.ranks == ranks], folder)
    return read_results(folder)


def read_results(folder: Path) -> Results:
    lines = [
        json.loads(line)
        for path in sorted(folder.glob("results-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return {line["case"]: line for line in lines}


def _run_group(ranks: int, cases: list[Case], folder: Path) -> None:
    """A case that fails takes its process group with it; a new group goes on with the rest."""
    while cases:
        try:
            spawn(ranks, group_main, ranks, cases, folder)
        except (ProcessRaisedException, ProcessExitedException) as error:
            done = read_results(folder)
            cases = [case for case in cases if str(case) not in done]
            if not cases:
                raise
            text = str(error).strip()
            last = text.splitlines()[-1]
            _record(
                cases[0], ranks, {"error": last.partition(":")[0], "message": text[-2000:]}, folder
            )
            cases = cases[1:]
        else:
            return


def _record(case: Case, ranks: int, found: dict[str, Any], folder: Path) -> None:
    with (folder / f"results-{ranks}.jsonl").open("a") as stream:
        stream.write(json.dumps({"case": str(case), **found}) + "\n")
    shown = (
        f"{found['difference']:.1e}  {found['seconds']:.1f} s"
        if "difference" in found
        else found["error"]
    )
    print(f"{case}  {shown}", file=sys.stderr, flush=True)


def references_main(rank: int, processes: int, references: list[Reference], folder: Path) -> None:
    """What one of some independent processes does."""
    quiet()
    for of in references[rank::processes]:
        run_reference(of, folder)


def group_main(rank: int, ranks: int, cases: list[Case], folder: Path) -> None:
    """What one rank of a warm process group does."""
    quiet()
    if ranks > 1:
        # Ranks that wait for one that has failed must not wait for long, but a busy machine may starve one. Engine
        # zero3's group serves fsdp2 too.
        init_distributed(TrainSection(engine="zero3", steps=1), timeout=timedelta(minutes=3))
    for case in cases:
        found = run_case(case, rank, folder)
        if rank == 0:
            _record(case, ranks, found, folder)


def quiet() -> None:
    # a perturbation this large is for measuring, not for training
    warnings.filterwarnings("ignore", message="SAP's signal")
