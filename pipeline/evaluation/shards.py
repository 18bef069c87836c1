"""Shards of an evaluation: shard K of N answers the rows K, K+N, K+2N, ... of every set, and whoever finds all N done
merges them (stages/evaluate.py).

shard = PromptSlice.parse("2/8")
shard.check(len(sets["harmful"]))
shard.of(sets)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PromptSlice:
    """index: from 0 to count - 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> PromptSlice:
        """The shard that a command line names as K/N. ValueError where it is none."""
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        if not match:
            raise ValueError(
                f"--shard is '{text}', but it takes K/N: shard K of N, counted from 0, e.g. 0/4"
            )
        index, count = int(match[1]), int(match[2])
        if index >= count:
            which = f"K of K/{count} is at most {count - 1}" if count else "there is at least one"
            raise ValueError(f"--shard is '{text}', but shards are counted from 0: {which}")
        return cls(index, count)

    def check(self, harmful_prompts: int) -> None:
        """ValueError where there are more shards than harmful prompts:
        some would load a model to answer nothing that is judged.

        Other sets may be smaller than the number of shards.
        """
        if self.count > max(1, harmful_prompts):
            raise ValueError(
                f"--shard is '{self}', but there are {harmful_prompts} harmful prompts to share: N "
                f"of K/N is at most {harmful_prompts}"
            )

    def of(self, sets: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """This shard's rows of every set."""
        return {name: rows[self.index :: self.count] for name, rows in sets.items()}

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = PromptSlice(0, 1)


def interleaved(shares: list[list[Any]]) -> list[Any]:
    """The rows of a set from the shares of shards 0 to N-1.

    ValueError where their lengths are not those of one set's shares.
    """
    rows: list[Any] = [None] * sum(map(len, shares))
    for index, share in enumerate(shares):
        rows[index :: len(shares)] = share
    return rows
