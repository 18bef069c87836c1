"""Rows that cannot be used: where each stands, what is wrong with it, and how many may be left out.

    skipped = Skipped()
    skipped.leave_out("data.task", source, bad, 80)           # ValueError above data.task.max_bad_rows
    skipped.facts()                                           # {"data.task": {"no response": 3}}
    skipped.write(folder)                                     # folder / "skipped.jsonl"

No row is left out without a count. What is written holds no content of a row, because data may be private.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipeline.recipe.redaction import redact
from pipeline.recipe.sections import SourceSection

SKIPPED = "skipped.jsonl"
_SHOWN = 5  # places that a sentence names of every reason


@dataclass(frozen=True)
class Place:
    """Where a row stands: the number (1-based) of its first line or of the row, and its file where a folder is read."""

    number: int
    kind: str = "row"  # or "line"
    part: str = ""

    def __str__(self) -> str:
        return (
            f"{self.part}, {self.kind} {self.number}" if self.part else f"{self.kind} {self.number}"
        )


@dataclass(frozen=True)
class Bad:
    """A malformed row. reason: its kind of mistake, without content of the row. said: what the console says of it."""

    place: Place
    reason: str
    said: str


class Skipped:
    """Malformed rows that were left out, by the recipe's field."""

    def __init__(self) -> None:
        # field -> source, number of its rows, the malformed
        self.found: dict[str, tuple[str, int, list[Bad]]] = {}
        self.totals: dict[str, int] = {}  # field -> number of its source's rows
        # field -> sentences about what is there and not used, or used as it is
        self.notes: dict[str, list[str]] = {}
        self.thoughts: dict[str, int] = {}  # field -> rows whose reasoning is left out

    def leave_out(self, field: str, source: SourceSection, bad: list[Bad], total: int) -> None:
        """Note that `bad` of `total` rows are left out. ValueError above the source's max_bad_rows."""
        if bad and len(bad) / total > source.max_bad_rows:
            raise ValueError(refusal(field, source, bad, total))
        self.totals[field] = total
        if bad:
            self.found[field] = source.source, total, bad

    def add(self, field: str, source: SourceSection, bad: Bad) -> None:
        """Note a row more, after `leave_out`: one that no conversation can be rendered of. Raises as `leave_out`."""
        before = self.found[field][2] if field in self.found else []
        self.leave_out(field, source, [*before, bad], self.totals[field])

    def note(self, field: str, sentences: list[str]) -> None:
        """Keep what is to be said of a field's source."""
        if sentences:
            self.notes[field] = sentences

    def facts(self) -> dict[str, dict[str, int]]:
        """Field -> reason -> number of rows, for the manifest."""
        return {
            field: dict(Counter(item.reason for item in bad))
            for field, (_, _, bad) in self.found.items()
        }

    def sentences(self) -> list[str]:
        """The notes, and for every field how many rows were left out, why, and where the first ones stand."""
        notes = [sentence for sentences in self.notes.values() for sentence in sentences]
        rows = [
            f"{field}: {len(bad)} of {total} rows of {redact(source)} are malformed and left out ({by_reason(bad)})"
            for field, (source, total, bad) in self.found.items()
        ]
        thoughts = [
            f"{field}: the reasoning of {count} rows is left out, as {field}.reasoning says"
            for field, count in self.thoughts.items()
        ]
        return notes + rows + thoughts

    def write(self, folder: Path) -> None:
        """Every row that was left out, a JSON line each: field, source, place, reason. No file where none was."""
        lines = [
            json.dumps(
                {
                    "field": field,
                    "source": redact(source),
                    "place": str(item.place),
                    "reason": item.reason,
                }
            )
            for field, (source, _, bad) in self.found.items()
            for item in bad
        ]
        if lines:
            (folder / SKIPPED).write_text("\n".join(lines) + "\n")


def refusal(field: str, source: SourceSection, bad: list[Bad], total: int) -> str:
    """The sentence for more malformed rows than may be left out: the first one, how many there are, and what to do."""
    first = min(bad, key=lambda item: (item.place.part, item.place.number))
    are = f"{len(bad)} of {total} rows {'is' if len(bad) == 1 else 'are'} malformed"
    share = share_above(len(bad), total)
    skip = f", or set {field}.max_bad_rows to {share:g} to leave them out" if share < 1 else ""
    return (
        f"{field}: {first.said} ({source.source}, {first.place}); {are} and {field}.max_bad_rows is "
        f"{source.max_bad_rows:g} ({by_reason(bad)}): mend them{skip}"
    )


def share_above(bad: int, total: int) -> float:
    """The least share of three decimals that lets `bad` of `total` rows be left out; 1 where only the whole would."""
    return math.ceil(bad / total * 1000) / 1000


def by_reason(bad: list[Bad]) -> str:
    """`no response 30: lines 2, 4, 6, 8, 10 and more; no prompt 1: line 3`."""
    found: dict[str, list[Place]] = {}
    for item in sorted(bad, key=lambda item: (item.place.part, item.place.number)):
        found.setdefault(item.reason, []).append(item.place)
    return "; ".join(f"{reason} {len(places)}: {named(places)}" for reason, places in found.items())


def named(places: list[Place]) -> str:
    """The first places: `lines 2, 4, 6, 8, 10 and more`."""
    shown, more = places[:_SHOWN], " and more" if len(places) > _SHOWN else ""
    if any(place.part for place in shown):
        return "; ".join(map(str, shown)) + more
    plural = "s" if len(shown) > 1 else ""
    return f"{shown[0].kind}{plural} {', '.join(str(place.number) for place in shown)}{more}"
