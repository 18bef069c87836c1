"""Files as people bring them: read as their format says, or refused with the file, the line and what to change."""

import codecs
import gzip
import re

import pyarrow
import pyarrow.parquet
import pytest

from pipeline import artifacts
from pipeline.data import check, files
from pipeline.data.rows import ordered_rows
from pipeline.defences.recipes import recipe_class
from pipeline.recipe import paths
from pipeline.stages import layout
from tests.unit.data.reading import (
    ARRAY,
    CSV,
    LINES,
    ROWS,
    TEXTS,
    pairs,
    read,
    refusal,
    source,
    written,
)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_every_text_format_in_every_encoding_that_its_mark_says(tmp_path, name, ends, codec):
    mark = codecs.BOM_UTF16_BE if codec == "utf-16-be" else b""
    path = written(tmp_path, name, mark + TEXTS[name].replace("\n", ends).encode(codec))
    assert pairs(read(path)) == ROWS


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("named", ["{}", "{}.gz"])
@pytest.mark.parametrize("codec", ["utf-8", "utf-16"])
def test_gzip_is_known_by_its_bytes_whatever_the_name_says(tmp_path, name, named, codec):
    path = written(tmp_path, named.format(name), gzip.compress(TEXTS[name].encode(codec)))
    assert pairs(read(path)) == ROWS
    assert ", gzip, UTF-" in files.read(path).format


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_only_its_name_packs_is_read(tmp_path, name):
    assert pairs(read(written(tmp_path, f"{name}.gz", TEXTS[name]))) == ROWS


@pytest.mark.parametrize("name", TEXTS)
def test_a_gzip_file_that_is_cut_short_or_damaged(tmp_path, name):
    packed = gzip.compress(TEXTS[name].encode())
    assert "is a gzip file that is cut short: copy or" in refusal(
        written(tmp_path, f"{name}.gz", packed[:-20])
    )
    damaged = packed[:12] + b"\xff\xff\xff" + packed[15:]
    assert "is a damaged gzip file (" in refusal(written(tmp_path, f"{name}.gz", damaged))


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl"])
def test_bytes_that_are_no_utf8_are_refused_with_their_line(tmp_path, name):
    path = written(tmp_path, name, TEXTS[name].encode("cp1252"))
    line = 1 if name == "d.jsonl" else 2
    said = refusal(path)
    assert (
        f"the byte 0xe9 is not valid UTF-8: save the file as UTF-8 (it may be Windows-1252) ({path}, line {line})"
        in said
    )
    assert "8 of 8 rows are malformed" in said
    one = TEXTS[name].encode().replace("réponse 5".encode(), "réponse 5".encode("latin-1"))
    path = written(tmp_path, name, one)
    assert f"({path}, line {line + 5}); 1 of 8 rows is malformed" in refusal(path)
    assert len(ordered_rows("data.task", source(path, max_bad_rows=0.125), 0)) == 7


def test_a_json_array_that_is_no_utf8_is_refused_with_the_line(tmp_path):
    path = written(tmp_path, "d.json", ARRAY.encode("cp1252"))
    assert (
        f"data.task.source {path} is not valid UTF-8 in line 4 (byte 0xe9): save it as UTF-8"
        in refusal(path)
    )


def test_column_names_that_are_no_utf8(tmp_path):
    path = written(tmp_path, "d.csv", "question,r\xe9ponse\na,b\n".encode("cp1252"))
    assert (
        f"{path} is not valid UTF-8 in line 1, which names the columns: save it as UTF-8"
        in refusal(path)
    )


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_and_with_half_a_unit(tmp_path, name, codec):
    assert "seems to be UTF-16 without a byte order mark" in refusal(
        written(tmp_path, name, TEXTS[name].encode(codec))
    )
    cut = written(tmp_path, name, TEXTS[name].encode("utf-16")[:-1])
    assert re.search(
        r"is damaged UTF-16 in line \d+ \(truncated data\): save it as UTF-8", refusal(cut)
    )


