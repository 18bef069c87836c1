"""Files as people bring them: read as their format says, or refused with the file, the line and what to change."""

import codecs
import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from pipeline import recipe
from pipeline.data import files
from pipeline.data.check import check_sources
from pipeline.data.malformed import SKIPPED, Place, Skipped
from pipeline.data.rows import ordered_rows, task_rows
from pipeline.data.sources import check_source, read_source
from pipeline.sections import DataSection, SourceSection
from tests.project import make_project, write_recipe

ROWS = [{"prompt": f"question {i}", "response": f"réponse {i}"} for i in range(8)]
CSV = "prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in ROWS)
TSV = CSV.replace(",", "\t")
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS, indent=1, ensure_ascii=False)
TEXTS = {"d.csv": CSV, "d.tsv": TSV, "d.jsonl": LINES, "d.json": ARRAY}


def source(path, **fields) -> SourceSection:
    return SourceSection(source=str(path), **fields)


def read(path, required=("prompt", "response"), **fields) -> list[dict]:
    """What data.task would read: every row, in the file's order."""
    given = source(path, **fields)
    check_source(given, "data.task")
    found = read_source(given, "data.task", required)
    assert not found.bad, found.bad
    return [row for _, row in found.rows]


def pairs(rows: list[dict]) -> list[dict]:
    return [{"prompt": row["prompt"], "response": row["response"]} for row in rows]


def refusal(path, field: str = "data.task", **fields) -> str:
    """The one sentence with which a source of the task, or of another field, is refused."""
    given = source(path, **fields)
    with pytest.raises(ValueError) as caught:
        check_source(given, field)
        required = ("prompt", "response") if field == "data.task" else ("prompt",)
        ordered_rows(field, given, 0, required, pairs=field == "data.safety")
    sentence = str(caught.value)
    assert "\n" not in sentence and ". " not in sentence and str(path) in sentence, sentence
    return sentence


def written(tmp_path, name: str, content: str | bytes):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


# --- encodings, byte order marks, gzip


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
    assert "is a gzip file that is cut short: copy or" in refusal(written(tmp_path, f"{name}.gz", packed[:-20]))
    damaged = packed[:12] + b"\xff\xff\xff" + packed[15:]
    assert "is a damaged gzip file (" in refusal(written(tmp_path, f"{name}.gz", damaged))


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl"])
def test_bytes_that_are_no_utf8_are_refused_with_their_line(tmp_path, name):
    path = written(tmp_path, name, TEXTS[name].encode("cp1252"))
    line = 1 if name == "d.jsonl" else 2
    said = refusal(path)
    assert f"the byte 0xe9 is no UTF-8: save the file as UTF-8 (it may be Windows-1252) ({path}, line {line})" in said
    assert "8 of 8 rows are malformed" in said
    one = TEXTS[name].encode().replace("réponse 5".encode(), "réponse 5".encode("latin-1"))
    path = written(tmp_path, name, one)
    assert f"({path}, line {line + 5}); 1 of 8 rows is malformed" in refusal(path)
    assert len(ordered_rows("data.task", source(path, max_bad_rows=0.125), 0)) == 7


def test_a_json_array_that_is_no_utf8_is_refused_with_the_line(tmp_path):
    path = written(tmp_path, "d.json", ARRAY.encode("cp1252"))
    assert f"data.task.source {path} is no UTF-8 in line 4 (byte 0xe9): save it as UTF-8" in refusal(path)


def test_column_names_that_are_no_utf8(tmp_path):
    path = written(tmp_path, "d.csv", "question,r\xe9ponse\na,b\n".encode("cp1252"))
    assert f"{path} is no UTF-8 in line 1, which names the columns: save it as UTF-8" in refusal(path)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_and_with_half_a_unit(tmp_path, name, codec):
    assert "seems to be UTF-16 without a byte order mark" in refusal(written(tmp_path, name, TEXTS[name].encode(codec)))
    cut = written(tmp_path, name, TEXTS[name].encode("utf-16")[:-1])
    assert re.search(r"is damaged UTF-16 in line \d+ \(truncated data\): save it as UTF-8", refusal(cut))


