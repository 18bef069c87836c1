"""What two ranks do for tests/distributed/test_streamed.py: load a model's files into shards, train in 4 bits,
write products and a direction.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline import artifacts
from pipeline.defences.plain import PlainStep
from pipeline.defences.sap.diagnostics import safety_direction
from pipeline.defences.sap.probe import Probe
from pipeline.defences.sap.section import SapSection
from pipeline.defences.sap.step import SapStep
from pipeline.engines.engine import Engine
from pipeline.engines.open import init_distributed, open_engine
from pipeline.model.loading import open_model
from pipeline.model.models import decoder_layers, load_model, make_trainable
from pipeline.model.quantization import Nf4Linear
from pipeline.model.weights import WeightFiles
from pipeline.objectives.losses import useful_loss
from pipeline.recipe.sections import LoraSection, ModelSection, TrainSection
from pipeline.training.product import save_gathered, save_merged, save_model
from tests.project import make_tokenizer
from tests.tiny import FAMILY_HIDDEN, FAMILY_RANK, StepBatches

LR, STEPS, WORLD = 1e-2, 3, 2
# Adam divides a gradient that is almost zero by itself: at 1e-8 one such coordinate of 4840 moved
# by 4e-4 of its size with the order of a sum.
ADAM_EPS = 1e-3
LORA = LoraSection(r=FAMILY_RANK, alpha=10, target_modules=["q_proj", "v_proj", "down_proj"])
SAP = SapSection(enabled=True, target_correction=0.5, beta=0.02, noise_every=0, correction_every=1)
LOADS = [
    (adapter, dtype, tied)
    for adapter in ("lora", "full")
    for dtype in ("float32", "bfloat16")
    for tied in (True, False)
]


def start(
    folder: Path, engine: str, adapter: str = "lora", tied: bool = True, checkpointing: bool = False,
    lora: LoraSection = LORA, model_name: str | None = None, **section: str,
) -> Engine:  # fmt: skip
    """The engine on the model in folder/tied or folder/untied, or the one named."""
    location = str(folder / (model_name or ("tied" if tied else "untied")))
    config = folder / "ds.json"
    zero = {
        "stage": 3,
        "overlap_comm": False,
        "reduce_bucket_size": 100_000,
        "stage3_param_persistence_threshold": 100,
    }
    artifacts.write_json(config, {"zero_optimization": zero})
    train = TrainSection(
        engine=engine, adapter=adapter, steps=STEPS, batch_size=8, micro_batch_size=2, lr=LR, lora=lora,
        ds_config=config, gradient_checkpointing=checkpointing, adam_eps=ADAM_EPS,
    )  # fmt: skip
    model, sources = open_model(
        ModelSection(path=location, **{"dtype": "float32", "attention": "sdpa", **section}),
        location,
        sharded=engine != "single",
    )
    return open_engine(make_trainable(model, train, seed=0), train, sources)


def whole(engine: Engine) -> dict[str, torch.Tensor]:
    """Every parameter, as the passes see it."""
    import deepspeed

    frozen = engine.frozen.gathered() if engine.frozen else ()
    found = {name: weight.clone() for name, weight in frozen}
    for name, p in engine.module.named_parameters():
        if hasattr(p, "ds_id"):
            with deepspeed.zero.GatheredParameters([p]):
                found[name] = p.detach().clone()
        else:
            found[name] = (
                p.full_tensor().detach().clone()
                if hasattr(p, "full_tensor")
                else p.detach().clone()
            )
    return found


def local(p: torch.nn.Parameter) -> torch.Tensor:
    """What this rank keeps of a parameter."""
    return (
        p.ds_tensor
        if hasattr(p, "ds_tensor")
        else p.to_local()
        if hasattr(p, "to_local")
        else p.detach()
    )


def loads(folder: Path, engine: str) -> dict[str, Any]:
    """For every way to train: whether the streamed shards hold the loaded model's bits and dtypes,
    and each rank its share of the bytes.
    """
    results = {}
    for adapter, dtype, tied in LOADS:
        streamed = start(folder, engine, adapter, tied, dtype=dtype)
        location = str(folder / ("tied" if tied else "untied"))
        train = TrainSection(engine=engine, adapter=adapter, steps=1, lora=LORA)
        loaded = make_trainable(load_model(location, getattr(torch, dtype)), train, seed=0)
        expected = {name: p.detach() for name, p in loaded.named_parameters()}
        if engine == "fsdp2" and adapter == "full":
            expected = {name: p.float() for name, p in expected.items()}  # the master is the shard
        found = whole(streamed)
        bits = found.keys() == expected.keys() and all(
            torch.equal(found[name], expected[name]) for name in expected
        )
        dtypes = all(found[name].dtype == expected[name].dtype for name in expected)
        master = streamed.gather(streamed.weights())
        kept = all(
            torch.equal(master[name], p.detach().float())
            for name, p in loaded.named_parameters()
            if name in master
        )
        shards = [local(p) for p in streamed.module.parameters()]
        shards += [layer.part for layer in streamed.frozen.layers] if streamed.frozen else []
        size = streamed.sum_over_ranks(
            torch.tensor([float(sum(s.numel() * s.element_size() for s in shards))])
        ).item()
        buffers = all(
            torch.equal(a, b)
            for a, b in zip(streamed.module.buffers(), loaded.buffers(), strict=True)
        )
        wrong = streamed.any_rank(not (bits and dtypes and buffers and (kept or streamed.rank)))
        results[f"{adapter}-{dtype}-{tied}"] = {
            "same": not wrong, "bytes": size / sum(p.numel() * p.element_size() for p in expected.values()),
        }  # fmt: skip
    return results


def run(engine: Engine, sap: bool) -> dict[str, torch.Tensor]:
    """Weights after three steps."""
    batches = StepBatches(engine.rank, engine.world_size)
    step = (
        SapStep(engine, Probe(decoder_layers(engine.module), [1, 2], FAMILY_HIDDEN), SAP)
        if sap
        else PlainStep(engine)
    )
    for number in range(STEPS):
        step(batches.useful(number), lambda number=number: batches.pairs(number), number)
        engine.step(LR)
    return engine.gather(engine.weights())


def quantised(folder: Path, engine: str) -> dict[str, Any]:
    """Training in 4 bits: weights; of the frozen layers, this rank's bytes as a share of all of them, and 4-bit ones as
    a share of the weights that they stand for.
    """
    results = {}
    for checkpointing in (False, True):
        opened = start(folder, engine, quantization="nf4", checkpointing=checkpointing)
        results[f"checkpointing {checkpointing}"] = run(opened, sap=True)
    layers = opened.frozen.layers if opened.frozen else []
    held = sum(layer.part.nbytes for layer in layers)
    weights = [weight for layer in layers for weight in layer.weights]
    codes = sum(weight.nbytes for weight in weights if weight.dtype == torch.uint8)
    linears = [m for m in opened.module.modules() if isinstance(m, Nf4Linear)]
    stood_for = sum(linear.in_features * linear.out_features for linear in linears)
    shares = {
        "held": held / max(sum(weight.nbytes for weight in weights), 1),
        "codes": codes / stood_for,
    }
    loss = opened.loss(useful_loss, StepBatches(opened.rank, opened.world_size).useful(0))
    return {**results, **shares, "loss": loss}


def products(folder: Path, engine: str) -> dict[str, Any]:
    """Trained models on disk (folder/full, folder/merged) and the weights they must hold."""
    tokenizer, results = make_tokenizer(), {}
    for dtype in ("float32", "bfloat16"):
        for adapter, save in (("full", save_model), ("lora", save_merged)):
            opened = start(folder, engine, adapter, dtype=dtype)
            results[f"{adapter}-{dtype}"] = run(opened, sap=False)
            section = ModelSection(path=str(folder / "tied"), dtype=dtype, attention="sdpa")
            save(opened, section.path, section, folder / f"{engine}-{adapter}-{dtype}", tokenizer)
            opened.barrier()
    return results


def direction(folder: Path, engine: str) -> dict[str, Any]:
    """The direction stage's numbers, and its vector there and back through files."""
    results = {}
    for adapter in ("lora", "full"):
        opened = start(folder, engine, adapter)
        batches = StepBatches(opened.rank, opened.world_size)
        pairs = batches.pairs(0) + batches.pairs(1)
        halves = [
            [replace(batch, global_pairs=8) for batch in half]
            for half in (pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :])
        ]
        vector, summary = safety_direction(opened, tuple(halves), batches.useful(0), "difference")
        target = folder / f"direction-{engine}-{adapter}"
        save_gathered(opened, opened.gathered(vector), target, "direction")
        opened.barrier()
        back = opened.shard(WeightFiles(target, "direction"))
        same = all(torch.equal(a, b) for a, b in zip(back, vector, strict=True))
        before = opened.checksum(opened.weights())
        opened.forward_backward(useful_loss, batches.useful(0))
        opened.step(LR)
        results[adapter] = {
            "summary": summary, "same": not opened.any_rank(not same), "checksum": before,
            "moved": opened.checksum(opened.weights()), "vector": opened.gather(vector),
        }  # fmt: skip
    return results


