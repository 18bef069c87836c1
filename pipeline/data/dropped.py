"""What is left out of the sets, and why: counted, said in a line a reason, and listed in a file.

    dropped = Dropped()
    dropped.add("data.task", "overlapping", row, "safety_pairs")
    dropped.say()
    dropped.write(folder / LISTED)

The file names a row by its number in its source, from 1 on, a heading not counted. It holds no text: data may be
private.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pipeline import artifacts

Row = dict[str, Any]
Reason = Literal["overlapping", "duplicate", "no_common_prompt", "no_difference", "too_long"]

LISTED = "dropped.jsonl"
_SHOWN = 5  # row numbers in a line
_FIELDS = {
    "safety_pairs": "data.safety",
    "harmful_mix": "data.harmful",
    "align_refusals": "data.refusals",
    "align_harmless": "data.harmless",
}
_SAID: dict[Reason, str] = {
    "overlapping": "for {other} has the prompt already",
    "duplicate": "for another says the same",
    "no_common_prompt": "for chosen and rejected answer different conversations",
    "no_difference": "for chosen and rejected are the same within data.safety_max_length",
    "too_long": "for nothing of the response is left within {other}",
}


class Dropped:
    """Rows that were left out, in the order in which they were."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def add(self, pool: str, reason: Reason, row: Row, other: str = "") -> None:
        """pool: the set, or the field, that the row is left out of; row: its `row` is the number in the source.

        other: the set that holds the prompt, or the field that a row is too long for.
        """
        field = _FIELDS.get(pool, pool.removesuffix(", validation"))
        self.entries.append({"field": field, "reason": reason, "other": other, "row": row.get("row")})

    def say(self, but: tuple[Reason, ...] = ()) -> None:
        """Print a line for every field and reason, with the count and the first rows. but: what is said elsewhere."""
        counted = Counter((entry["field"], entry["reason"], entry["other"]) for entry in self.entries)
        for (field, reason, other), count in counted.items():
            if reason not in but:
                which = {"field": field, "reason": reason, "other": other}
                rows = sorted(entry["row"] or 0 for entry in self.entries if which.items() <= entry.items())
                first = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if count > _SHOWN else "")
                noun = "rows" if count > 1 else "row"
                line = f"{field}: {count} {noun} left out, {_SAID[reason].format(other=other)} ({noun} {first})"
                print(line, file=sys.stderr, flush=True)

    def write(self, path: Path) -> None:
        """One JSON object a line: field, reason, other and row. An empty file where nothing was left out."""
        artifacts.write_text(path, "".join(json.dumps(entry) + "\n" for entry in self.entries))
