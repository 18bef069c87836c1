"""Shapes of conversations that data sets come in: each becomes the messages that it means, or is refused."""

import json

import pytest

from pipeline.data.rows import ordered_rows
from pipeline.recipe.sections import SourceSection
from tests.project import write_jsonl


def chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn, after a system prompt where there is one."""
    roles = ("user", "assistant")
    first = [{"role": "system", "content": system}] if system else []
    return [
        *first,
        *({"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)),
    ]


def sharegpt(*turns: str) -> list[dict[str, str]]:
    return [
        {"from": ("human", "gpt")[number % 2], "value": turn} for number, turn in enumerate(turns)
    ]


def read(tmp_path, row: dict, field: str = "data.task", columns: dict | None = None) -> dict:
    """The one row, as data.task or another field has it."""
    write_jsonl(tmp_path / "d.jsonl", [row])
    source = SourceSection(source=str(tmp_path / "d.jsonl"), columns=columns or {})
    required = ("prompt", "response") if field == "data.task" else ("prompt",)
    (found,) = ordered_rows(field, source, 0, required, pairs=field == "data.safety")
    assert str(found.pop("row")) == "line 1"
    return found


BOTH = {"prompt": chat("q"), "completion": chat("q", "a")[1:]}
SHAPES = {
    "ShareGPT": ({"conversations": sharegpt("q", "a")}, chat("q")),
    "ShareGPT with a system column": ({"system": "S", "conversations": sharegpt("q", "a")}, chat("q", system="S")),
    "messages with a system column": ({"system": "S", "messages": chat("q", "a")}, chat("q", system="S")),
    "messages as JSON with one": ({"system": "S", "messages": json.dumps(chat("q", "a"))}, chat("q", system="S")),
    "the same system prompt twice": ({"system": "S ", "messages": chat("q", "a", system="S")}, chat("q", system="S")),
    "a system column of nothing": ({"system": " ", "messages": chat("q", "a")}, chat("q")),
    "a system column of null": ({"system": None, "messages": chat("q", "a", system="S")}, chat("q", system="S")),
    "OpenAI": ({"messages": chat("q", "a", system="S")}, chat("q", system="S")),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, chat("q")),
    "lists of messages": (BOTH, chat("q")),
    "several turns as prompt": (
        {"prompt": chat("q0", "a0", "q", system="S"), "completion": chat("", "a")[1:]},
        chat("q0", "a0", "q", system="S"),
    ),
    "a list and a text": ({"prompt": chat("q"), "completion": "a"}, chat("q")),
    "a text and a list": ({"prompt": "q", "completion": chat("", "a")[1:]}, chat("q")),
    "lists with a system column": ({**BOTH, "system": "S"}, chat("q", system="S")),
    "Alpaca": ({"instruction": "q", "input": "more", "output": "a"}, chat("q\n\nmore")),
    "Alpaca with history": (
        {"instruction": "q", "input": "more", "output": "a", "system": "S", "history": [["q0", "a0"], ["q1", "a1"]]},
        chat("q0", "a0", "q1", "a1", "q\n\nmore", system="S"),
    ),
    "history as JSON": ({"instruction": "q", "output": "a", "history": '[["q0", "a0"]]'}, chat("q0", "a0", "q")),
    "history of messages": ({"prompt": "q", "response": "a", "history": chat("q0", "a0")}, chat("q0", "a0", "q")),
    "history of nothing": ({"instruction": "q", "input": "", "output": "a", "history": []}, chat("q")),
    "an empty text as history": ({"instruction": "q", "output": "a", "history": ""}, chat("q")),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(tmp_path, case):
    row, messages = SHAPES[case]
    found = read(tmp_path, row)
    assert found == {"messages": messages, "prompt": messages[-1]["content"], "response": "a"}


def test_a_system_column_that_the_recipe_maps(tmp_path):
    row = {"rule": "S", "talk": sharegpt("q", "a")}
    assert read(tmp_path, row, columns={"messages": "talk", "system": "rule"})["messages"] == chat(
        "q", system="S"
    )


def test_pairs_whose_prompt_is_a_list_or_stands_in_both_answers(tmp_path):
    yes, no = ([{"role": "assistant", "content": text}] for text in ("Yes.", "No."))
    expected = {
        "messages": chat("q", system="S"),
        "prompt": "q",
        "response": "",
        "chosen": "No.",
        "rejected": "Yes.",
    }
    row = {"prompt": chat("q"), "chosen": no, "rejected": yes, "system": "S"}
    assert read(tmp_path, row, "data.safety") == expected
    row = {"chosen": [*chat("q"), *no], "rejected": [*chat("q"), *yes], "system": "S"}
    assert read(tmp_path, row, "data.safety") == expected
    row = {"prompt": "q", "history": [["q0", "a0"]], "chosen": "No.", "rejected": "Yes."}
    assert read(tmp_path, row, "data.safety")["messages"] == chat("q0", "a0", "q")


def test_prompts_alone_may_be_lists(tmp_path):
    found = read(tmp_path, {"prompt": chat("q0", "a0", "q")}, "data.harmful")
    assert found == {"messages": chat("q0", "a0", "q"), "prompt": "q", "response": ""}


REFUSED = {
    "another system prompt": ({"system": "S", "messages": chat("q", "a", system="T")}, "system says something other"),
    "a system prompt that is none": ({"system": ["S"], "messages": chat("q", "a")}, "system holds a list"),
    "history beside messages": ({"messages": chat("q", "a"), "history": [["b", "c"]]}, "history stands beside"),
    "history of halves": ({"prompt": "q", "response": "a", "history": [["b", None]]}, "history holds other than"),
    "history of three": ({"prompt": "q", "response": "a", "history": [["b", "c", "d"]]}, "history holds other than"),
    "history of texts": ({"prompt": "q", "response": "a", "history": ["b", "c"]}, "history holds other than"),
    "history of an object": ({"prompt": "q", "response": "a", "history": {"b": "c"}}, "history holds other than"),
    "history that is not JSON": (
        {"prompt": "q", "response": "a", "history": "b"}, "history holds text that is not a JSON list",
    ),
    "history before nothing": ({"prompt": None, "response": "a", "history": [["b", "c"]]}, "{file} holds no row with"),
    "input beside a list": ({**BOTH, "input": "more"}, "input stands beside a prompt of several messages"),
    "a list of texts": ({"prompt": ["q"], "response": "a", "history": [["b", "c"]]}, "prompt holds a list"),
    "no answer": ({"prompt": chat("q"), "completion": []}, "the conversation ends without an answer"),
    "an answer of null": ({"prompt": chat("q"), "completion": None}, "the conversation ends without an answer"),
    "a role that is none": (
        {"prompt": chat("q"), "completion": [{"role": "x", "content": "a"}]}, "messages: message 2 has the role",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_mean_two_things_is_refused_with_its_line(tmp_path, case):
    row, said = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        read(tmp_path, row)
    sentence = str(caught.value)
    file = str(tmp_path / "d.jsonl")
    assert sentence.startswith(f"data.task: {said.format(file=file)}")
    assert (
        f"({file}, line 1); 1 of 1 rows is" in sentence or "holds no row with a prompt" in sentence
    )
    assert "\n" not in sentence and ". " not in sentence


def test_lists_of_messages_that_are_written_as_json_are_lists(tmp_path):
    row = {"prompt": json.dumps(chat("q")), "completion": json.dumps(chat("q", "a")[1:])}
    assert read(tmp_path, row) == {"messages": chat("q"), "prompt": "q", "response": "a"}
    row = {
        side: json.dumps(chat("q", text))
        for side, text in (("chosen", "No."), ("rejected", "Yes."))
    }
    found = read(tmp_path, row, "data.safety")
    assert (found["prompt"], found["chosen"], found["rejected"]) == ("q", "No.", "Yes.")
    assert (
        read(tmp_path, {"prompt": "[{x", "response": '[{"a": 1}]'})["response"] == '[{"a": 1}]'
    ), "no messages"


def test_arrow_s_fillers_are_no_arguments(tmp_path):
    import pyarrow
    import pyarrow.parquet

    calls = [
        {"function": {"name": "f", "arguments": {"city": "x"}}},
        {"function": {"name": "g", "arguments": {"date": "y"}}},
    ]
    rows = [{"messages": [*chat("q"), {"role": "assistant", "content": None, "tool_calls": calls}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    (found,) = ordered_rows("data.task", SourceSection(source=str(tmp_path / "d.parquet")), 0)
    assert [call["function"]["arguments"] for call in found["answer"]["tool_calls"]] == [
        {"city": "x"},
        {"date": "y"},
    ]