FOREIGN = {
    "spreadsheet": (b"PK\x03\x04....", "is a zip archive or a spreadsheet: unpack it, or export it"),
    "zstd": (b"\x28\xb5\x2f\xfd....", "is packed with zstd"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
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
    assert "has the unknown ending '.xlsx': it must be one of .jsonl, .json, .csv, .tsv, .parquet, .arrow, or" in said
    assert "has the unknown ending '.gz'" in refusal(written(tmp_path, "d.parquet.gz", b"PAR1"))


# --- CSV and TSV


@pytest.mark.parametrize(("name", "sign", "signs"), [("d.csv", ",", "commas"), ("d.tsv", "\t", "tabs")])
def test_a_row_with_another_number_of_fields_is_refused(tmp_path, name, sign, signs):
    more = sign.join(("prompt", "response")) + f"\na{sign}b\nDucks{sign} and geese{sign}ok\nc{sign}d\n"
    path = written(tmp_path, name, more)
    expected = f"data.task: 3 fields, but 2 columns: put a field that holds {signs} in quotes ({path}, line 3); "
    assert refusal(path) == (
        f"{expected}1 of 3 rows is malformed and data.task.max_bad_rows is 0 (wrong number of fields 1: line 3): "
        "mend them, or set data.task.max_bad_rows to 0.334 to leave them out"
    )
    assert f"1 field, but 2 columns ({path}, line 3)" in refusal(written(tmp_path, name, more.replace(f"{sign} and geese{sign}ok", "")))


def test_lines_are_counted_in_the_file_and_not_in_rows(tmp_path):
    path = written(tmp_path, "d.csv", 'prompt,response\n"a\nb\nc",d\n\ne\n')
    assert f"1 field, but 2 columns ({path}, line 6); 1 of 2 rows" in refusal(path)


SWALLOWED = "".join(f"q {i},a {i}\n" for i in range(40))


def test_a_quote_that_never_closes_or_closes_in_another_row(tmp_path):
    never = written(tmp_path, "d.csv", f'prompt,response\n"open q,a\n{SWALLOWED}')
    assert f"{never} has a quote that is not closed where it should be, in the row that begins in line 2 (" in refusal(never)
    opened = written(tmp_path, "d.csv", f'prompt,response\n"open q,a\n{SWALLOWED}"quoted, q",a\n')
    assert "in the row that begins in line 2 (" in refusal(opened)
    late = written(tmp_path, "d.csv", f'prompt,response\n"open q,a\n{SWALLOWED}of 5",a\nlast,row\n')
    assert "one field holds lines that are rows themselves" in refusal(late) and f"({late}, line 2)" in refusal(late)
    one = written(tmp_path, "d.csv", 'prompt,response\na,b\n"said" he,b\nc,d\n')
    assert f"quotes do not match (',' expected after '\"') ({one}, line 3); 1 of 3" in refusal(one)
    last = written(tmp_path, "d.csv", 'prompt,response\na,b\n"c,d')
    assert f"quotes do not match (unexpected end of data) ({last}, line 3)" in refusal(last)


def test_texts_of_many_lines_and_fields_of_any_length_are_read(tmp_path):
    poem, long = "one, two\n" * 3 + "no comma here\n" * 6, "word " * 100_000
    path = written(tmp_path, "d.csv", f'prompt,response\n"{poem}",b\nc,"{long}"\n')
    assert [(row["prompt"], row["response"]) for row in read(path)] == [(poem, "b"), ("c", long)]


HEADERS = {
    "twice": ("q,a,a\n1,2,3\n", "names the column 'a' twice in line 1: give each a name of its own"),
    "semicolons": ("q;a\nb, c;d\n", "has the one column 'q;a': separate its fields with commas"),
    "tabs": ("q\ta\nb\tc\n", "has the one column 'q\ta': separate its fields with commas"),
    "header alone": ("prompt,response\n", "holds no rows"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_name_nothing(tmp_path, case):
    text, sentence = HEADERS[case]
    path = written(tmp_path, "d.csv", text)
    assert f"data.task.source {path} {sentence}" in refusal(path)


def test_a_nul_byte_is_refused_with_its_line(tmp_path):
    path = written(tmp_path, "d.csv", "prompt,response\na,b\nc\0,d\n")
    assert f"data.task: 'prompt' holds a NUL character: leave it out ({path}, line 3)" in refusal(path)
    path = written(tmp_path, "d.jsonl", LINES + '{"prompt": "a", "response": "b\\u0000"}\n')
    assert f"'response' holds a NUL character: leave it out ({path}, line 9)" in refusal(path)


# --- JSON and JSON Lines


def line(text: str) -> str:
    return LINES + text + "\n" + LINES.replace("question", "other")


BAD_LINES = {
    "NaN": ('{"prompt": "q", "response": NaN}', "'response' is NaN, which is no text", "NaN in response"),
    "infinity": ('{"prompt": -Infinity, "response": "a"}', "'prompt' is Infinity", "Infinity in prompt"),
    "too large": ('{"prompt": 1e999, "response": "a"}', "'prompt' is Infinity", "Infinity in prompt"),
    "true": ('{"prompt": "q", "response": true}', "'response' is true, which is no text", "no text as response"),
    "a list": ('{"prompt": "q", "response": ["a"]}', "response holds a list", "unusable response"),
    "an object": ('{"prompt": {"a": 1}, "response": "a"}', "prompt holds a dict", "unusable prompt"),
    "null response": ('{"prompt": "q", "response": null}', "no response", "no response"),
    "no response": ('{"prompt": "q"}', "no response", "no response"),
    "empty response": ('{"prompt": "q", "response": " \\n"}', "no response", "no response"),
    "null prompt": ('{"prompt": null, "response": "a"}', "no prompt", "no prompt"),
    "no prompt": ('{"response": "a"}', "no prompt", "no prompt"),
    "key twice": ('{"prompt": "q", "response": "a", "response": "b"}', "the key 'response' is there twice", "a key twice"),
    "nested key twice": (
        '{"prompt": "q", "response": "a", "meta": [{"id": 1, "id": 2}]}', "the key 'id' is there twice", "a key twice"
    ),
    "surrogate": ('{"prompt": "bad \\ud83d", "response": "a"}', "'prompt' holds \\ud83d, half of", "half a character in prompt"),
    "low surrogate": ('{"prompt": "q", "response": "\\udc00"}', "'response' holds \\udc00", "half a character in response"),
    "null": ("null", "must hold objects with named values, and this one is a null", "no object with named values"),
    "text": ('"text"', "must hold objects with named values, and this one is a text", "no object with named values"),
    "array": ('["q", "a"]', "must hold objects with named values, and this one is a list", "no object with named values"),
    "cut short": ('{"prompt": "q", "respon', "the line is no valid JSON (Unterminated string", "no valid JSON"),
    "quotes": ("{'prompt': 'q', 'response': 'a'}", "the line is no valid JSON (Expecting property", "no valid JSON"),
    "two on a line": ('{"prompt": "q", "response": "a"} x', "the line is no valid JSON (Extra data", "no valid JSON"),
    "control sign": ('{"prompt": "q\x01", "response": "a"}', "the line is no valid JSON (Invalid control", "no valid JSON"),
    "huge number": ('{"prompt": ' + "9" * 5000 + ', "response": "a"}', "a number that is too long", "no valid JSON"),
    "deep": ('{"prompt": ' + "[" * 100_000 + "}", "too deeply nested", "no valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_malformed_line_is_refused_with_its_number_or_left_out_and_counted(tmp_path, case):
    text, said, reason = BAD_LINES[case]
    path = written(tmp_path, "d.jsonl", line(text))
    sentence = refusal(path)
    assert sentence.startswith("data.task: ") and said in sentence
    assert f"({path}, line 9); 1 of 17 rows is malformed and data.task.max_bad_rows is 0 ({reason} 1: line 9)" in sentence
    skipped = Skipped()
    rows = ordered_rows("data.task", source(path, max_bad_rows=0.06), 0, ("prompt", "response"), skipped=skipped)
    assert len(rows) == 16 and skipped.facts() == {"data.task": {reason: 1}}


ARRAYS = [case for case, (text, _, reason) in BAD_LINES.items() if reason != "no valid JSON"]


@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_names_the_row(tmp_path, case):
    text, said, reason = BAD_LINES[case]
    path = written(tmp_path, "d.json", "[" + ",\n".join([*LINES.splitlines(), text]) + "]")
    sentence = refusal(path)
    assert said in sentence and f"({path}, row 9); 1 of 9 rows is malformed" in sentence and f"({reason} 1: row 9)" in sentence


JSONS = {
    "blank lines": ("d.jsonl", LINES.replace("\n", "\n\n \n")),
    "trailing commas": ("d.jsonl", LINES.replace("\n", ",\n")),
    "an array that is called lines": ("d.jsonl", ARRAY),
    "an array of one line that is called lines": ("d.jsonl", json.dumps(ROWS)),
    "objects of several lines": ("d.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
    "lines that are called JSON": ("d.json", LINES),
    "no line end": ("d.jsonl", LINES.rstrip()),
    "an object that holds one": ("d.json", json.dumps({"version": 1, "tags": ["a"], "data": ROWS, "splits": []})),
    "separators of Unicode": ("d.jsonl", LINES.replace("question", "a\u2028b\x85c").replace("a\u2028b\x85c", "question")),
}


@pytest.mark.parametrize("case", JSONS)
def test_json_as_it_is_met(tmp_path, case):
    name, text = JSONS[case]
    assert pairs(read(written(tmp_path, name, text))) == ROWS


def test_line_separators_inside_of_texts_end_no_line(tmp_path):
    path = written(tmp_path, "d.jsonl", '{"prompt": "a\u2028b\x85c\x0bd", "response": "e"}\n'.replace("\x0b", "\\u000b"))
    assert read(path) == [{"prompt": "a\u2028b\x85c\x0bd", "response": "e"}]


def test_one_conversation_alone_is_a_row(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert read(written(tmp_path, "d.json", json.dumps({"messages": messages, "id": 1}))) == [{"messages": messages}]


def test_several_lists_of_rows_are_refused(tmp_path):
    path = written(tmp_path, "d.json", json.dumps({"train": ROWS, "test": ROWS[:2]}))
    assert f"{path} holds several lists of rows ('train', 'test'): put the one that is meant into a file" in refusal(path)


def test_an_array_that_is_cut_short_and_one_of_scalars(tmp_path):
    path = written(tmp_path, "d.json", ARRAY[:-40])
    assert re.search(r"is no valid JSON at line 3\d, column \d+ \(.*\): the file seems cut short", refusal(path))
    assert "must hold objects with named values, and this one is a number" in refusal(written(tmp_path, "d.json", "[1, 2]"))


def test_a_damaged_first_line_is_a_malformed_row(tmp_path):
    path = written(tmp_path, "d.jsonl", 'prompt: "a"\n' + LINES)
    assert f"({path}, line 1); 1 of 9 rows is malformed" in refusal(path)
    path = written(tmp_path, "d.jsonl", '{"prompt": "a"\n' + LINES)
    assert f"({path}, line 1); 1 of 9 rows is malformed" in refusal(path)


def test_columns_that_are_not_used_may_hold_anything(tmp_path):
    rows = LINES.replace("}", ', "score": NaN, "bad": "\\ud83d", "ok": true}')
    assert pairs(read(written(tmp_path, "d.jsonl", rows))) == ROWS


# --- Parquet, Arrow, folders


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
    assert "is no Parquet file, though its name ends so" in refusal(written(tmp_path, "e.parquet", LINES))
    assert "cannot be read as Arrow (" in refusal(written(tmp_path, "e.arrow", LINES))
    assert pairs(read(write_parquet(tmp_path / "named.csv"))) == ROWS, "its first bytes leave no doubt"


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
    assert f"'response' is NaN, which is no text: write what is meant, or leave the row out ({path}, row 1)" in refusal(path)


def test_arrow_columns_that_are_there_twice_or_hold_no_utf8(tmp_path):
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "d.parquet")
    assert "names the column 'prompt' twice" in refusal(tmp_path / "d.parquet")
    texts = pyarrow.array([b"good", b"caf\xe9"]).view(pyarrow.utf8())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts, "response": ["a", "b"]}), tmp_path / "d.parquet")
    assert f"the byte 0xe9, which is no UTF-8: write it as UTF-8 ({tmp_path / 'd.parquet'}, row 2)" in refusal(tmp_path / "d.parquet")


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
    assert f"{tmp_path} holds .arrow and .parquet files: leave files of one format in it, or name one" in refusal(tmp_path)


def test_of_files_that_are_named_by_split_those_of_the_split_are_read(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00001.parquet")
    write_parquet(tmp_path / "test-00000-of-00001.parquet", ROWS[:2])
    assert pairs(read(tmp_path)) == ROWS and pairs(read(tmp_path, split="test")) == ROWS[:2]
    assert "holds files of the splits test, train: set split to one of them" in refusal(tmp_path, split="dev")
    write_parquet(tmp_path / "more.parquet")
    assert "holds files of the splits test, train and others" in refusal(tmp_path)


def test_save_to_disk_with_and_without_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one", num_shards=3)
    assert pairs(read(tmp_path / "one")) == ROWS
    datasets.DatasetDict({"train": data, "held": data.select(range(2))}).save_to_disk(tmp_path / "two")
    assert pairs(read(tmp_path / "two")) == ROWS and pairs(read(tmp_path / "two", split="held")) == ROWS[:2]
    assert "holds the splits train, held and no 'test': set split to one of them" in refusal(tmp_path / "two", split="test")
    data.shuffle(seed=1).select(range(3)).save_to_disk(tmp_path / "three")
    assert len(read(tmp_path / "three")) == 3, "as it was chosen, not all that was behind it"
    next((tmp_path / "one").glob("*-of-00003.arrow")).unlink()
    assert re.search(r"names data-\d+-of-00003.arrow in its state.json and does not hold it", refusal(tmp_path / "one"))


# --- columns and mapping


def test_columns_of_every_row_count_not_of_the_first_fifty(tmp_path):
    rows = [{"prompt": f"q {i}", "response": "a"} for i in range(80)]
    late = [{"prompt": "late", "response": "a", "system": "Be brief."}]
    path = written(tmp_path, "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows + late))
    assert read(path)[-1]["system"] == "Be brief." and read(path)[0]["system"] is None
    missing = written(tmp_path, "d.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "q", "answer": "a"}]))
    assert f"data.task: no response ({missing}, line 81); 1 of 81 rows is malformed" in refusal(missing)


@pytest.mark.parametrize("header", ["Prompt,Response", " prompt ,RESPONSE "])
def test_column_names_are_known_in_any_letter_case(tmp_path, header):
    path = written(tmp_path, "d.csv", f"{header}\na,b\n")
    assert read(path) == [{"prompt": "a", "response": "b"}]
    said = refusal(path, columns={"prompt": "prompt", "response": "response"})
    assert f"maps prompt to 'prompt', which {path} does not have (perhaps '{header.split(',')[0]}'): its columns are" in said


def test_texts_without_responses_are_no_task(tmp_path):
    path = written(tmp_path, "d.jsonl", '{"text": "once upon a time"}\n')
    assert refusal(path) == (
        f"data.task: {path} holds texts (column 'text') and no responses to them: give prompts with responses, or messages"
    )
    assert ordered_rows("data.harmful", source(path), 0)[0]["prompt"] == "once upon a time"


# --- how many may be left out


def broken(tmp_path):
    return written(
        tmp_path, "d.jsonl", LINES + '{"prompt": "a"}\n{"prompt": "secret", "response": NaN}\n{"response": "c"}\n{"prompt": "d"}\n'
    )


def test_up_to_the_share_rows_are_left_out_counted_by_reason_and_listed(tmp_path):
    path, skipped = broken(tmp_path), Skipped()
    rows = task_rows(data_section(path, max_bad_rows=0.34), skipped)
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in ROWS}
    assert skipped.facts() == {"data.task": {"no response": 2, "NaN in response": 1, "no prompt": 1}}
    assert skipped.sentences() == [
        f"data.task: 4 of 12 rows of {path} are malformed and left out "
        "(no response 2: lines 9, 12; NaN in response 1: line 10; no prompt 1: line 11)"
    ]
    skipped.write(tmp_path)
    listed = [json.loads(text) for text in (tmp_path / SKIPPED).read_text().splitlines()]
    assert sorted((row["place"], row["reason"]) for row in listed) == [
        ("line 10", "NaN in response"), ("line 11", "no prompt"), ("line 12", "no response"), ("line 9", "no response")
    ]  # fmt: skip
    assert all(row["field"] == "data.task" and row["source"] == str(path) for row in listed)
    assert "secret" not in (tmp_path / SKIPPED).read_text()


def data_section(path, **fields) -> DataSection:
    return DataSection(task=source(path, **fields), safety=source(path))


def test_above_the_share_the_source_is_refused_with_the_count(tmp_path):
    path = broken(tmp_path)
    sentence = refusal(path, max_bad_rows=0.33)
    assert sentence == (
        f"data.task: no response ({path}, line 9); 4 of 12 rows are malformed and data.task.max_bad_rows is 0.33 "
        "(no response 2: lines 9, 12; NaN in response 1: line 10; no prompt 1: line 11): mend them, or set "
        "data.task.max_bad_rows to 0.334 to leave them out"
    )
    exact = written(tmp_path, "e.jsonl", LINES + '{"prompt": "a"}\n' * 2)
    assert len(task_rows(data_section(exact, max_bad_rows=0.2))) == 8, "the share itself may be left out"


@pytest.mark.parametrize("share", [-0.1, 1, 1.5])
def test_the_share_is_one_of_rows(share):
    with pytest.raises(ValueError, match="max_bad_rows"):
        SourceSection(source="d.jsonl", max_bad_rows=share)


@pytest.mark.parametrize("field", ["data.harmful", "data.refusals", "data.safety", "evaluate.harmless"])
def test_where_prompts_are_asked_for_a_missing_response_is_fine_and_a_missing_prompt_is_not(tmp_path, field):
    path = written(tmp_path, "d.jsonl", '{"prompt": "a", "response": null}\n{"prompt": "b"}\n{"prompt": " "}\n')
    assert f"{field}: no prompt ({path}, line 3); 1 of 3 rows is malformed" in refusal(path, field)
    assert len(ordered_rows(field, source(path, max_bad_rows=0.4), 0)) == 2


def test_a_conversation_that_ends_with_the_user_has_no_answer(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "and?"}]
    path = written(tmp_path, "d.jsonl", json.dumps({"messages": turns[:2]}) + "\n" + json.dumps({"messages": turns}) + "\n")
    assert f"data.task: the conversation ends without an answer ({path}, line 2); 1 of 2 rows" in refusal(path)
    assert len(ordered_rows("evaluate.harmful", source(path), 0)) == 2


def test_what_a_message_may_not_be_is_said_with_its_line(tmp_path):
    path = written(tmp_path, "d.jsonl", LINES + json.dumps({"prompt": "q", "response": "a", "messages": [{"role": "x"}]}) + "\n")
    sentence = refusal(path)
    assert "data.task: messages holds the role 'x'" in sentence and f"({path}, line 9); 1 of 9 rows" in sentence
    assert "(unusable messages 1: line 9)" in sentence


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return folder, make_project(folder)


def test_prepare_writes_what_it_left_out_into_the_manifest_and_a_list(project, tmp_path, capsys):
    from pipeline.data.prepare import prepare

    folder, content = project
    task = folder / "task.jsonl"
    task.write_text((folder / "data" / "task.jsonl").read_text() + '{"question": "no answer"}\n')
    content["data"]["task"] |= {"source": str(task), "max_bad_rows": 0.02}
    base = recipe.load(write_recipe(folder, content)).base
    assert check_sources(base) == [f"data.task: 1 of 81 rows of {task} are malformed and left out (no response 1: line 81)"]
    facts = prepare(base, tmp_path)
    assert facts["skipped"] == {"data.task": {"no response": 1}}
    assert json.loads((tmp_path / SKIPPED).read_text())["place"] == "line 81"
    assert f"data.task: 1 of 81 rows of {task} are malformed and left out (no response 1: line 81)" in capsys.readouterr().err


def test_places_are_told_in_words():
    assert str(Place(3, "line")) == "line 3" and str(Place(3, part="a.parquet")) == "a.parquet, row 3"
