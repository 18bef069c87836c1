"""Seconds to load a model's shards, in bfloat16 and in 4 bits, for `make gpu`; and what the host had to hold."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.cases import Case
from pipeline.bench.measure import random_model, section
from pipeline.engines import open as launch
from pipeline.model.loading import open_model
from pipeline.model.models import make_trainable
from pipeline.recipe.sections import ModelSection


def write(case: Case, folder: str) -> int:
    """A random model in safetensors files; returns its bytes."""
    model = random_model(case)
    model.save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def load(case: Case, folder: str) -> dict[str, Any]:
    """From the files to an engine that could train."""
    train = section(case, Path(folder))
    launch.init_distributed(train)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    model, sources = open_model(
        ModelSection(path=folder, quantization=case.quantization), folder, sharded=True
    )
    engine = launch.open_engine(make_trainable(model, train, 0), train, sources)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    found = {
        "quantization": case.quantization, "system": case.system, "seconds": time.perf_counter() - started,
        "host_gib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20,
        "device_gib": torch.cuda.memory_allocated() / 2**30 if engine.device.type == "cuda" else None,
    }  # fmt: skip
    launch.leave()
    return found