FOREIGN = {
    "spreadsheet": (
        b"PK\x03\x04....",
        "is a zip archive or a spreadsheet: unpack it, or export it",
    ),
    "zstd": (b"\x28\xb5\x2f\xfd....", "is packed with zstd"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "is a pointer of Git LFS",
    ),
    "nothing": (b"", "holds no rows"),
    "a mark alone": (codecs.BOM_UTF8, "holds no rows"),
    "blank lines": (b"\n \n", "holds no rows"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_such_file_is_named(tmp_path, case, name):
    content, sentence = FOREIGN[case]
    if name in ("d.csv", "d.tsv") and case == "blank lines":
        content = b"\n\n"
    assert sentence in refusal(written(tmp_path, name, content))


def test_endings_are_read_in_any_letter_case_and_others_are_refused(tmp_path):
    assert pairs(read(written(tmp_path, "D.CSV", CSV))) == ROWS
    said = refusal(written(tmp_path, "d.xlsx", b"PK\x03\x04"))
    assert (
        "has the unknown ending '.xlsx': it must be one of .jsonl, .json, .csv, .tsv, .parquet, .arrow, or"
        in said
    )
    assert "has the unknown ending '.gz'" in refusal(written(tmp_path, "d.parquet.gz", b"PAR1"))


def table(rows=ROWS):
    return pyarrow.Table.from_pylist(rows)


def write_arrow(path, rows=ROWS, kind: str = "stream"):
    writer = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(path), "wb") as sink, writer(sink, table(rows).schema) as out:
        out.write_table(table(rows))
    return path


def write_parquet(path, rows=ROWS):
    pyarrow.parquet.write_table(table(rows), path)
    return path


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files_and_streams(tmp_path, kind):
    path = write_arrow(tmp_path / "d.arrow", kind=kind)
    assert pairs(read(path)) == ROWS and files.read(path).format == f"Arrow {kind}"
    path.write_bytes(path.read_bytes()[:-200])
    assert f"{path} cannot be read as Arrow (" in refusal(path)


def test_parquet_and_what_is_called_so(tmp_path):
    path = write_parquet(tmp_path / "d.parquet")
    assert pairs(read(path)) == ROWS
    path.write_bytes(path.read_bytes()[:-30])
    assert f"{path} cannot be read as Parquet (" in refusal(path)
    assert "is not a Parquet file, though its name ends so" in refusal(
        written(tmp_path, "e.parquet", LINES)
    )
    assert "cannot be read as Arrow (" in refusal(written(tmp_path, "e.arrow", LINES))
    assert pairs(read(write_parquet(tmp_path / "named.csv"))) == ROWS, (
        "its first bytes leave no doubt"
    )


def test_parquet_in_a_folder_that_is_named_like_a_partition(tmp_path):
    (tmp_path / "prompt=x").mkdir()
    assert pairs(read(write_parquet(tmp_path / "prompt=x" / "d.parquet"))) == ROWS


def test_nested_structs_are_messages_and_nulls_are_found(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_parquet(tmp_path / "d.parquet", [{"messages": messages}] * 2)
    assert read(path) == [{"messages": messages}] * 2
    path = write_parquet(tmp_path / "d.parquet", [*ROWS, {"prompt": "q", "response": None}])
    assert f"data.task: no response ({path}, row 9); 1 of 9" in refusal(path)
    path = write_parquet(tmp_path / "d.parquet", [{"prompt": "q", "response": float("nan")}])
    assert (
        f"'response' is NaN, which is not text: write what is meant, or leave the row out ({path}, row 1)"
        in refusal(path)
    )


def test_arrow_columns_that_are_there_twice_or_hold_no_utf8(tmp_path):
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "d.parquet")
    assert "names the column 'prompt' twice" in refusal(tmp_path / "d.parquet")
    texts = pyarrow.array([b"good", b"caf\xe9"]).view(pyarrow.utf8())
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": texts, "response": ["a", "b"]}), tmp_path / "d.parquet"
    )
    assert (
        f"the byte 0xe9, which is not valid UTF-8: write it as UTF-8 ({tmp_path / 'd.parquet'}, row 2)"
        in refusal(tmp_path / "d.parquet")
    )


