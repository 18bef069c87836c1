"""One vector a sample: a decoder layer's output at the response, from a model that may be sharded.

    vectors = embed(engine, rows, layer=15, position="response_mean", micro_batch_size=8, pad_id=0)
    # (N, D) float32, on every rank

Every rank runs its share of the batches; the model is never whole. No gradients, no dropout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pipeline.engines.engine import Engine
from pipeline.model.models import decoder_layers, hidden_size
from pipeline.objectives.batches import IGNORE

Position = Literal["response_start", "response_mean", "response_end"]


@dataclass(frozen=True)
class _Batch:
    """input_ids, attention_mask: int64 (B, T); weights: float32 (B, T),
    which positions make up a sample's vector; samples: their numbers.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    weights: torch.Tensor
    samples: torch.Tensor

    def to(self, device: torch.device) -> _Batch:
        return _Batch(
            *(
                tensor.to(device)
                for tensor in (self.input_ids, self.attention_mask, self.weights, self.samples)
            )
        )


def embed(
    engine: Engine,
    rows: Sequence[dict[str, Any]],
    layer: int,
    position: Position,
    micro_batch_size: int,
    pad_id: int,
) -> torch.Tensor:
    """Embeddings (N, D), float32, of rows with input_ids and labels, at the last response of each.

    A collective call.
    """
    found = torch.zeros(len(rows), hidden_size(engine.module), device=engine.device)
    seen: list[torch.Tensor] = []
    handle = decoder_layers(engine.module)[layer].register_forward_hook(
        lambda _m, _i, output: seen.append(output if torch.is_tensor(output) else output[0])
    )
    progress = _Progress(engine, len(rows))

    def collect(model: nn.Module, batch: _Batch) -> torch.Tensor:
        seen.clear()
        # One position's logits: the head is not needed, but every weight has to be gathered in the order ZeRO-3 knows.
        model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            logits_to_keep=1,
            use_cache=False,
        )
        found[batch.samples] = torch.einsum("btd,bt->bd", seen[-1].float(), batch.weights)
        progress.done(len(batch.samples))
        return engine.zero()

    try:
        engine.loss(
            collect,
            _batches(rows, position, micro_batch_size, engine.rank, engine.world_size, pad_id),
        )
    finally:
        handle.remove()
    return engine.sum_over_ranks(found).cpu()  # a sample is zero on every rank but one


def position_weights(labels: Sequence[int], position: Position) -> list[float]:
    """Weights (T) over positions, summing to 1. The response is the last run of supervised tokens.

    response_start: the token before it, where the model has read the prompt and nothing of the answer (as published);
    response_mean: all of its tokens; response_end: its last one.
    """
    supervised = [index for index, label in enumerate(labels) if label != IGNORE]
    end = supervised[-1]
    start = end
    while start and labels[start - 1] != IGNORE:
        start -= 1
    chosen = {
        "response_start": [max(start - 1, 0)],
        "response_mean": list(range(start, end + 1)),
        "response_end": [end],
    }[position]
    weights = [0.0] * len(labels)
    for index in chosen:
        weights[index] = 1.0 / len(chosen)
    return weights


def _batches(
    rows: Sequence[dict[str, Any]],
    position: Position,
    size: int,
    rank: int,
    world_size: int,
    pad_id: int,
) -> list[_Batch]:
    """This rank's batches, of samples of like length.

    Ranks have equally many, some perhaps the last one again: a rank with one less would hang.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    share = -(-len(chunks) // world_size)
    own = [chunks[min(rank + number * world_size, len(chunks) - 1)] for number in range(share)]
    repeated = [rank + number * world_size >= len(chunks) for number in range(share)]
    return [
        _padded(rows, chunk, position, pad_id, weight=0.0 if again else 1.0)
        for chunk, again in zip(own, repeated, strict=True)
    ]


def _padded(
    rows: Sequence[dict[str, Any]], chunk: list[int], position: Position, pad_id: int, weight: float
) -> _Batch:
    width = max(len(rows[i]["input_ids"]) for i in chunk)

    def fill(values: Sequence[float], value: float) -> list[float]:
        return [*values, *[value] * (width - len(values))]

    ids = [fill(rows[i]["input_ids"], pad_id) for i in chunk]
    mask = [fill([1] * len(rows[i]["input_ids"]), 0) for i in chunk]
    weights = (
        torch.tensor([fill(position_weights(rows[i]["labels"], position), 0.0) for i in chunk])
        * weight
    )
    return _Batch(torch.tensor(ids), torch.tensor(mask), weights, torch.tensor(chunk))


class _Progress:
    def __init__(self, engine: Engine, total: int):
        self.engine, self.total, self.count, self.started, self.last = (
            engine,
            total,
            0,
            time.monotonic(),
            0.0,
        )

    def done(self, count: int) -> None:
        self.count += count
        now = time.monotonic()
        if self.engine.rank == 0 and (now - self.last > 5):
            self.last = now
            about = min(self.count * self.engine.world_size, self.total)
            print(
                f"[filter] about {about}/{self.total} samples read, {now - self.started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
