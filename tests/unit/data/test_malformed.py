"""Malformed rows: how many may be left out, and where they are counted; columns that appear late."""

import copy
import json

import pytest

from pipeline import artifacts
from pipeline.data.check import check_sources
from pipeline.data.malformed import SKIPPED, Place, Skipped
from pipeline.data.rows import ordered_rows, task_rows
from pipeline.defences import recipes
from pipeline.model.models import load_chat
from pipeline.recipe.sections import DataSection, SourceSection
from tests.project import make_project, write_recipe
from tests.unit.data.reading import LINES, ROWS, read, refusal, source, written


def test_columns_of_every_row_count_not_of_the_first_fifty(tmp_path):
    rows = [{"prompt": f"q {i}", "response": "a"} for i in range(80)]
    late = [{"prompt": "late", "response": "a", "system": "Be brief."}]
    path = written(tmp_path, "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows + late))
    assert read(path)[-1]["system"] == "Be brief." and read(path)[0]["system"] is None
    missing = written(
        tmp_path,
        "d.jsonl",
        "".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "q", "answer": "a"}]),
    )
    assert f"data.task: no response ({missing}, line 81); 1 of 81 rows is malformed" in refusal(
        missing
    )


@pytest.mark.parametrize("header", ["Prompt,Response", " prompt ,RESPONSE "])
def test_column_names_are_known_in_any_letter_case(tmp_path, header):
    path = written(tmp_path, "d.csv", f"{header}\na,b\n")
    assert read(path) == [{"prompt": "a", "response": "b"}]
    said = refusal(path, columns={"prompt": "prompt", "response": "response"})
    assert (
        f"maps prompt to 'prompt', which {path} does not have (perhaps '{header.split(',')[0]}'): its columns are"
        in said
    )


def test_texts_without_responses_are_no_task(tmp_path):
    path = written(tmp_path, "d.jsonl", '{"text": "once upon a time"}\n')
    assert refusal(path) == (
        f"data.task: {path} holds texts (column 'text') and no responses to them: "
        "give prompts with responses, or messages"
    )
    assert ordered_rows("data.harmful", source(path), 0)[0]["prompt"] == "once upon a time"


def broken(tmp_path):
    return written(
        tmp_path,
        "d.jsonl",
        LINES
        + '{"prompt": "a"}\n{"prompt": "secret", "response": NaN}\n{"response": "c"}\n{"prompt": "d"}\n',
    )


def test_up_to_the_share_rows_are_left_out_counted_by_reason_and_listed(tmp_path):
    path, skipped = broken(tmp_path), Skipped()
    rows = task_rows(data_section(path, max_bad_rows=0.34), skipped)
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in ROWS}
    assert skipped.facts() == {
        "data.task": {"no response": 2, "NaN in response": 1, "no prompt": 1}
    }
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
    assert len(task_rows(data_section(exact, max_bad_rows=0.2))) == 8, (
        "the share itself may be left out"
    )


@pytest.mark.parametrize("share", [-0.1, 1, 1.5])
def test_the_share_is_one_of_rows(share):
    with pytest.raises(ValueError, match="max_bad_rows"):
        SourceSection(source="d.jsonl", max_bad_rows=share)


@pytest.mark.parametrize(
    "field", ["data.harmful", "data.refusals", "data.safety", "evaluate.harmless"]
)
def test_where_prompts_are_asked_for_a_missing_response_is_fine_and_a_missing_prompt_is_not(
    tmp_path, field
):
    path = written(
        tmp_path, "d.jsonl", '{"prompt": "a", "response": null}\n{"prompt": "b"}\n{"prompt": " "}\n'
    )
    assert f"{field}: no prompt ({path}, line 3); 1 of 3 rows is malformed" in refusal(path, field)
    assert len(ordered_rows(field, source(path, max_bad_rows=0.4), 0)) == 2