def test_damaged_offsets_are_refused_before_anything_is_read_by_them(tmp_path):
    """Read by them, one such file ended the process, and another was a SystemError."""
    offsets, texts = (
        pyarrow.array([0, 10**9, 2], pyarrow.int32()).buffers()[1],
        pyarrow.py_buffer(b"ab"),
    )
    damaged = pyarrow.Array.from_buffers(pyarrow.utf8(), 2, [None, offsets, texts])
    given = pyarrow.table({"prompt": damaged, "response": ["a", "b"]})
    with (
        pyarrow.OSFile(str(tmp_path / "d.arrow"), "wb") as sink,
        pyarrow.ipc.new_file(sink, given.schema) as out,
    ):
        out.write_table(given)
    assert "cannot be read as Arrow (" in refusal(tmp_path / "d.arrow")


@pytest.mark.parametrize("write", [write_arrow, write_parquet])
def test_a_folder_of_several_files(tmp_path, write):
    kind = {write_arrow: "arrow", write_parquet: "parquet"}[write]
    for number in range(4):
        write(tmp_path / f"part-{number}.{kind}", ROWS[2 * number : 2 * number + 2])
    (tmp_path / "README.md").write_text("# about")
    (tmp_path / "_SUCCESS").write_text("")
    assert pairs(read(tmp_path)) == ROWS
    write(tmp_path / f"part-3.{kind}", [{"prompt": "q", "response": None}])
    sentence = refusal(tmp_path)
    assert f"no response ({tmp_path}, part-3.{kind}, row 1); 1 of 7 rows" in sentence
    assert f"(no response 1: part-3.{kind}, row 1)" in sentence


def test_a_folder_of_mixed_formats_or_of_nothing_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    said = refusal(tmp_path)
    assert f"{tmp_path} is a folder without a data file: name one of its folders (data)" in said
    assert "is a folder without a data file: give one with" in refusal(tmp_path / "data")
    write_parquet(tmp_path / "a.parquet")
    write_arrow(tmp_path / "b.arrow")
    assert (
        f"{tmp_path} holds .arrow and .parquet files: leave files of one format in it, or name one"
        in refusal(tmp_path)
    )


