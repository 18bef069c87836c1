"""Batches: which samples make up global step t, and how ranks and micro-batches share them.

The order depends on (seed, step) alone, never on the number of ranks, so a resumed run needs only its step number.
Rank r of w takes every w-th micro-batch of the step. 1 and N ranks see the same micro-batches, with the same dropout,
where batch_size divides by micro_batch_size x N. With a budget of tokens (buckets.py), packed or not, they do in the
steps where the least number of micro-batches that keeps the budget divides by N. In all other cases the same samples
are cut in another way, as packing does too: but for dropout, loss and gradient of the step are the same sums.

    order = BatchOrder(num_samples=900, batch_size=8, seed=0)
    batches = micro_batches(rows, order.step(17), micro_batch_size=2, rank=0, world_size=2, pad_id=0, seed=0, step=17)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline.objectives import buckets
from pipeline.objectives.sharing import accumulation

IGNORE = -100


@dataclass(frozen=True)
class Targets:
    """Where labels are supervised, found before a batch moves: a GPU that is asked makes the host wait for it.

    columns: (P,), positions whose next token is supervised in some row. places: (N,), supervised ones in the flattened
    (B, P). tokens, rows: (N,), the next token there, and its row. All int64.
    """

    columns: torch.Tensor
    places: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, labels: torch.Tensor) -> Targets:
        """labels: int64 (B, T)."""
        following = labels[:, 1:]
        supervised = following != IGNORE
        columns = supervised.any(dim=0).nonzero().squeeze(1)
        kept = supervised[:, columns]
        return cls(
            columns,
            kept.flatten().nonzero().squeeze(1),
            following[:, columns][kept],
            kept.nonzero()[:, 0],
        )

    def to(self, device: torch.device | str) -> Targets:
        """The same on `device`."""
        return Targets(
            *(
                _moved(tensor, device)
                for tensor in (self.columns, self.places, self.tokens, self.rows)
            )
        )


# Stands for the targets that a batch finds when it is made.
_OF_THE_LABELS = Targets(*[torch.empty(0, dtype=torch.int64)] * 4)


@dataclass(frozen=True)
class Packed:
    """Samples end to end in one row, of which none may see another.

    positions, samples: int64 (1, T), a token's place in its sample and the number of the sample. borders: int32
    (samples + 1,), where each begins, and T. longest: tokens of the longest sample. Found before a batch moves, as
    Targets are.
    """

    positions: torch.Tensor
    samples: torch.Tensor
    borders: torch.Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Packed:
        """lengths: tokens of each sample, in the row's order."""
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        borders = torch.tensor([0, *lengths]).cumsum(0)
        positions = torch.arange(len(numbers)) - borders[numbers]
        return cls(positions[None], numbers[None], borders.int(), max(lengths))

    def to(self, device: torch.device | str) -> Packed:
        """The same on `device`."""
        positions, samples, borders = (
            _moved(tensor, device) for tensor in (self.positions, self.samples, self.borders)
        )
        return Packed(positions, samples, borders, self.longest)


@dataclass(frozen=True)
class MicroBatch:
    """input_ids, labels: int64 (B, T), right-padded.

    global_tokens: supervised tokens of the whole step. padding: of the B x T, how many.

    There is no attention mask: what is causal never sees the padding behind it, and padding is not supervised.
    packed: where B is 1 and the row holds several samples; no label is then a sample's first token, which the sample
    before it would have to foretell.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    global_tokens: int
    seed: int
    padding: int = 0
    targets: Targets = _OF_THE_LABELS  # unless given
    packed: Packed | None = None

    def __post_init__(self) -> None:
        _find_targets(self)

    def to(self, device: torch.device | str) -> MicroBatch:
        """What a pass needs of it, there; labels stay, of which targets say all."""
        packed = self.packed and self.packed.to(device)
        return replace(
            self,
            input_ids=_moved(self.input_ids, device),
            targets=self.targets.to(device),
            packed=packed,
        )


@dataclass(frozen=True)
class PairBatch:
    """As MicroBatch, B = 2 x pairs: chosen rows, then rejected rows. global_pairs: pairs of the whole step.

    weights: float32 (pairs,), 1, or 0 for a filler: a pair without supervised tokens is no zero
    under every contrastive loss.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    global_pairs: int
    seed: int
    targets: Targets = _OF_THE_LABELS  # unless given

    def __post_init__(self) -> None:
        _find_targets(self)

    def to(self, device: torch.device | str) -> PairBatch:
        """As MicroBatch's."""
        return replace(
            self,
            input_ids=_moved(self.input_ids, device),
            weights=_moved(self.weights, device),
            targets=self.targets.to(device),
        )


