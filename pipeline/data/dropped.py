"""What is left out of the sets, and why: counted, said in a line a reason, and listed in a file.

    dropped = Dropped()
    dropped.add("data.task", "overlapping", row, "safety_pairs")
    dropped.say()
    dropped.write(folder / LISTED)

The file names a row by where it stands in its source (malformed.Place). It holds no text: data may be private.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from pipeline import artifacts
from pipeline.data.malformed import Place, named

Row = dict[str, Any]
Reason = Literal[
    "overlapping", "duplicate", "no_common_prompt", "no_difference", "too_long", "not_trained"
]

LISTED = "dropped.jsonl"
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
    "not_trained": "for no turn of theirs is to be trained",
}


class Dropped:
    """Rows that were left out, in the order in which they were."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def add(
        self, pool: str, reason: Reason, row: Row, other: str = "", tokens: int | None = None
    ) -> None:
        """pool: the set, or the field, that the row is left out of; row: its `row` is its Place in the source.

        other: the set that holds the prompt, or the field that a row is too long for. tokens: how many it would take.
        """
        field = _FIELDS.get(pool, pool.removesuffix(", validation"))
        place = row.get("row") or Place(0)
        self.entries.append(
            {"field": field, "reason": reason, "other": other, "place": place, "tokens": tokens}
        )

    def say(self, but: tuple[Reason, ...] = ()) -> None:
        """Print a line for every field and reason, with the count and the first rows. but: what is said elsewhere."""
        groups: dict[tuple[str, Reason, str], list[dict[str, Any]]] = {}
        for entry in self.entries:
            groups.setdefault((entry["field"], entry["reason"], entry["other"]), []).append(entry)
        for (field, reason, other), entries in groups.items():
            if reason not in but:
                count, noun = len(entries), "rows" if len(entries) > 1 else "row"
                places = sorted(
                    (entry["place"] for entry in entries),
                    key=lambda place: (place.part, place.number),
                )
                lengths = [entry["tokens"] for entry in entries if entry["tokens"]]
                needed = f"; they need {_span(lengths)} tokens" if lengths else ""
                line = (
                    f"{field}: {count} {noun} left out, {_SAID[reason].format(other=other)} "
                    f"({named(places)}{needed})"
                )
                print(line, file=sys.stderr, flush=True)

    def shortest(self, field: str) -> tuple[int, Place] | None:
        """Tokens and place of the row of a field that is the least too long; None where none is."""
        found = [
            (entry["tokens"], entry["place"])
            for entry in self.entries
            if entry["field"] == field and entry["tokens"]
        ]
        return min(found, key=lambda item: item[0], default=None)

    def write(self, path: Path) -> None:
        """One JSON object a line: field, reason, other, place and tokens. An empty file where nothing was left out."""
        artifacts.write_text(
            path,
            "".join(
                json.dumps(entry | {"place": str(entry["place"])}) + "\n" for entry in self.entries
            ),
        )


def _span(numbers: list[int]) -> str:
    return (
        f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
    )
