"""What one engine computes on a tiny model, for `make gpu`:
five SAP steps, the first gradient, and whether bits come back.

with Processes() as processes:
    processes.call("tests.gpu.parity:examine", {"engine": "zero3", "quantization": "nf4"})
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from pipeline.engines.open import init_distributed, leave, open_engine
from pipeline.model.models import add_lora
from pipeline.model.quantization import quantise
from pipeline.model.weights import Sources
from pipeline.objectives.losses import useful_loss
from pipeline.recipe.sections import LoraSection
from pipeline.running.devices import device
from tests.distributed.worker import bits, make_step, one_step, train_section
from tests.tiny import StepBatches, tiny_model

STEPS = 5


def examine(case: dict[str, str]) -> dict[str, Any]:
    """gradient: of the first SAP step; weights: after five with AdamW; both as lists by name.
    restored, untouched: bit for bit.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train = train_section(Path(folder), case["engine"], persistence=0)
        init_distributed(train)
        model, sources = tiny_model(), Sources()
        if case["quantization"] == "nf4":
            quantise(model, sources, device())
        module = add_lora(model, LoraSection(r=3, alpha=6, dropout=0.0), seed=0)
        torch.manual_seed(7)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        engine = open_engine(module.train(), train, sources)
    batches, step = StepBatches(engine.rank, engine.world_size), make_step(engine, "exact")
    step(batches.useful(0), lambda: batches.pairs(0), 0)
    gradient = engine.gather(engine.accumulated_gradient())
    engine.step(train.lr)
    for number in range(1, STEPS):
        one_step(engine, step, batches, number)
    weights = engine.gather(engine.weights())
    before, useful = bits(engine), batches.useful(STEPS)
    loss = engine.loss(useful_loss, useful)
    _, direction = engine.gradient(useful_loss, useful)
    untouched = all(map(torch.equal, before, bits(engine)))
    with engine.perturbed(direction, 1e-2 / engine.norm(direction)):
        moved = engine.loss(useful_loss, useful)
    found = {
        "device": engine.device.type, "gradient": _lists(gradient), "weights": _lists(weights), "moved": moved - loss,
        "untouched": untouched,
        "restored": all(map(torch.equal, before, bits(engine))) and engine.loss(useful_loss, useful) == loss,
    }  # fmt: skip
    leave()
    return found


def _lists(named: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in named.items()}
