"""No prompt in two places: pools take prompts in turn, and what one has taken no later one gets.

claims = Claims()
rows = claims.take("evaluation", rows, 150)

Every user turn of a conversation counts as a prompt, for the answers to all of them are trained on.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from typing import Any

Row = dict[str, Any]


def normalise(prompt: str) -> str:
    """NFKC, lower case, punctuation and white space folded."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", prompt).lower()).strip()


def user_turns(row: Row) -> list[str]:
    """What the user says in a row: its messages (a list, or JSON as written to a set), or its prompt where it has none."""
    return [message["content"] for message in _messages(row) if message["role"] == "user"]


class Claims:
    """Who holds which normalised prompt, and what was refused to whom."""

    def __init__(self) -> None:
        self.owner: dict[str, str] = {}
        self.taken: set[tuple[str, str]] = set()
        self.overlaps: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()

    def take(self, pool: str, rows: list[Row], count: int | None = None, by_prompt: bool = False) -> list[Row]:
        """The first `count` rows of whose user turns no other pool holds one, now the pool's; the others are counted by pool and owner.

        A duplicate within the pool is a conversation that is there already; by_prompt: one whose prompt is, for pools that keep no more.
        """
        kept: list[Row] = []
        for row in rows:
            if count is not None and len(kept) == count:
                break
            turns, whole = _keys(row), normalise(row["prompt"]) if by_prompt else _conversation(row)
            owner = next((self.owner[turn] for turn in turns if self.owner.get(turn, pool) != pool), None)
            if owner is not None:
                self.overlaps[f"{pool} / {owner}"] += 1
            elif (pool, whole) in self.taken:
                self.duplicates[pool] += 1
            else:
                self.owner |= dict.fromkeys(turns, pool)
                self.taken.add((pool, whole))
                kept.append(row)
        return kept

    def facts(self) -> dict[str, dict[str, int]]:
        """Counts for the manifest: rows left out because another pool ('later / earlier') or the same one holds their prompt."""
        return {"overlapping": dict(self.overlaps), "duplicate": dict(self.duplicates)}


def assert_disjoint(pools: dict[str, list[Row]]) -> None:
    """Raise ValueError where a normalised user turn stands in two pools: the last look at what is going to be written."""
    seen: dict[str, str] = {}
    for pool, rows in pools.items():
        for row in rows:
            for key, turn in _keys(row).items():
                if seen.setdefault(key, pool) != pool:
                    raise ValueError(f"the prompt '{turn[:60]}' is in {seen[key]} and in {pool}: no prompt may be shared")


def _keys(row: Row) -> dict[str, str]:
    """The row's user turns by their normalised form. One of signs alone is no prompt that could be shared, unless the row has no other."""
    turns = {normalise(turn): turn for turn in user_turns(row)}
    return {key: turn for key, turn in turns.items() if key} or turns


def _conversation(row: Row) -> str:
    """The normalised turns up to the answer, without the system's: of a single turn, the normalised prompt."""
    return "\n".join(normalise(message["content"]) for message in _messages(row) if message["role"] != "system")


def _messages(row: Row) -> list[dict[str, str]]:
    messages = row.get("messages")
    return (json.loads(messages) if isinstance(messages, str) else messages) or [{"role": "user", "content": row["prompt"]}]
