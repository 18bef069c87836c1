"""Rows of CSV and JSON: what is malformed is refused with its line, and never taken for something else."""

import json
import re

import pytest

from pipeline.data.malformed import Skipped
from pipeline.data.rows import ordered_rows
from tests.unit.data.reading import ARRAY, LINES, ROWS, pairs, read, refusal, source, written


@pytest.mark.parametrize(
    ("name", "sign", "signs"), [("d.csv", ",", "commas"), ("d.tsv", "\t", "tabs")]
)
def test_a_row_with_another_number_of_fields_is_refused(tmp_path, name, sign, signs):
    more = (
        sign.join(("prompt", "response")) + f"\na{sign}b\nDucks{sign} and geese{sign}ok\nc{sign}d\n"
    )
    path = written(tmp_path, name, more)
    expected = f"data.task: 3 fields, but 2 columns: put a field that holds {signs} in quotes ({path}, line 3); "
    assert refusal(path) == (
        f"{expected}1 of 3 rows is malformed and data.task.max_bad_rows is 0 (wrong number of fields 1: line 3): "
        "mend them, or set data.task.max_bad_rows to 0.334 to leave them out"
    )
    assert f"1 field, but 2 columns ({path}, line 3)" in refusal(
        written(tmp_path, name, more.replace(f"{sign} and geese{sign}ok", ""))
    )


def test_lines_are_counted_in_the_file_and_not_in_rows(tmp_path):
    path = written(tmp_path, "d.csv", 'prompt,response\n"a\nb\nc",d\n\ne\n')
    assert f"1 field, but 2 columns ({path}, line 6); 1 of 2 rows" in refusal(path)


SWALLOWED = "".join(f"q {i},a {i}\n" for i in range(40))


def test_a_quote_that_never_closes_or_closes_in_another_row(tmp_path):
    never = written(tmp_path, "d.csv", f'prompt,response\n"open q,a\n{SWALLOWED}')
    assert (
        f"{never} has a quote that is not closed where it should be, in the row that begins in line 2 ("
        in refusal(never)
    )
    opened = written(tmp_path, "d.csv", f'prompt,response\n"open q,a\n{SWALLOWED}"quoted, q",a\n')
    assert "in the row that begins in line 2 (" in refusal(opened)
    late = written(tmp_path, "d.csv", f'prompt,response\n"open q,a\n{SWALLOWED}of 5",a\nlast,row\n')
    assert (
        f"lines that look like rows: close the quote before them, or give JSON Lines ({late}, line 2)"
        in refusal(late)
    )
    end = written(tmp_path, "d.csv", f'prompt,response\na,b\n"open q,a\n{SWALLOWED}last,row"\n')
    said = f"{end} has a quote that is not closed where it should be, in the row that begins in line 3 (1 field, but"
    assert said in refusal(end, max_bad_rows=0.9), "nobody could count what it took in"
    gaps = written(tmp_path, "d.csv", end.read_text().replace("q 7,a 7\n", "\n\n"))
    assert "in the row that begins in line 3 (1 field, but 2 columns)" in refusal(
        gaps, max_bad_rows=0.9
    )
    one = written(tmp_path, "d.csv", 'prompt,response\na,b\n"said" he,b\nc,d\n')
    assert f"quotes do not match (',' expected after '\"') ({one}, line 3); 1 of 3" in refusal(one)
    last = written(tmp_path, "d.csv", 'prompt,response\na,b\n"c,d')
    assert f"quotes do not match (unexpected end of data) ({last}, line 3)" in refusal(last)


def test_texts_of_many_lines_and_fields_of_any_length_are_read(tmp_path):
    poem, table, long = (
        "one, two\n" * 3 + "no comma here\n" * 6,
        "name,age\n" * 9 + "b,1",
        "word " * 100_000,
    )
    path = written(
        tmp_path, "d.csv", f'prompt,response\n"{poem}",b\nc,"{long}"\n"{table}",d\ne,"{table}"\n'
    )
    assert [tuple(row.values()) for row in read(path)] == [
        (poem, "b"),
        ("c", long),
        (table, "d"),
        ("e", table),
    ]


