"""Micro-batches by a budget of tokens, as numbers: rows of like length go together, so that little is padded.

Needs no torch.

    cut([300, 20, 280, 25], budget=600, ranks=1)      # [[0, 2], [3, 1]]: 2 x 300 tokens, then 2 x 25
"""

from __future__ import annotations

from collections.abc import Sequence

Chunk = list[int]


def cut(lengths: Sequence[int], budget: int, ranks: int, most: int | None = None) -> list[Chunk]:
    """Positions in `lengths` by micro-batch, the costliest micro-batch first; each position is in exactly one.

    lengths: tokens of every row, none above `budget`. A micro-batch costs its rows x its longest row, which is what
    padding makes it, and costs at most `budget` tokens. Their number is the least that the budget allows, rounded up
    to a multiple of `ranks`; where there are fewer rows than that, one row each. The costliest micro-batch is as cheap
    as it can be among all cuts of that number. most: rows of a micro-batch, where they are bounded too.

    Neighbours cost nearly the same. So ranks that take them in turn have about as much to do in every pass, and wait
    little for each other's weights.
    """
    assert lengths and max(lengths) <= budget, "a row is longer than the token budget: the recipe's check lets none by"
    # Rows of equal length stay in the step's order, so that the cut depends on nothing else.
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    most = most or len(lengths)
    least = len(_filled(lengths, order, budget, most))
    number = min(-(-least // ranks) * ranks, len(lengths))
    low, high = max(lengths), budget
    while low < high:  # the lowest bound that so many micro-batches can keep: all are then of about the same cost
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(lengths, order, middle, most)) <= number else (middle + 1, high)
    chunks = _filled(lengths, order, low, most)
    while len(chunks) < number:
        costliest = max((chunk for chunk in chunks if len(chunk) > 1), key=lambda chunk: cost(lengths, chunk))
        chunks.remove(costliest)
        half = len(costliest) // 2
        chunks += [costliest[:half], costliest[half:]]
    return sorted(chunks, key=lambda chunk: -cost(lengths, chunk))


def cost(lengths: Sequence[int], chunk: Chunk) -> int:
    """Tokens of a micro-batch once its rows are padded to the longest."""
    return len(chunk) * max(lengths[position] for position in chunk)


def _filled(lengths: Sequence[int], order: Sequence[int], bound: int, most: int) -> list[Chunk]:
    """The fewest micro-batches that cost at most `bound` each and have at most `most` rows: from the longest row on, each takes all that it can."""
    chunks: list[Chunk] = []
    for position in order:
        if not chunks or len(chunks[-1]) == most or (len(chunks[-1]) + 1) * lengths[chunks[-1][0]] > bound:
            chunks.append([])
        chunks[-1].append(position)
    return chunks