def _moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """On its way to the device.

    From pinned memory: a copy from any other makes the host wait for all that the GPU has to do before.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu" and tensor.numel():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _find_targets(batch: MicroBatch | PairBatch) -> None:
    if batch.targets is _OF_THE_LABELS:
        object.__setattr__(batch, "targets", Targets.of(batch.labels))


@dataclass(frozen=True)
class BatchOrder:
    """A fresh permutation of the samples in every epoch; a batch may straddle two epochs,
    so that all steps are full.
    """

    num_samples: int
    batch_size: int
    seed: int

    def step(self, step: int) -> list[int]:
        """Sample indices of global step `step` (from 0)."""
        first = step * self.batch_size
        return [
            self._epoch(position // self.num_samples)[position % self.num_samples]
            for position in range(first, first + self.batch_size)
        ]

    def _epoch(self, epoch: int) -> list[int]:
        cached = self.__dict__.get("_cache")
        if cached is None or cached[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            cached = (epoch, torch.randperm(self.num_samples, generator=generator).tolist())
            object.__setattr__(self, "_cache", cached)
        return cached[1]


def micro_batches(
    rows: Sequence[dict[str, Any]], indices: list[int], micro_batch_size: int, rank: int, world_size: int, pad_id: int,
    seed: int, step: int, token_budget: int | None = None, most_rows: int | None = None, packing: bool = False,
) -> list[MicroBatch]:  # fmt: skip
    """This rank's MicroBatches of one step. rows[i]: input_ids and labels (lists of int).

    token_budget: the most tokens of a micro-batch, padding included, in place of micro_batch_size; rows of like length
    go together then. No row may be longer. most_rows: of a micro-batch under a budget, for sets that are larger than a
    step: with more of them a pass could hold more than the planner says. packing: samples of a micro-batch lie end to
    end in one row, without padding; needs a budget.
    """
    chosen = {i: rows[i] for i in indices}  # a stored row is made anew whenever it is asked for
    global_tokens = sum(_supervised(chosen[i]["labels"]) for i in indices)
    if token_budget is None:
        chunks = _chunks(indices, micro_batch_size, world_size)
    else:
        lengths = [len(chosen[i]["input_ids"]) for i in indices]
        chunks = _budgeted(indices, lengths, token_budget, world_size, most_rows, packing)
    batches = []
    for number, (chunk, weight) in enumerate(chunks):
        if number % world_size == rank:
            ids, labels = zip(
                *((chosen[i]["input_ids"], _weighed(chosen[i]["labels"], weight)) for i in chunk),
                strict=True,
            )
            lengths = list(map(len, ids))
            packed = Packed.of(lengths) if packing and len(chunk) > 1 else None
            tensors = _end_to_end(ids, labels) if packed else pad_rows(ids, labels, pad_id)
            padding, masks = tensors[0].numel() - sum(lengths), _mask_seed(seed, step, number)
            batches.append(MicroBatch(*tensors, global_tokens, masks, padding, packed=packed))
    return batches


def pair_batches(
    rows: Sequence[dict[str, Any]],
    indices: list[int],
    micro_batch_size: int,
    rank: int,
    world_size: int,
    pad_id: int,
    seed: int,
    step: int,
) -> list[PairBatch]:
    """This rank's PairBatches of one step. rows[i]: chosen_/rejected_ input_ids and labels."""
    batches = []
    for number, (chunk, weight) in enumerate(_chunks(indices, micro_batch_size, world_size)):
        if number % world_size == rank:
            ids = [rows[i][f"{side}_input_ids"] for side in ("chosen", "rejected") for i in chunk]
            labels = [
                _weighed(rows[i][f"{side}_labels"], weight)
                for side in ("chosen", "rejected")
                for i in chunk
            ]
            weights = torch.full((len(chunk),), weight)
            batches.append(
                PairBatch(
                    *pad_rows(ids, labels, pad_id),
                    weights,
                    len(indices),
                    _mask_seed(seed, step, number),
                )
            )
    return batches


def _supervised(labels: list[int]) -> int:
    return len(labels) - 1 - labels[1:].count(IGNORE)


def _weighed(labels: list[int], weight: float) -> list[int]:
    return labels if weight else [IGNORE] * len(labels)


def _chunks(indices: list[int], size: int, world_size: int) -> list[tuple[list[int], float]]:
    """Micro-batches of at most `size`, as equal as can be, their number a multiple of the ranks:
    a rank with one pass fewer would hang.

    Where there are fewer samples than that, fillers of weight 0 (a copy of the last sample,
    to be left unsupervised) make the number up.
    """
    number = accumulation(len(indices), size, world_size) * world_size
    if len(indices) < number:
        return [([index], 1.0) for index in indices] + [(indices[-1:], 0.0)] * (
            number - len(indices)
        )
    bounds = [round(part * len(indices) / number) for part in range(number + 1)]
    return [(indices[start:stop], 1.0) for start, stop in itertools.pairwise(bounds)]


def _budgeted(
    indices: list[int],
    lengths: list[int],
    budget: int,
    world_size: int,
    most: int | None,
    packing: bool,
) -> list[tuple[list[int], float]]:
    """As _chunks, but of at most `budget` tokens each. lengths: of the samples. The filler is the shortest row."""
    divided = (buckets.pack if packing else buckets.cut)(lengths, budget, world_size, most)
    chunks = [[indices[position] for position in chunk] for chunk in divided]
    shortest = indices[min(range(len(indices)), key=lengths.__getitem__)]
    return [(chunk, 1.0) for chunk in chunks] + [([shortest], 0.0)] * (-len(chunks) % world_size)


Sequences = Sequence[Sequence[int]]


def pad_rows(
    input_ids: Sequences, labels: Sequences, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and labels, int64 (B, T), right-padded to the longest row."""
    width = max(len(ids) for ids in input_ids)

    def filled(sequences: Sequences, value: int) -> torch.Tensor:
        padded = np.full((len(sequences), width), value, np.int64)
        for row, sequence in zip(padded, sequences, strict=True):
            row[: len(sequence)] = sequence
        return torch.from_numpy(padded)

    return filled(input_ids, pad_id), filled(labels, IGNORE)


def _end_to_end(input_ids: Sequences, labels: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and labels, int64 (1, T), of samples in one row; their first tokens are nobody's to foretell."""
    ids, following = (
        np.concatenate([np.asarray(row, np.int64) for row in rows]) for rows in (input_ids, labels)
    )
    following[np.cumsum([0, *map(len, labels[:-1])])] = IGNORE
    return torch.from_numpy(ids)[None], torch.from_numpy(following)[None]


def _mask_seed(seed: int, step: int, number: int) -> int:
    return (seed * 1_000_003 + step) * 4_099 + number
