"""No prompt in two places: pools take prompts in turn, and what one has taken no later one gets.

claims = Claims()
rows = claims.take("safety_pairs", rows, 48)
write_held(claims.owner, folder / "held.parquet")             # for who comes later: the evaluation
claims = Claims(read_held(folder / "held.parquet"))

Every user turn of a conversation counts as a prompt, for the answers to all of them are trained on. A prompt is known
by the sha256 of its normalised text, so that the file that says who holds which prompt holds no prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Held = dict[bytes, str]  # sha256 of a normalised user turn -> the pool that holds it


def normalise(prompt: str) -> str:
    """NFKC, lower case, punctuation and white space folded."""
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", prompt).lower()).strip()


def user_turns(row: Row) -> list[str]:
    """What the user says in a row: its messages (a list, or JSON as written to a set), or its prompt where it has none.

    Of a prompt that was rewritten (forms.py), what it was before, too.
    """
    turns = [message["content"] for message in _messages(row) if message["role"] == "user"]
    return [*turns, row["rewritten"]] if row.get("rewritten") else turns


class Claims:
    """Who holds which normalised prompt, and what was refused to whom."""

    def __init__(self, held: Held | None = None) -> None:
        """held: prompts that pools of an earlier stage hold already."""
        self.owner: Held = dict(held or {})
        self.taken: set[tuple[str, str]] = set()
        self.overlaps: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()

    def take(self, pool: str, rows: Iterable[Row], count: int | None = None, by_prompt: bool = False) -> list[Row]:
        """The first `count` rows of whose user turns no other pool holds one, now the pool's; the others are counted by pool and owner.

        A duplicate within the pool is a conversation that is there already; by_prompt: one whose prompt is, for pools that keep no more.
        """
        kept: list[Row] = []
        for row in rows:
            if count is not None and len(kept) == count:
                break
            turns, whole = _keys(row), normalise(row["prompt"]) if by_prompt else conversation(row)
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

    def free(self, pool: str, rows: list[Row], by_prompt: bool = False) -> list[Row]:
        """The rows that `take` would give the pool if it took all, without taking any; the others are counted as there."""
        trial = Claims(self.owner)
        trial.taken = set(self.taken)
        kept = trial.take(pool, rows, by_prompt=by_prompt)
        self.overlaps += trial.overlaps
        self.duplicates += trial.duplicates
        return kept

    def facts(self) -> dict[str, dict[str, int]]:
        """Counts for the manifest: rows left out because another pool ('later / earlier') or the same one holds their prompt."""
        return {"overlapping": dict(self.overlaps), "duplicate": dict(self.duplicates)}


def assert_disjoint(pools: dict[str, list[Row]], held: Held | None = None) -> Held:
    """Who holds which prompt: `held` by earlier stages, and every normalised user turn of the pools.

    The last look at what is going to be written. Raises ValueError where a prompt stands in two pools.
    """
    seen = dict(held or {})
    for pool, rows in pools.items():
        for row in rows:
            for key, turn in _keys(row).items():
                if seen.setdefault(key, pool) != pool:
                    raise ValueError(f"the prompt '{turn[:60]}' is in {seen[key]} and in {pool}: no prompt may be shared")
    return seen


def write_held(held: Held, path: Path) -> None:
    """Leave who holds which prompt in a Parquet file: sha256 (32 bytes) and pool."""
    import pyarrow
    import pyarrow.parquet

    prompts, pools = pyarrow.array(list(held), pyarrow.binary(32)), pyarrow.array(list(held.values()), pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"sha256": prompts, "pool": pools}), path)


def read_held(path: Path) -> Held:
    """What `write_held` left."""
    import pyarrow.parquet

    columns = pyarrow.parquet.read_table(path).to_pydict()
    return dict(zip(columns["sha256"], columns["pool"], strict=True))


def _keys(row: Row) -> dict[bytes, str]:
    """The row's user turns by their prompt's digest.

    One of signs alone is no prompt that could be shared, unless the row has no other.
    """
    turns = {normalise(turn): turn for turn in user_turns(row)}
    return {hashlib.sha256(key.encode()).digest(): turn for key, turn in turns.items() if key or not any(turns)}


def conversation(row: Row) -> str:
    """The normalised turns up to the answer, without the system's: of a single turn, the normalised prompt."""
    return "\n".join(normalise(message["content"]) for message in _messages(row) if message["role"] != "system")


def _messages(row: Row) -> list[dict[str, str]]:
    messages = row.get("messages")
    return (json.loads(messages) if isinstance(messages, str) else messages) or [{"role": "user", "content": row["prompt"]}]
