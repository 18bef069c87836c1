"""Rows as a table: of text for the console, Markdown for documents, HTML for the report."""

from __future__ import annotations

import html
from collections.abc import Sequence


def as_text(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """The table in aligned columns of plain text."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        return "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()

    return (
        "\n".join([line(header), line(tuple("-" * width for width in widths)), *map(line, rows)])
        + "\n"
    )


def as_markdown(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """The table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def as_html(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """The table in HTML, its cells escaped."""

    def cells(row: tuple[str, ...], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{cells(header, 'th')}</tr></thead><tbody>{body}</tbody></table>"
