"""The sets that prepare writes: one Parquet file each, and the rows of those that are asked and not trained on.

write_set(folder / "safety_pairs.parquet", rows)
read_rows(folder, "safety_pairs")
"""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np

if TYPE_CHECKING:
    import pyarrow

from pipeline.data import forms
from pipeline.recipe.redaction import redact
from pipeline.recipe.sections import SourceSection

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


class StoredRows(Sequence[Row]):
    """A set as it is stored: a row becomes a dict when it is asked for.

    Lists of integers (tokens) take four bytes each, and not Python's 36.

    Every rank reads a whole set, and eight ranks a machine's memory:
    50,000 conversations of 500 tokens took 15 GB as lists.
    """

    def __init__(self, table: pyarrow.Table):
        """table: lists in it are of integers, or stay as Arrow has them."""
        self._columns = {
            name: _Lists.of(table.column(name)) or table.column(name) for name in table.column_names
        }
        self._count = table.num_rows

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: SupportsIndex) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._count))]
        number = operator.index(index)
        if not -self._count <= number < self._count:
            raise IndexError(number)
        number %= self._count
        return {
            name: column[number] if isinstance(column, _Lists) else column[number].as_py()
            for name, column in self._columns.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes that the columns take."""
        return sum(column.nbytes for column in self._columns.values())


@dataclass(frozen=True)
class _Lists:
    """A column of lists of integers: all values end to end, and where each list begins;
    `missing` where there is none.
    """

    values: np.ndarray  # int32
    bounds: np.ndarray  # int64, one more than there are lists
    missing: np.ndarray  # bool

    @classmethod
    def of(cls, column: pyarrow.ChunkedArray) -> _Lists | None:
        """None where the column holds something else, integers beyond int32, or no integer at some place."""
        import pyarrow.types as types

        if not (
            types.is_list(column.type) or types.is_large_list(column.type)
        ) or not types.is_integer(column.type.value_type):
            return None
        lengths = column.combine_chunks().value_lengths()
        values = column.combine_chunks().flatten()
        if values.null_count or (
            len(values)
            and not -(2**31) <= values.to_numpy().min() <= values.to_numpy().max() < 2**31
        ):
            return None
        bounds = np.concatenate([[0], np.cumsum(lengths.fill_null(0).to_numpy(), dtype=np.int64)])
        return cls(
            values.to_numpy().astype(np.int32),
            bounds,
            lengths.is_null().to_numpy(zero_copy_only=False),
        )

    def __getitem__(self, index: int) -> list[int] | None:
        return (
            None
            if self.missing[index]
            else self.values[self.bounds[index] : self.bounds[index + 1]].tolist()
        )

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.bounds.nbytes + self.missing.nbytes


def read_rows(folder: Path, name: str, keep: Sequence[bool] | None = None) -> StoredRows:
    """Rows of one set below a folder of `write_set`'s files; keep: which of them."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / f"{name}.parquet")
    assert keep is None or len(keep) == table.num_rows, "a choice is of other rows"
    return StoredRows(table if keep is None else table.filter(pyarrow.array(keep, pyarrow.bool_())))


def write_set(path: Path, rows: list[Row]) -> None:
    """One set as a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    # from_pylist takes the first row's columns alone, and harmful is not in every source
    columns = dict.fromkeys(key for row in rows for key in row)
    table = pyarrow.Table.from_pylist([{key: row.get(key) for key in columns} for row in rows])
    pyarrow.parquet.write_table(table, path)