HEADERS = {
    "twice": (
        "q,a,a\n1,2,3\n",
        "names the column 'a' twice in line 1: give each a name of its own",
    ),
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
    assert f"data.task: 'prompt' holds a NUL character: leave it out ({path}, line 3)" in refusal(
        path
    )
    path = written(tmp_path, "d.jsonl", LINES + '{"prompt": "a", "response": "b\\u0000"}\n')
    assert f"'response' holds a NUL character: leave it out ({path}, line 9)" in refusal(path)


def line(text: str) -> str:
    return LINES + text + "\n" + LINES.replace("question", "other")


BAD_LINES = {
    "NaN": ('{"prompt": "q", "response": NaN}', "'response' is NaN, which is not text", "NaN in response"),
    "infinity": ('{"prompt": -Infinity, "response": "a"}', "'prompt' is Infinity", "Infinity in prompt"),
    "too large": ('{"prompt": 1e999, "response": "a"}', "'prompt' is Infinity", "Infinity in prompt"),
    "true": ('{"prompt": "q", "response": true}', "'response' is true, which is not text", "no text as response"),
    "a list": ('{"prompt": "q", "response": ["a"]}', "response holds a list", "unusable response"),
    "an object": ('{"prompt": {"a": 1}, "response": "a"}', "prompt holds a dict", "unusable prompt"),
    "null response": ('{"prompt": "q", "response": null}', "no response", "no response"),
    "no response": ('{"prompt": "q"}', "no response", "no response"),
    "empty response": ('{"prompt": "q", "response": " \\n"}', "no response", "no response"),
    "null prompt": ('{"prompt": null, "response": "a"}', "no prompt", "no prompt"),
    "no prompt": ('{"response": "a"}', "no prompt", "no prompt"),
    "key twice": ('{"prompt": "q", "prompt": "b", "response": "a"}', "the key 'prompt' appears twice", "a key twice"),
    "nested key twice": (
        '{"prompt": "q", "response": "a", "meta": [{"id": 1, "id": 2}]}', "the key 'id' appears twice", "a key twice"
    ),
    "surrogate": ('{"prompt": "\\ud83d", "response": "a"}', "'prompt' holds \\ud83d", "half a character in prompt"),
    "low one": ('{"prompt": "q", "response": "\\udc00"}', "'response' holds \\udc00", "half a character in response"),
    "null": ("null", "must hold objects with named values, and this one is a null", "not an object with named values"),
    "text": (
        '"text"', "must hold objects with named values, and this one is a text", "not an object with named values",
    ),
    "array": (
        '["q", "a"]', "must hold objects with named values, and this one is a", "not an object with named values",
    ),
    "cut short": ('{"prompt": "q", "respon', "the line is not valid JSON (Unterminated string", "no valid JSON"),
    "quotes": ("{'prompt': 'q', 'response': 'a'}", "the line is not valid JSON (Expecting property", "no valid JSON"),
    "two on a line": ('{"prompt": "q", "response": "a"} x', "the line is not valid JSON (Extra data", "no valid JSON"),
    "control": ('{"prompt": "q\x01", "response": "a"}', "the line is not valid JSON (Invalid control", "no valid JSON"),
    "huge number": ('{"prompt": ' + "9" * 5000 + ', "response": "a"}', "a number that is too long", "no valid JSON"),
    "deep": ('{"prompt": ' + "[" * 100_000 + "}", "too deeply nested", "no valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_malformed_line_is_refused_with_its_number_or_left_out_and_counted(tmp_path, case):
    text, said, reason = BAD_LINES[case]
    path = written(tmp_path, "d.jsonl", line(text))
    sentence = refusal(path)
    assert sentence.startswith("data.task: ") and said in sentence
    assert (
        f"({path}, line 9); 1 of 17 rows is malformed and data.task.max_bad_rows is 0 ({reason} 1: line 9)"
        in sentence
    )
    skipped = Skipped()
    rows = ordered_rows(
        "data.task", source(path, max_bad_rows=0.06), 0, ("prompt", "response"), skipped=skipped
    )
    assert len(rows) == 16 and skipped.facts() == {"data.task": {reason: 1}}


ARRAYS = [case for case, (text, _, reason) in BAD_LINES.items() if reason != "no valid JSON"]


@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_names_the_row(tmp_path, case):
    text, said, reason = BAD_LINES[case]
    path = written(tmp_path, "d.json", "[" + ",\n".join([*LINES.splitlines(), text]) + "]")
    sentence = refusal(path)
    assert (
        said in sentence
        and f"({path}, row 9); 1 of 9 rows is malformed" in sentence
        and f"({reason} 1: row 9)" in sentence
    )


JSONS = {
    "blank lines": ("d.jsonl", LINES.replace("\n", "\n\n \n")),
    "trailing commas": ("d.jsonl", LINES.replace("\n", ",\n")),
    "an array that is called lines": ("d.jsonl", ARRAY),
    "an array of one line that is called lines": ("d.jsonl", json.dumps(ROWS)),
    "objects of several lines": ("d.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
    "lines that are called JSON": ("d.json", LINES),
    "no line end": ("d.jsonl", LINES.rstrip()),
    "an object that holds one": (
        "d.json",
        json.dumps({"version": 1, "tags": ["a"], "data": ROWS, "splits": []}),
    ),
    "separators of Unicode": (
        "d.jsonl",
        LINES.replace("question", "a\u2028b\x85c").replace("a\u2028b\x85c", "question"),
    ),
}


@pytest.mark.parametrize("case", JSONS)
def test_json_as_it_is_met(tmp_path, case):
    name, text = JSONS[case]
    assert pairs(read(written(tmp_path, name, text))) == ROWS


def test_line_separators_inside_of_texts_end_no_line(tmp_path):
    path = written(
        tmp_path,
        "d.jsonl",
        '{"prompt": "a\u2028b\x85c\x0bd", "response": "e"}\n'.replace("\x0b", "\\u000b"),
    )
    assert read(path) == [{"prompt": "a\u2028b\x85c\x0bd", "response": "e"}]


def test_one_conversation_alone_is_a_row(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert read(written(tmp_path, "d.json", json.dumps({"messages": messages, "id": 1}))) == [
        {"messages": messages}
    ]


def test_several_lists_of_rows_are_refused(tmp_path):
    path = written(tmp_path, "d.json", json.dumps({"train": ROWS, "test": ROWS[:2]}))
    assert (
        f"{path} holds several lists of rows ('train', 'test'): put the one that is meant into a file"
        in refusal(path)
    )


def test_an_array_that_is_cut_short_and_one_of_scalars(tmp_path):
    path = written(tmp_path, "d.json", ARRAY[:-40])
    assert re.search(
        r"is not valid JSON at line 3\d, column \d+ \(.*\): the file seems cut short", refusal(path)
    )
    assert "must hold objects with named values, and this one is a number" in refusal(
        written(tmp_path, "d.json", "[1, 2]")
    )


def test_a_damaged_first_line_is_a_malformed_row(tmp_path):
    path = written(tmp_path, "d.jsonl", 'prompt: "a"\n' + LINES)
    assert f"({path}, line 1); 1 of 9 rows is malformed" in refusal(path)
    path = written(tmp_path, "d.jsonl", '{"prompt": "a"\n' + LINES)
    assert f"({path}, line 1); 1 of 9 rows is malformed" in refusal(path)


def test_columns_that_are_not_used_may_hold_anything(tmp_path):
    rows = LINES.replace("}", ', "score": NaN, "bad": "\\ud83d", "ok": true}')
    assert pairs(read(written(tmp_path, "d.jsonl", rows))) == ROWS


@pytest.mark.parametrize(("name", "sign"), [("d.csv", ","), ("d.tsv", "\t")])
def test_a_few_lines_in_quotes_that_look_like_rows_are_said(tmp_path, name, sign):
    text = 'prompt,response\na,b\n"open,c\nd",e\nf,"g\nh"\ni,"j,k"\nl,"if m:\n,n"\n'.replace(
        ",", sign
    )
    path, skipped = written(tmp_path, name, text), Skipped()
    rows = ordered_rows("data.task", source(path), 0, ("prompt", "response"), skipped=skipped)
    assert sorted(row["response"] for row in rows) == sorted(
        ["b", "e", "g\nh", f"j{sign}k", f"if m:\n{sign}n"]
    )
    assert skipped.sentences() == [
        "data.task: a field in quotes holds lines that look like rows in 2 rows (lines 3, 8): "
        "see whether a quote closes too late there"
    ]


def test_the_line_with_which_a_spreadsheet_names_its_sign(tmp_path):
    assert pairs(read(written(tmp_path, "d.csv", "sep=,\nprompt,response\na,b\n"))) == [
        {"prompt": "a", "response": "b"}
    ]
    other = written(tmp_path, "d.csv", '"sep=;"\nprompt;response\na;b\n')
    assert refusal(other).endswith(f"{other} says sep=; in line 1: separate its fields with commas")
    assert read(written(tmp_path, "d.csv", "prompt,response\nsep=;,b\n"))[0]["prompt"] == "sep=;"


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_numbers_keep_their_wording(tmp_path, name):
    numbers = ["1.10", "1e5", "-0.0", "12345678901234567890123", "3.141592653589793238462643"]
    rows = ",\n".join(f'{{"prompt": "q {number}", "response": {number}}}' for number in numbers)
    path = written(tmp_path, name, f"[{rows}]" if name == "d.json" else rows)
    found = ordered_rows("data.task", source(path), 0, ("prompt", "response"))
    assert {row["response"] for row in found} == set(numbers)


def test_a_row_alone_that_has_a_list_of_objects_beside_its_texts(tmp_path):
    row = {"question": "q", "answer": "a", "sources": [{"title": "t", "text": "u"}]}
    assert pairs(read(written(tmp_path, "d.json", json.dumps(row)))) == [
        {"prompt": "q", "response": "a"}
    ]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        {"prompt": {"0": "a", "1": "b"}, "response": {"0": "c", "1": "d"}},
        {"columns": ["prompt", "response"], "index": [0], "data": [["a", "b"]]},
    ],
)
def test_what_pandas_writes_by_default_is_named(tmp_path, name, content):
    said = refusal(written(tmp_path, name, json.dumps(content)))
    assert said.endswith(
        "as pandas' to_json(path) writes them: write it with to_json(path, orient='records', lines=True)"
    )
