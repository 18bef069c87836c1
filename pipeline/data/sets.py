"""The sets that prepare writes: one Parquet file each, and the rows of those that are asked and not trained on.

    write_set(folder / "safety_pairs.parquet", rows)
    read_rows(folder, "safety_pairs")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.data import forms
from pipeline.redaction import redact
from pipeline.sections import SourceSection

Row = dict[str, Any]
HELD = "held.parquet"  # who holds which prompt


def prompt_rows(field: str, source: SourceSection, rows: list[Row]) -> list[Row]:
    """id, prompt, its form, what it was before it was rewritten, and source, of rows that are asked and not trained on.

    conversation: what is asked where that is more than the prompt, with earlier turns or a system prompt; JSON.
    """
    name, origin = field.split(".")[1], redact(source.source)
    return [
        {
            "id": f"{name}-{number}",
            "prompt": row["prompt"],
            "form": forms.form(row["prompt"]),
            "rewritten": row.get("rewritten"),
            "source": origin,
            "conversation": json.dumps(row["messages"]) if len(row["messages"]) > 1 else None,
            **tools_as_json(row),
        }
        for number, row in enumerate(rows)
    ]


def tools_as_json(row: Row) -> Row:
    """The row's tools as a set has them."""
    return {"tools": json.dumps(row["tools"])} if row.get("tools") else {}


def read_rows(folder: Path, name: str) -> list[Row]:
    """Rows of one set below a folder of `write_set`'s files."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pylist()


def write_set(path: Path, rows: list[Row]) -> None:
    """One set as a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    # from_pylist takes the first row's columns alone, and harmful is not in every source
    columns = dict.fromkeys(key for row in rows for key in row)
    table = pyarrow.Table.from_pylist([{key: row.get(key) for key in columns} for row in rows])
    pyarrow.parquet.write_table(table, path)
