"""Every format met in the wild, and every way a mapping can be wrong."""

import json

import datasets
import pytest

from pipeline.data.sources import check_source, read_source, read_table
from pipeline.recipe.sections import SourceSection

ROWS = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]
MAPPING = {"prompt": "instruction", "response": "output"}


def write(path, kind: str):
    import pyarrow
    import pyarrow.parquet

    text = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "array.json": json.dumps(ROWS, indent=2),
        "object.json": json.dumps({"version": 1, "data": ROWS}),
        "concatenated.json": "\n".join(json.dumps(row, indent=1) for row in ROWS),
        "csv": "instruction,output\na,b\nc,d\n",
    }
    file = path / (kind if "." in kind else f"data.{kind}")
    if kind in text:
        file.write_text(text[kind])
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    else:
        with (
            pyarrow.OSFile(str(file), "wb") as sink,
            pyarrow.ipc.new_stream(sink, pyarrow.Table.from_pylist(ROWS).schema) as writer,
        ):
            writer.write_table(pyarrow.Table.from_pylist(ROWS))
    return file


def rows_of(*arguments):
    """What is read, where no row is malformed."""
    found = read_source(*arguments)
    assert not found.bad
    return [row for _, row in found.rows]


@pytest.mark.parametrize(
    "kind", ["jsonl", "array.json", "object.json", "concatenated.json", "csv", "parquet", "arrow"]
)
def test_formats(tmp_path, kind):
    source = SourceSection(source=str(write(tmp_path, kind)), columns=MAPPING)
    check_source(source, "data.task")
    expected = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    assert rows_of(source, "data.task", ("prompt", "response")) == expected


def test_csv_without_header(tmp_path):
    (tmp_path / "data.csv").write_text('"a, really",b\nc,d\n')
    source = SourceSection(
        source=str(tmp_path / "data.csv"), columns={"prompt": "0", "response": "1"}, header=False
    )
    expected = [{"prompt": "a, really", "response": "b"}, {"prompt": "c", "response": "d"}]
    assert rows_of(source, "data.task", ("prompt",)) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "context": "", "response": "a"},
        {"prompt": "q", "target": "a"},
        {"question": "q", "answer": "a"},
    ],
)
def test_known_columns_need_no_mapping(tmp_path, row):
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    (read,) = rows_of(
        SourceSection(source=str(tmp_path / "data.jsonl")), "data.task", ("prompt", "response")
    )
    assert (read["prompt"], read["response"]) == ("q", "a")


def test_safe_and_unsafe_responses_become_a_pair(tmp_path):
    (tmp_path / "data.jsonl").write_text(
        json.dumps({"harmful_input": "q", "safe_response": "s", "unsafe_response": "u"}) + "\n"
    )
    (read,) = rows_of(
        SourceSection(source=str(tmp_path / "data.jsonl")), "data.safety", ("prompt",)
    )
    assert read == {"prompt": "q", "chosen": "s", "rejected": "u"}


def refused(source: SourceSection, match: str):
    with pytest.raises(ValueError, match=match):
        check_source(source, "data.task")
        read_source(source, "data.task", ("prompt", "response"))


def test_unknown_columns_are_named(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"frage": "q", "antwort": "a"}) + "\n")
    refused(
        SourceSection(source=str(tmp_path / "data.jsonl")),
        "data.task.*map it with data.task.columns.*frage, antwort",
    )


def test_the_example_of_a_mapping_names_a_column_that_is_free(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": "q", "antwort": "a"}) + "\n")
    refused(SourceSection(source=str(tmp_path / "data.jsonl")), r"such as \{response: antwort\}")


def test_truncated_json_names_the_place(tmp_path):
    (tmp_path / "data.json").write_text('[{"a": 1},\n{"a": ')
    refused(
        SourceSection(source=str(tmp_path / "data.json")), "not valid JSON at line 2.*cut short"
    )


def test_empty_file_and_scalars(tmp_path):
    (tmp_path / "data.jsonl").write_text("")
    refused(SourceSection(source=str(tmp_path / "data.jsonl")), "holds no rows")
    (tmp_path / "data.json").write_text("[1, 2]")
    refused(SourceSection(source=str(tmp_path / "data.json")), "must hold objects")


def test_hub_id_offline_says_what_to_do():
    refused(
        SourceSection(source="owner/data"),
        "data.task.source 'owner/data' .* could not be loaded: check id",
    )


@pytest.mark.parametrize(
    ("cause", "kind"),
    [(OSError(28, "No space left on device", "/cache"), OSError), (KeyError("column"), ValueError)],
)
def test_a_full_cache_is_no_wrong_data_set_and_what_the_library_cannot_make_is(
    monkeypatch, cause, kind
):
    """It puts an exception on top that is neither."""

    def fails(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetGenerationError(
            "An error occurred while generating the dataset"
        ) from cause

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(
        kind, match="/cache" if kind is OSError else "could not be loaded: check id"
    ):
        read_table(SourceSection(source="owner/data"), "data.task")