def tied_head(folder: Path, engine: str) -> dict[str, torch.Tensor]:
    """The trained adapter of a head that shares the embedding's weight; folder/ENGINE-head: the model with it added."""
    opened = start(
        folder, engine, lora=LORA.model_copy(update={"target_modules": ["q_proj", "lm_head"]})
    )
    trained = run(opened, sap=False)
    section = ModelSection(path=str(folder / "tied"), dtype="float32", attention="sdpa")
    save_merged(opened, section.path, section, folder / f"{engine}-head", make_tokenizer())
    opened.barrier()
    return trained


def damaged(folder: Path, engine: str) -> list[str]:
    """What each rank says of a weight that is not finite in the part that the last one reads."""
    try:
        start(folder, engine, model_name="damaged")
        said = "nothing"
    except ValueError as error:
        said = str(error)
    every = [""] * WORLD
    torch.distributed.all_gather_object(every, said)
    return every


CASES = (loads, quantised, products, direction, tied_head, damaged)


def main(rank: int, engine: str, folder: str) -> None:
    """What one rank does (tests.distributed.ranks)."""
    init_distributed(TrainSection(engine=engine, steps=1))
    results = {case.__name__: case(Path(folder), engine) for case in CASES}
    if rank == 0:
        torch.save(results, Path(folder) / f"{engine}.pt")
