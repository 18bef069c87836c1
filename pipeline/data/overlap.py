"""No prompt in two places: pools take prompts in turn, and what one has taken no later one gets.

claims = Claims()
rows = claims.take("evaluation", rows, 150)
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

Row = dict[str, Any]


def normalise(prompt: str) -> str:
    """NFKC, lower case, punctuation and white space folded."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", prompt).lower()).strip()


class Claims:
    """Who holds which normalised prompt, and what was refused to whom."""

    def __init__(self) -> None:
        self.owner: dict[str, str] = {}
        self.overlaps: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()

    def take(self, pool: str, rows: list[Row], count: int | None = None) -> list[Row]:
        """The first `count` rows whose prompts are free, now the pool's; rows with taken ones are counted by pool and owner."""
        taken = []
        for row in rows:
            if count is not None and len(taken) == count:
                break
            key = normalise(row["prompt"])
            owner = self.owner.get(key)
            if owner is None:
                self.owner[key] = pool
                taken.append(row)
            elif owner == pool:
                self.duplicates[pool] += 1
            else:
                self.overlaps[f"{pool} / {owner}"] += 1
        return taken

    def facts(self) -> dict[str, dict[str, int]]:
        """Counts for the manifest: rows left out because another pool ('later / earlier') or the same one holds their prompt."""
        return {"overlapping": dict(self.overlaps), "duplicate": dict(self.duplicates)}


def assert_disjoint(pools: dict[str, list[Row]]) -> None:
    """Raise ValueError where a normalised prompt stands in two pools: the last look at what was really written."""
    seen: dict[str, str] = {}
    for pool, rows in pools.items():
        for row in rows:
            key = normalise(row["prompt"])
            if seen.setdefault(key, pool) != pool:
                raise ValueError(f"the prompt '{row['prompt'][:60]}' is in {seen[key]} and in {pool}: no prompt may be shared")