def test_of_files_that_are_named_by_split_those_of_the_split_are_read(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00001.parquet")
    write_parquet(tmp_path / "test-00000-of-00001.parquet", ROWS[:2])
    assert pairs(read(tmp_path)) == ROWS and pairs(read(tmp_path, split="test")) == ROWS[:2]
    assert "holds files of the splits test, train: set split to one of them" in refusal(
        tmp_path, split="dev"
    )
    write_parquet(tmp_path / "more.parquet")
    assert "holds files of the splits test, train and others" in refusal(tmp_path)
    (tmp_path / "one").mkdir()
    write_parquet(tmp_path / "one" / "test.parquet")
    assert pairs(read(tmp_path / "one")) == ROWS, (
        "one split alone is what is meant, unless another one is named"
    )
    assert "holds files of the splits test: set split to one of them" in refusal(
        tmp_path / "one", split="dev"
    )


def test_save_to_disk_with_and_without_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one", num_shards=3)
    assert pairs(read(tmp_path / "one")) == ROWS
    datasets.DatasetDict({"train": data, "held": data.select(range(2))}).save_to_disk(
        tmp_path / "two"
    )
    assert (
        pairs(read(tmp_path / "two")) == ROWS
        and pairs(read(tmp_path / "two", split="held")) == ROWS[:2]
    )
    assert "holds the splits train, held and no 'test': set split to one of them" in refusal(
        tmp_path / "two", split="test"
    )
    data.shuffle(seed=1).select(range(3)).save_to_disk(tmp_path / "three")
    assert len(read(tmp_path / "three")) == 3, "as it was chosen, not all that was behind it"
    next((tmp_path / "one").glob("*-of-00003.arrow")).unlink()
    assert re.search(
        r"names data-\d+-of-00003.arrow in its state.json and does not hold it",
        refusal(tmp_path / "one"),
    )


# --- what the rest of the pipeline asks of files


def test_a_folder_beside_the_recipe_is_a_path_and_counts_by_what_is_in_it(tmp_path):
    (tmp_path / "mine" / "ds").mkdir(parents=True)
    write_parquet(tmp_path / "mine" / "ds" / "a.parquet")
    raw = {
        "data": {
            "task": {"source": "mine/ds"},
            "harmful": {"source": "owner/name"},
            "safety": {"source": "d.csv.gz"},
        }
    }
    found = paths.resolve(raw, recipe_class(), tmp_path / "recipe.yaml")["data"]
    assert (
        found["task"]["source"] == str(tmp_path / "mine" / "ds")
        and found["harmful"]["source"] == "owner/name"
    )
    assert found["safety"]["source"] == str(tmp_path / "d.csv.gz")
    identities = [layout._source_identity(source(tmp_path / "mine" / "ds"), artifacts.file_digest)]
    for name, rows in (("a.parquet", ROWS[:3]), ("b.parquet", ROWS[3:])):
        write_parquet(tmp_path / "mine" / "ds" / name, rows)
        identities.append(
            layout._source_identity(source(tmp_path / "mine" / "ds"), artifacts.file_digest)
        )
    moved = (tmp_path / "mine" / "ds").rename(tmp_path / "other")
    assert layout._source_identity(source(moved), artifacts.file_digest) == identities[-1]
    assert len({str(identity) for identity in identities}) == 3


def test_the_share_that_may_be_left_out_counts_where_it_is_set(tmp_path):
    path = written(tmp_path, "d.csv", CSV)
    none, some = (
        layout._source_identity(source(path, max_bad_rows=share), artifacts.file_digest)
        for share in (0, 0.1)
    )
    assert none != some and "max_bad_rows" not in none


def test_what_is_packed_counts_by_what_is_in_it(tmp_path):
    text = LINES * 1000
    path = written(tmp_path, "d.jsonl.gz", gzip.compress(text.encode()))
    assert path.stat().st_size < 9000 and files.unpacked_bytes(path) == len(
        text.encode()
    ) == check._size(path, source(path), "")
    assert files.unpacked_bytes(written(tmp_path, "d.csv", CSV)) == len(CSV.encode())


@pytest.mark.parametrize(
    "other", ["part-2.jsonl.zst", "part-3.ndjson", "part-4.txt", "more/part-5.jsonl"]
)
def test_what_a_folder_holds_beside_its_data_is_not_left_out_unsaid(tmp_path, other):
    folder = tmp_path / "data"
    (folder / other).parent.mkdir(parents=True)
    (folder / other).write_text(LINES)
    (folder / "part-1.jsonl").write_text(LINES)
    assert (
        f"holds {other.split('/')[0]} beside its .jsonl files, which would not be read"
        in refusal(folder)
    )


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_a_class_is_trained_by_its_name_and_a_label_of_harm_by_its_number(tmp_path, kind):
    import datasets

    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "feeling": datasets.ClassLabel(names=["sad", "glad"]),
            "harmful": datasets.ClassLabel(names=["safe", "unsafe"]),
        }
    )
    rows = datasets.Dataset.from_dict(
        {"prompt": ["a", "b"], "feeling": [1, 0], "harmful": [0, 1]}, features=features
    )
    path = tmp_path / ("d.parquet" if kind == "parquet" else "saved")
    rows.to_parquet(path) if kind == "parquet" else rows.save_to_disk(path)
    given = source(path, columns={"prompt": "prompt", "response": "feeling", "harmful": "harmful"})
    found = {
        row["prompt"]: row for row in ordered_rows("data.task", given, 0, ("prompt", "response"))
    }
    assert {prompt: row["response"] for prompt, row in found.items()} == {"a": "glad", "b": "sad"}
    assert {prompt: row["harmful"] for prompt, row in found.items()} == {"a": False, "b": True}


def test_files_of_one_folder_that_number_their_classes_otherwise_are_refused(tmp_path):
    import datasets

    for number, names in enumerate((["sad", "glad"], ["glad", "sad"])):
        features = datasets.Features(
            {"prompt": datasets.Value("string"), "response": datasets.ClassLabel(names=names)}
        )
        rows = datasets.Dataset.from_dict({"prompt": ["a"], "response": [1]}, features=features)
        rows.to_parquet(tmp_path / f"{number}.parquet")
    assert "has other classes in 1.parquet than in 0.parquet" in refusal(tmp_path)
