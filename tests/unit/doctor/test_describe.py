"""`sap data FILE` says what it sees, and refuses in one sentence what it cannot read."""

import json
import re

import pytest
import yaml

from pipeline.cli import main
from pipeline.data import builtin
from pipeline.defences.recipes import field_rows, load
from tests.project import make_project, write_recipe


@pytest.fixture(autouse=True)
def no_model(tmp_path, monkeypatch):
    """No built-in model is cached, so that no test loads one unasked."""
    monkeypatch.setattr(builtin, "builtin_model_folder", lambda: tmp_path / "none")


def described(capsys, *arguments, code: int = 0) -> str:
    assert main(["data", *map(str, arguments)]) == code
    return capsys.readouterr().out


def mapping(text: str) -> dict:
    """The YAML to paste."""
    block = re.search(r"to paste into a recipe:\n((?: {12}\w.*\n(?: {13,}.*\n)*)+)", text)[1]
    return yaml.safe_load(re.sub(r"^ {12}", "", block, flags=re.MULTILINE))


def test_a_file_is_described_with_its_mapping_and_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "d.csv"
    path.write_text('question,reply,note\n"a, b",c,\nd,e,x\nd,e,x\nd,f,\ng,h\n,i,\n')
    said = described(capsys, path, "--columns", "{prompt: question, response: reply}")
    assert mapping(said) == {
        "data": {
            "task": {"source": str(path), "columns": {"prompt": "question", "response": "reply"}}
        }
    }
    for line in (
        f"source      {path}",
        "format      CSV, UTF-8",
        "rows        6",
        "columns     question: text, in 4 of 5 rows",
        "            reply: text, in all rows",
        "            note: text, in 2 of 5 rows",
        "not used    note",
        "lengths     in characters (give --model for tokens)",
        "            prompts: 1 to 4, median 1, 95% up to 4",
        "            responses: 1 to 1, median 1, 95% up to 1",
        "duplicates  rows like another one: 1, other answers to the same prompt: 1",
        "malformed   2 of 6 rows: data.task is refused unless they are mended, or left out with max_bad_rows: 0.334",
        "            wrong number of fields 1: line 6 (2 fields, but 3 columns)",
        "            no prompt 1: line 7",
    ):
        assert line in said.splitlines(), said


def test_answers_that_stand_for_nothing_are_said(tmp_path, capsys):
    (tmp_path / "d.csv").write_text("question,answer\na,NULL\nb,NULL\nc,d\n")
    line = "mind        'NULL' is the whole answer of 2 rows (lines 2, 3), and is trained as any other: leave"
    assert line in described(capsys, tmp_path / "d.csv")


