"""Micro-batches by a budget of tokens, as numbers: rows of like length go together, or rows are packed end to end.

Needs no torch.

    cut([300, 20, 280, 25], budget=600, ranks=1)      # [[0, 2], [3, 1]]: 2 x 300 tokens, then 2 x 25
    pack([300, 20, 280, 25], budget=600, ranks=2)     # [[0, 1], [2, 3]]: 320 tokens, then 305
"""

from __future__ import annotations

import heapq
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
    assert lengths and max(lengths) <= budget, (
        "a row is longer than the token budget: the recipe's check lets none by"
    )
    # Rows of equal length stay in the step's order, so that the cut depends on nothing else.
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    most = most or len(lengths)
    least = len(_filled(lengths, order, budget, most))
    number = min(-(-least // ranks) * ranks, len(lengths))
    low, high = max(lengths), budget
    # the lowest bound that so many micro-batches can keep: all are then of about the same cost
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle)
            if len(_filled(lengths, order, middle, most)) <= number
            else (middle + 1, high)
        )
    chunks = _filled(lengths, order, low, most)
    while len(chunks) < number:
        costliest = max(
            (chunk for chunk in chunks if len(chunk) > 1), key=lambda chunk: cost(lengths, chunk)
        )
        chunks.remove(costliest)
        half = len(costliest) // 2
        chunks += [costliest[:half], costliest[half:]]
    return sorted(chunks, key=lambda chunk: -cost(lengths, chunk))


def pack(lengths: Sequence[int], budget: int, ranks: int, most: int | None = None) -> list[Chunk]:
    """As `cut`, but for rows that lie end to end: a micro-batch costs the sum of its rows' lengths.

    Their number is the one that first-fit decreasing takes (the least there is, or close to it: to find the least is
    NP-hard), rounded up to a multiple of `ranks`. Then the longest row goes to the emptiest micro-batch, and so on,
    which levels them; where that does not keep the budget, first-fit's own are kept, and the longest halved.
    """
    assert lengths and max(lengths) <= budget, (
        "a row is longer than the token budget: the recipe's check lets none by"
    )
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    most = most or len(lengths)
    fitted = _first_fit(lengths, order, budget, most)
    number = min(-(-len(fitted) // ranks) * ranks, len(lengths))
    chunks = _levelled(lengths, order, number)
    if any(_total(lengths, chunk) > budget or len(chunk) > most for chunk in chunks):
        chunks = fitted
        while len(chunks) < number:
            costliest = max(
                (chunk for chunk in chunks if len(chunk) > 1),
                key=lambda chunk: _total(lengths, chunk),
            )
            chunks.remove(costliest)
            chunks += [costliest[::2], costliest[1::2]]
    return sorted(chunks, key=lambda chunk: -_total(lengths, chunk))


def _first_fit(lengths: Sequence[int], order: Sequence[int], budget: int, most: int) -> list[Chunk]:
    chunks: list[Chunk] = []
    left: list[int] = []
    for position in order:
        fits = (
            number
            for number, room in enumerate(left)
            if lengths[position] <= room and len(chunks[number]) < most
        )
        number = next(fits, len(chunks))
        if number == len(chunks):
            chunks.append([])
            left.append(budget)
        chunks[number].append(position)
        left[number] -= lengths[position]
    return chunks


def _levelled(lengths: Sequence[int], order: Sequence[int], number: int) -> list[Chunk]:
    """`number` micro-batches of nearly the same cost; none is empty where there are as many rows."""
    emptiest = [(0, index) for index in range(number)]
    chunks: list[Chunk] = [[] for _ in range(number)]
    for position in order:
        total, index = heapq.heappop(emptiest)
        chunks[index].append(position)
        heapq.heappush(emptiest, (total + lengths[position], index))
    return chunks


def _total(lengths: Sequence[int], chunk: Chunk) -> int:
    return sum(lengths[position] for position in chunk)


def cost(lengths: Sequence[int], chunk: Chunk) -> int:
    """Tokens of a micro-batch once its rows are padded to the longest."""
    return len(chunk) * max(lengths[position] for position in chunk)


def _filled(lengths: Sequence[int], order: Sequence[int], bound: int, most: int) -> list[Chunk]:
    """The fewest micro-batches that cost at most `bound` each and have at most `most` rows:
    from the longest row on, each takes all that it can.
    """
    chunks: list[Chunk] = []
    for position in order:
        if (
            not chunks
            or len(chunks[-1]) == most
            or (len(chunks[-1]) + 1) * lengths[chunks[-1][0]] > bound
        ):
            chunks.append([])
        chunks[-1].append(position)
    return chunks
