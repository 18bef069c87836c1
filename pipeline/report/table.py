"""The table: one list of rows, rendered as text, Markdown and HTML.

rows = table_rows(collected); print(as_text(rows))
"""

from __future__ import annotations

import html
from typing import Any

from pipeline.evaluation.attacks import ATTACKS
from pipeline.report.collect import Collected, Method

HEADER = ("method", "harmful answered", "look-alikes refused", "ordinary refused", "task exact match", "task test loss", "time per step")
BY_FORM = ("method", *(f"{what}: {form}" for what in ("harmful answered", "look-alikes refused", "ordinary refused") for form in ("questions", "imperatives")))
_FORM_KEYS = tuple(f"{key}/{form}" for key in ("non_refusal_rate", "over_refusal_rate", "ordinary_refusal_rate") for form in ("question", "imperative"))
UNDER_ATTACK = ("method", "attack", "harmful answered", "harmless answered", "told apart")


def table_rows(collected: Collected) -> list[tuple[str, ...]]:
    """Rows in HEADER's order; the time per step is relative to the plain method's median."""
    reference = next((m.seconds_per_step for m in collected.methods if m.name == collected.plain), None)
    rows = []
    for method in collected.methods:
        name = _name(method)
        seconds = method.seconds_per_step
        rows.append(
            (
                name,
                _number(method.measures["non_refusal_rate"]),
                _number(method.measures["over_refusal_rate"]),
                _number(method.measures["ordinary_refusal_rate"]),
                _number(method.measures["exact_match"]),
                _number(method.measures["test_loss"], digits=3),
                f"{seconds / reference:.2f}x" if seconds and reference else "",
            )
        )
    return rows


def form_rows(collected: Collected) -> list[tuple[str, ...]]:
    """Rows in BY_FORM's order: every rate of refusing by the form of the prompt."""
    missing = {"value": None}
    return [(_name(method), *(_number(method.measures.get(key, missing)) for key in _FORM_KEYS)) for method in collected.methods]


def attack_rows(collected: Collected) -> list[tuple[str, ...]]:
    """Rows in UNDER_ATTACK's order, one for every method and attack; none without attacks."""
    rows = []
    for attack in ATTACKS:
        keys = [f"{attack}/{name}" for name in ("harmful_answered", "harmless_answered", "told_apart")]
        rows += [
            (_name(method), attack, *(_number(method.measures[key]) for key in keys)) for method in collected.methods if keys[0] in method.measures
        ]
    return rows


def _name(method: Method) -> str:
    return method.name if len(method.seeds) < 2 else f"{method.name} ({len(method.seeds)} seeds)"


def as_text(rows: list[tuple[str, ...]], header: tuple[str, ...] = HEADER) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    line = lambda row: "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()  # noqa: E731
    return "\n".join([line(header), line(tuple("-" * width for width in widths)), *map(line, rows)]) + "\n"


def as_markdown(rows: list[tuple[str, ...]], header: tuple[str, ...] = HEADER) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def as_html(rows: list[tuple[str, ...]], header: tuple[str, ...] = HEADER) -> str:
    cells = lambda row, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)  # noqa: E731
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{cells(header, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def _number(measure: dict[str, Any], digits: int = 2) -> str:
    if measure["value"] is None:
        return ""
    text = f"{measure['value']:.{digits}f}"
    return text if measure["low"] is None else f"{text} [{measure['low']:.{digits}f}, {measure['high']:.{digits}f}]"