def test_answers_that_nobody_wants_are_said(tmp_path, capsys):
    rows = [
        {"prompt": "q", "completion": "a", "label": False},
        {"prompt": "r", "completion": "b", "label": True},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "mind        label is false in 1 rows (line 1), and their" in described(
        capsys, tmp_path / "d.jsonl"
    )


def test_what_is_pasted_is_a_recipe_that_reads_the_file(tmp_path, capsys):
    content = make_project(tmp_path)
    pasted = mapping(described(capsys, tmp_path / "data" / "task.jsonl"))
    content["data"]["task"] = pasted["data"]["task"]
    task = load(write_recipe(tmp_path, content)).base.data.task
    assert task.columns == {"prompt": "question", "response": "answer"}
    assert task.source == str(tmp_path / "data" / "task.jsonl")


FIELDS = {
    "a task": (
        {"instruction": "q", "output": "a"},
        "task",
        {"prompt": "instruction", "response": "output"},
        "",
    ),
    "messages": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "task",
        {"messages": "conversations"},
        "",
    ),
    "pairs": (
        {"prompt": "q", "chosen": "a"},
        "safety",
        {"prompt": "prompt", "chosen": "chosen"},
        "",
    ),
    "prompts": (
        {"goal": "q", "id": 7},
        "harmful",
        {"prompt": "goal"},
        "prompts alone: for data.safety",
    ),
    "no text": (
        {"query": "q", "reply": "a", "doc_id": "x1", "url": "u"},
        "task",
        {"prompt": "query", "response": "reply"},
        "",
    ),
    "one other text": (
        {"query": "q", "reply": "a"},
        "task",
        {"prompt": "query", "response": "reply"},
        "'reply' as",
    ),
    "a usual name for answers beside other texts": (
        {"question": "q", "reply": "a", "agent": "Ann", "note": "n"},
        "task",
        {"prompt": "question", "response": "reply"},
        "'reply' as the response is a guess",
    ),
    "answers first": (
        {"reply": "a", "asked": "q"},
        "task",
        {"prompt": "asked", "response": "reply"},
        "are guesses",
    ),
    "a file that calls its prompts harmful": (
        {"harmful_input": "q", "category": "c"},
        "harmful",
        {"prompt": "harmful_input"},
        "'harmful_input' is what harmful data sets call their prompts",
    ),
    "AdvBench's names": (
        {"goal": "q", "target": "a"},
        "harmful",
        {"prompt": "goal", "response": "target"},
        "'goal' is what harmful data sets call their prompts",
    ),
    "two texts": (
        {"frage": "q", "antwort": "a"},
        "task",
        {"prompt": "frage", "response": "antwort"},
        "are guesses",
    ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_the_mapping_that_is_proposed(tmp_path, capsys, case):
    row, field, columns, remark = FIELDS[case]
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    said = described(capsys, tmp_path / "d.jsonl")
    assert mapping(said)["data"][field]["columns"] == columns and remark in said


@pytest.mark.parametrize(
    ("row", "remark"),
    [
        ({"question": "q", "agent": "Ann", "category": "c"}, "prompts alone, and data.task needs"),
        (
            {"question": "q", "a": "x", "b": "y"},
            "responses as well: they may stand in one of the columns a, b",
        ),
    ],
)
def test_prompts_are_not_called_harmful_on_a_guess(tmp_path, capsys, row, remark):
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    said = described(capsys, tmp_path / "d.jsonl")
    assert remark in said and "harmful:\n" not in said
    assert "below the field that the prompts are for" in said
    assert "            columns: {prompt: question}\n" in said
    assert ("--columns '{prompt: question, response: COLUMN}'" in said) == ("a" in row)
    assert "harmful:\n" not in described(
        capsys, tmp_path / "d.jsonl", "--columns", "{prompt: question}"
    )


@pytest.mark.parametrize(
    ("name", "field", "remark"),
    [
        ("twins_harmful", "data.safety", "(harmful prompts to train on; for data.harmful"),
        ("test_twins_harmful", "evaluate.harmful", "(harmful prompts to evaluate on)"),
        ("ordinary", "evaluate.ordinary", "(instructions that have nothing harmful"),
        ("text_to_sql", "data.task", "(the demo's task)"),
    ],
)
def test_built_in_data_are_proposed_for_what_they_are_for(capsys, name, field, remark):
    said = described(capsys, f"builtin:{name}")
    section, key = field.split(".")
    assert list(mapping(said)[section]) == [key] and remark in said
    assert "guess" not in said


def test_every_built_in_set_has_a_field_that_recipes_have():
    assert set(builtin.FIELDS) == set(builtin._READERS)
    known = {name for name, *_ in field_rows()}
    assert not [field for field, _ in builtin.FIELDS.values() if f"{field}.source" not in known]


def test_columns_of_which_nothing_is_known(tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text(
        '{"a": "x", "b": "y", "c": "z", "d": [1], "e": true, "f": null}\n'
    )
    said = described(capsys, tmp_path / "d.jsonl")
    assert (
        "none: no column is known to hold a prompt, so say which does with --columns '{prompt: COLUMN"
        in said
    )
    for line in (
        "a: text, in all",
        "d: list, in all",
        "e: true or false, in all",
        "f: nothing in any row",
    ):
        assert line in said


def test_rows_that_are_all_malformed_are_described(tmp_path, capsys):
    path = tmp_path / "d.csv"
    path.write_bytes("prompt,response\ncaf\xe9,b\n".encode("cp1252"))
    said = described(capsys, path, code=2)
    assert "malformed   1 of 1 rows: data.task is refused unless they are mended\n" in said
    assert (
        "bytes that are not valid UTF-8 1: line 2 (the byte 0xe9 is not valid UTF-8: save the file as UTF-8"
        in said
    )


def test_lengths_in_tokens_of_a_model_and_what_its_default_would_cut(tmp_path, capsys):
    make_project(tmp_path)
    rows = [
        {"prompt": "red " * n, "response": "blue " * m} for n, m in ((1, 1), (1, 2000), (2000, 1))
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = described(capsys, tmp_path / "d.jsonl", "--model", tmp_path / "model")
    assert f"lengths     in tokens of {tmp_path / 'model'}, without the chat template's own" in said
    assert "with data.max_length 512, its default: 1 responses would be cut, 1 rows dropped" in said


REFUSED = {
    "a file that is not there": (["nowhere.csv"], "nowhere.csv does not exist: give a"),
    "an ending that is none": (["d.txt"], "has the unknown ending '.txt'"),
    "columns that are no mapping": (
        ["d.jsonl", "--columns", "[a"],
        "--columns is '[a': give a mapping",
    ),
    "a field that is none": (
        ["d.jsonl", "--columns", "{ask: a}"],
        "columns maps to 'ask', which is not a field",
    ),
    "a column that is none": (["d.jsonl", "--columns", "{prompt: b}"], "maps prompt to 'b', which"),
    "a model that is none": (
        ["d.jsonl", "--model", "/nowhere"],
        "model.path '/nowhere' is not a folder",
    ),
    "damaged": (["e.json"], "is not valid JSON at line 1, column 9"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_one_sentence_and_2(tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    for name, text in {"d.txt": "a", "d.jsonl": '{"prompt": "a"}\n', "e.json": '[{"a": 1'}.items():
        (tmp_path / name).write_text(text)
    arguments, sentence = REFUSED[case]
    assert main(["data", *arguments]) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and sentence in error


def test_folders_and_built_in_data_are_described(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for number in range(2):
        (tmp_path / "data" / f"{number}.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    said = described(capsys, tmp_path / "data")
    assert "format      folder of 2 files, JSON Lines, UTF-8" in said and "rows        2\n" in said
    assert "rows like another one: 1" in said
    said = described(capsys, "builtin:lookalikes", "--columns", "{prompt: prompt}")
    assert "format      built-in data" in said and "malformed   none: every row can be used" in said


def test_the_help_names_it(capsys):
    assert main(["--help"]) == 0
    assert "`sap data FILE`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text"),
    [("rows.csv", "prompt,response\n,\n"), ("rows.jsonl", '{"messages": [{"x": 1}]}\n')],
)
def test_a_file_without_a_row_that_can_be_used_is_told_which_are_wrong(
    tmp_path, capsys, name, text
):
    (tmp_path / name).write_text(text)
    assert main(["data", str(tmp_path / name)]) in (0, 2)
    assert "malformed   1 of 1 rows" in capsys.readouterr().out