def test_a_conversation_that_ends_with_the_user_has_no_answer(tmp_path):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "and?"},
    ]
    path = written(
        tmp_path,
        "d.jsonl",
        json.dumps({"messages": turns[:2]}) + "\n" + json.dumps({"messages": turns}) + "\n",
    )
    assert (
        f"data.task: the conversation ends without an answer ({path}, line 2); 1 of 2 rows"
        in refusal(path)
    )
    assert len(ordered_rows("evaluate.harmful", source(path), 0)) == 2


def test_what_a_message_may_not_be_is_said_with_its_line(tmp_path):
    path = written(
        tmp_path,
        "d.jsonl",
        LINES + json.dumps({"prompt": "q", "response": "a", "messages": [{"role": "x"}]}) + "\n",
    )
    sentence = refusal(path)
    assert (
        "data.task: messages: message 1 has the role 'x'" in sentence
        and f"({path}, line 9); 1 of 9 rows" in sentence
    )
    assert "(unusable messages 1: line 9)" in sentence


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return folder, make_project(folder)


def test_prepare_writes_what_it_left_out_into_the_manifest_and_a_list(project, tmp_path, capsys):
    from pipeline.data.prepare import prepare
    from pipeline.data.prompts import write_prompts

    folder, content = project[0], copy.deepcopy(project[1])
    task = folder / "task.jsonl"
    task.write_text((folder / "data" / "task.jsonl").read_text() + '{"question": "no answer"}\n')
    content["data"]["task"] |= {"source": str(task), "max_bad_rows": 0.02}
    asked = folder / "asked.jsonl"
    asked.write_text((folder / "data" / "harmful_eval.jsonl").read_text() + '{"goal": null}\n')
    content["evaluate"]["harmful"] |= {"source": str(asked), "max_bad_rows": 0.2}
    base = recipes.load(write_recipe(folder, content)).base
    said = [
        f"data.task: 1 of 81 rows of {task} are malformed and left out (no response 1: line 81)",
        f"evaluate.harmful: 1 of 9 rows of {asked} are malformed and left out (no prompt 1: line 9)",
    ]
    assert check_sources(base) == said
    facts = prepare(base, load_chat(base.model), tmp_path)
    assert facts["skipped"] == {"data.task": {"no response": 1}}
    assert json.loads((tmp_path / SKIPPED).read_text())["place"] == "line 81"
    artifacts.write_json(tmp_path / artifacts.FACTS, facts)
    (tmp_path / "prompts").mkdir()
    assert write_prompts(base, tmp_path, tmp_path / "prompts")["skipped"] == {
        "evaluate.harmful": {"no prompt": 1}
    }
    assert json.loads((tmp_path / "prompts" / SKIPPED).read_text())["place"] == "line 9"
    lines = capsys.readouterr().err.splitlines()
    assert all(lines.count(sentence) == 1 for sentence in said)


def test_parts_of_a_prompt_that_the_recipe_does_not_map_are_said(tmp_path):
    row = {
        "instruction": "q",
        "input": "more",
        "output": "a",
        "system": "S",
        "history": [],
        "id": 1,
    }
    path = written(tmp_path, "d.jsonl", json.dumps(row) + "\n")
    skipped = Skipped()
    mapped = {"prompt": "instruction", "response": "output", "input": "input"}
    assert task_rows(data_section(path, columns=mapped), skipped)[0]["prompt"] == "q\n\nmore"
    said = f"data.task: data.task.columns leaves out what may be part of a prompt in {path}: system, history"
    unused = f"data.task: columns of {path} that are not used: id"
    assert skipped.sentences() == [said, unused] and skipped.facts() == {}
    skipped = Skipped()
    task_rows(data_section(path), skipped)
    assert skipped.sentences() == [unused], (
        "where the recipe maps nothing, all that is known is used"
    )


def test_places_are_told_in_words():
    assert (
        str(Place(3, "line")) == "line 3" and str(Place(3, part="a.parquet")) == "a.parquet, row 3"
    )


