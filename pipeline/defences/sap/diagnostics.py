"""The safety direction over the whole contrastive set, and what it looks like layer by layer
(arXiv 2505.16737, Fig. 3).

direction, summary = safety_direction(engine, (first_half, second_half), useful_batches, "difference")
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.engines.engine import Engine, ShardedVector
from pipeline.objectives.batches import MicroBatch, PairBatch
from pipeline.objectives.losses import safety_loss, useful_loss


def safety_direction(
    engine: Engine,
    halves: tuple[Sequence[PairBatch], Sequence[PairBatch]],
    useful: Sequence[MicroBatch],
    contrastive: str,
) -> tuple[ShardedVector, dict[str, Any]]:
    """g_s = grad_W L_safety over both halves at the engine's weights; every batch's global_pairs counts both halves.

    Returns this rank's shard of g_s and a summary: norm, safety_loss, split_half_cosine (1: the pairs agree), and per
    decoder layer the norm of g_s and its cosine with the useful gradient. Leaves no trace in the engine, and gathers
    nothing.
    """
    losses, parts = zip(
        *(engine.gradient(safety_loss(contrastive), half) for half in halves), strict=True
    )
    direction = [a + b for a, b in zip(*parts, strict=True)]
    _, useful_gradient = engine.gradient(useful_loss, useful)
    summary = {
        "safety_loss": sum(losses).item(),
        "norm": engine.norm(direction),
        "split_half_cosine": _cosine(engine, *parts),
        "useful_cosine": _cosine(engine, direction, useful_gradient),
        "layers": _per_layer(engine, direction, useful_gradient),
    }
    return direction, summary


def _cosine(engine: Engine, a: ShardedVector, b: ShardedVector) -> float:
    scale = engine.norm(a) * engine.norm(b)
    return engine.dot(a, b) / scale if scale > 0 else 0.0


def _per_layer(
    engine: Engine, direction: ShardedVector, useful: ShardedVector
) -> list[dict[str, float]]:
    """Inner products layer by layer, from the ranks' parts: the whole vectors are never in one place."""
    layers = {
        name: int(match.group(1))
        for name, _ in engine.parts(direction)
        if (match := re.search(r"\.(?:layers|h)\.(\d+)\.", name))
    }
    # Squared norm of g_s, squared norm of the useful gradient, their inner product.
    sums = torch.zeros(
        max(layers.values(), default=-1) + 1, 3, dtype=torch.float64, device=engine.device
    )
    for (name, g), (_, u) in zip(engine.parts(direction), engine.parts(useful), strict=True):
        if name in layers:
            g, u = g.double(), u.double()
            sums[layers[name]] += torch.stack(
                [torch.dot(g, g), torch.dot(u, u), torch.dot(g, u)]
            ).to(engine.device)
    rows = []
    for layer, (gg, uu, gu) in enumerate(engine.sum_over_ranks(sums).tolist()):
        if layer in layers.values():
            scale = (gg * uu) ** 0.5
            rows.append(
                {
                    "layer": layer,
                    "safety_norm": gg**0.5,
                    "useful_cosine": gu / scale if scale else 0.0,
                }
            )
    return rows
