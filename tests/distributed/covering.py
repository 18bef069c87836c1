"""A small set of cases in which every combination that matters occurs:
a greedy covering array, the same one every time.

    chosen = cover(rows, requirements=lambda row: pairs(row))

rows: the valid combinations, each a mapping of factor to value.
What no valid row holds is never required, so exclusions need no care.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = Mapping[str, Any]


def groups(row: Row, size: int) -> set[frozenset[tuple[str, Any]]]:
    """All combinations of `size` of the row's (factor, value) pairs."""
    return {frozenset(group) for group in combinations(row.items(), size)}


def groups_with(row: Row, factor: str, size: int) -> set[frozenset[tuple[str, Any]]]:
    """As `groups`, but only combinations that hold `factor`."""
    rest = [item for item in row.items() if item[0] != factor]
    return {frozenset([(factor, row[factor]), *group]) for group in combinations(rest, size - 1)}


def cover(rows: Sequence[Row], requirements: Callable[[Row], Iterable[Hashable]]) -> list[Row]:
    """Rows that together meet every requirement any row meets.

    At each turn the row that meets most of what is left; of several the one whose values were used
    least, then the first.
    """
    bits: dict[Hashable, int] = {}
    masks = [
        sum(1 << bits.setdefault(requirement, len(bits)) for requirement in set(requirements(row)))
        for row in rows
    ]
    left, chosen, used = (1 << len(bits)) - 1, [], Counter()

    def rank(index: int) -> tuple[int, int]:
        return (masks[index] & left).bit_count(), -sum(used[item] for item in rows[index].items())

    while left:
        best = max(range(len(rows)), key=rank)
        chosen.append(rows[best])
        used.update(rows[best].items())
        left &= ~masks[best]
    return chosen