def noted(path, field: str = "data.task", **fields) -> list[str]:
    skipped = Skipped()
    ordered_rows(field, source(path, **fields), 0, skipped=skipped)
    return skipped.notes.get(field, [])


def test_columns_that_no_field_takes_are_said(tmp_path):
    path = written(tmp_path, "d.csv", "id,prompt,answer,response\n1,a,b,c\n")
    assert noted(path) == [f"data.task: columns of {path} that are not used: id, answer"]
    assert noted(path, columns={"prompt": "id", "response": "answer"}) == [
        f"data.task: columns of {path} that are not used: prompt, response"
    ]
    assert noted("builtin:harmful_test", "data.harmful") == [], (
        "what this project ships is mapped as it is meant"
    )


def test_answers_that_databases_write_for_nothing_are_said_and_stay(tmp_path):
    path = written(
        tmp_path, "d.csv", "prompt,response\na,\\N\nb,c\nd,NULL\ne,\\N\nf,NULL and more\n"
    )
    assert noted(path) == [
        f"data.task: '{text}' is the whole answer of {count} rows ({places}), and is trained as any other: "
        "leave the rows out if it stands for nothing"
        for text, count, places in (("\\N", 2, "lines 2, 5"), ("NULL", 1, "line 4"))
    ]


def test_answers_that_nobody_wants_are_refused_unless_columns_are_named(tmp_path):
    rows = [{"prompt": f"q {n}", "completion": f"a {n}", "label": n != 2} for n in range(4)]
    path = written(tmp_path, "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert (
        "says of 1 of its 4 answers that nobody wants them (label is false, first in line 3)"
        in refusal(path)
    )
    assert (
        len(
            ordered_rows(
                "data.task", source(path, columns={"prompt": "prompt", "response": "completion"}), 0
            )
        )
        == 4
    )
    said = (
        "data.task: label is false in 1 rows (line 3), and their answers are trained as the others"
    )
    assert any(
        note.startswith(said)
        for note in noted(path, columns={"prompt": "prompt", "response": "completion"})
    )
    good = written(
        tmp_path, "d.jsonl", "".join(json.dumps(row | {"label": True}) + "\n" for row in rows)
    )
    assert len(ordered_rows("data.task", source(good), 0)) == 4


def test_an_answer_that_ends_with_the_user_is_refused(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"chosen": [*turns, {"role": "user", "content": "thanks"}], "rejected": turns}] * 2
    path = written(tmp_path, "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert "chosen ends with a turn of the user: end it with the answer" in refusal(
        path, "data.safety"
    )


@pytest.mark.parametrize("share", [0.02, 0.01])
def test_a_row_that_cannot_be_rendered_is_left_out_up_to_the_share(project, tmp_path, share):
    from pipeline.data.prepare import prepare

    folder, content = project[0], copy.deepcopy(project[1])
    task = folder / "stopped.jsonl"
    rows = (folder / "data" / "task.jsonl").read_text()
    task.write_text(
        rows + '{"question": "is this the end?", "reply": "it is <|im_end|> and goes on"}\n'
    )
    content["data"]["task"] |= {
        "source": str(task),
        "columns": {"prompt": "question", "response": "reply"},
    }
    task.write_text(
        task.read_text().replace('"answer": ', '"reply": ').replace('"response": ', '"reply": ')
    )
    content["data"]["task"] |= {"max_bad_rows": share}
    base = recipes.load(write_recipe(folder, content)).base
    if share < 1 / 81:
        with pytest.raises(
            ValueError,
            match=r"an answer holds text at which generation stops.*line 81\); 1 of 81 rows is malf",
        ):
            prepare(base, load_chat(base.model), tmp_path)
        return
    facts = prepare(base, load_chat(base.model), tmp_path)
    assert facts["skipped"] == {"data.task": {"cannot be rendered": 1}}
    assert json.loads((tmp_path / SKIPPED).read_text())["place"] == "line 81"
