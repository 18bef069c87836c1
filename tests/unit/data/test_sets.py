"""Sets as they are stored: the rows that were written, in a fraction of what lists take."""

import sys

import pytest

from pipeline.data.sets import StoredRows, read_rows, write_set

ROWS = [
    {"id": "a", "input_ids": [1, 2, 3], "labels": [-100, 2, 3], "harmful": None},
    {"id": "b", "input_ids": [], "labels": [2**31 - 1], "harmful": True, "late": "only here"},
    {"id": "c", "input_ids": None, "labels": [5] * 70, "harmful": False},
]
WHOLE = [{"late": None} | row for row in ROWS]


@pytest.fixture
def stored(tmp_path) -> StoredRows:
    write_set(tmp_path / "some.parquet", ROWS)
    return read_rows(tmp_path, "some")


def test_rows_are_those_that_were_written(stored):
    assert list(stored) == WHOLE and len(stored) == 3
    assert (
        stored[-1] == WHOLE[2]
        and stored[1:] == WHOLE[1:]
        and stored[:2] == WHOLE[:2]
        and stored[::-2] == WHOLE[::-2]
    )
    assert stored[0]["input_ids"] is not stored[0]["input_ids"], (
        "a caller may keep or change what it was given"
    )
    with pytest.raises(TypeError):
        stored[1.5]
    for index in (3, -4):
        with pytest.raises(IndexError):
            stored[index]


def test_a_choice_of_rows(tmp_path, stored):
    assert list(read_rows(tmp_path, "some", [True, False, True])) == [WHOLE[0], WHOLE[2]]
    with pytest.raises(AssertionError, match="a choice is of other rows"):
        read_rows(tmp_path, "some", [True])


@pytest.mark.parametrize(
    "values",
    [
        [[2**40], [1]],
        [["a"], []],
        [[0.5], [1.0]],
        [[None, 1], [2]],
        [[[1]], [[2, 3]]],
        [{"a": 1}, {"a": 2}],
    ],
)
def test_what_is_no_list_of_tokens_comes_back_as_it_was(tmp_path, values):
    rows = [{"id": str(number), "other": value} for number, value in enumerate(values)]
    write_set(tmp_path / "some.parquet", rows)
    assert list(read_rows(tmp_path, "some")) == rows


def test_no_rows(tmp_path):
    write_set(tmp_path / "none.parquet", [])
    assert list(read_rows(tmp_path, "none")) == []


def test_tokens_take_four_bytes_each(tmp_path):
    rows = [
        {"input_ids": list(range(1000, 1500)), "labels": list(range(1000, 1500))}
        for _ in range(200)
    ]
    as_lists = sum(
        sys.getsizeof(column) + sum(map(sys.getsizeof, column))
        for row in rows
        for column in row.values()
    )
    write_set(tmp_path / "some.parquet", rows)
    stored = read_rows(tmp_path, "some")
    assert stored.nbytes < 200 * 1000 * 4 * 1.1 and stored.nbytes * 8 < as_lists
