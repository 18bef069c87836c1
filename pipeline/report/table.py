"""The table: one list of rows, rendered as text, Markdown and HTML.

rows = table_rows(collected); print(as_text(rows))
"""

from __future__ import annotations

import html
from typing import Any

from pipeline.report.collect import Collected

HEADER = ("method", "non-refusal, harmful prompts", "over-refusal, look-alikes", "task exact match", "task test loss", "time per step")


def table_rows(collected: Collected) -> list[tuple[str, ...]]:
    """Rows in HEADER's order; the time per step is relative to the plain method's median."""
    reference = next((m.seconds_per_step for m in collected.methods if m.name == collected.plain), None)
    rows = []
    for method in collected.methods:
        name = method.name if len(method.seeds) < 2 else f"{method.name} ({len(method.seeds)} seeds)"
        seconds = method.seconds_per_step
        rows.append(
            (
                name,
                _number(method.measures["non_refusal_rate"]),
                _number(method.measures["over_refusal_rate"]),
                _number(method.measures["exact_match"]),
                _number(method.measures["test_loss"], digits=3),
                f"{seconds / reference:.2f}x" if seconds and reference else "",
            )
        )
    return rows


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
