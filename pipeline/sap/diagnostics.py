"""The safety direction over the whole contrastive set, and what it looks like layer by layer (arXiv 2505.16737, Fig. 3).

direction, summary = safety_direction(engine, first_half, second_half, useful_batches, "difference")
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import torch

from pipeline.data.batches import MicroBatch, PairBatch
from pipeline.sap.losses import safety_loss, useful_loss
from pipeline.sharding.engine import Engine, Shard


def safety_direction(
    engine: Engine, halves: tuple[Sequence[PairBatch], Sequence[PairBatch]], useful: Sequence[MicroBatch], contrastive: str
) -> tuple[dict[str, torch.Tensor], dict]:
    """g_s = grad_W L_safety over both halves at the engine's weights; every batch's global_pairs counts both halves.

    Returns, on rank 0, g_s by parameter name and a summary: norm, safety_loss, split_half_cosine (1: the pairs agree), and per decoder layer the
    norm of g_s and its cosine with the useful gradient. Leaves no trace in the engine.
    """
    losses, parts = zip(*(engine.gradient(safety_loss(contrastive), half) for half in halves), strict=True)
    direction = [a + b for a, b in zip(*parts, strict=True)]
    _, useful_gradient = engine.gradient(useful_loss, useful)
    summary = {
        "safety_loss": sum(losses),
        "norm": engine.norm(direction),
        "split_half_cosine": _cosine(engine, *parts),
        "useful_cosine": _cosine(engine, direction, useful_gradient),
    }
    named, named_useful = engine.gather(direction), engine.gather(useful_gradient)
    summary["layers"] = _per_layer(named, named_useful)
    return named, summary


def _cosine(engine: Engine, a: Shard, b: Shard) -> float:
    scale = engine.norm(a) * engine.norm(b)
    return engine.dot(a, b) / scale if scale > 0 else 0.0


def _per_layer(named: dict[str, torch.Tensor], useful: dict[str, torch.Tensor]) -> list[dict[str, float]]:
    groups: dict[int, list[str]] = defaultdict(list)
    for name in named:
        match = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        if match:
            groups[int(match.group(1))].append(name)
    rows = []
    for layer in sorted(groups):
        g = torch.cat([named[name].double().flatten() for name in groups[layer]])
        u = torch.cat([useful[name].double().flatten() for name in groups[layer]])
        scale = (g.norm() * u.norm()).item()
        rows.append({"layer": layer, "safety_norm": g.norm().item(), "useful_cosine": torch.dot(g, u).item() / scale if scale else 0.0})
    return rows
