"""The endings of files by which a source's format is known: what of a recipe is a file, and how it is read."""

from __future__ import annotations

from pathlib import Path

TEXT = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXT, ".parquet", ".arrow")
ENDINGS = f"{', '.join(SUFFIXES)}, or the first four with .gz behind it"


def suffix(path: str | Path) -> str:
    """The ending that says how a file is read ('.csv' of DATA.CSV and data.csv.gz); '' where there is none."""
    name = Path(path).name.lower()
    inner = Path(name.removesuffix(".gz")).suffix
    known = TEXT if name.endswith(".gz") else SUFFIXES
    return inner if inner in known else ""
