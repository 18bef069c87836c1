"""Messages as people write them: used as they are, or refused by place and field; nothing is left out."""

import json

import pytest

from pipeline.data.messages import parse_messages, parse_tools
from pipeline.data.rows import _row

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
ASKED = {"role": "user", "content": "q"}


def parsed(*messages):
    return parse_messages(list(messages), "data.task: messages")


@pytest.mark.parametrize(
    "given, kept",
    [
        ({"role": "assistant", "content": "", "tool_calls": [CALL]}, {"content": "", "tool_calls": [CALL]}),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, {"content": None, "tool_calls": [CALL]}),
        ({"role": "assistant", "content": "so", "tool_calls": [CALL]}, {"content": "so", "tool_calls": [CALL]}),
        ({"role": "assistant", "tool_calls": json.dumps([CALL])}, {"content": None, "tool_calls": [CALL]}),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}, {"content": None, "tool_calls": [CALL]}),
        ({"role": "assistant", "tool_calls": [CALL | {"id": "c1"}]}, {"content": None, "tool_calls": [{"id": "c1"} | CALL]}),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": 1}'}}, {"content": None, "tool_calls": [CALL]}),
        ({"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'}, {"content": None, "tool_calls": [CALL]}),
        ({"role": "assistant", "content": "x", "reasoning_content": "r"}, {"content": "x", "reasoning_content": "r"}),
        ({"role": "assistant", "content": "x", "thinking": "r"}, {"content": "x", "reasoning_content": "r"}),
        ({"role": "assistant", "content": [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "x"}]}, {"content": "x", "reasoning_content": "r"}),
        ({"role": "assistant", "content": "x", "train": False}, {"content": "x", "train": False}),
        ({"role": "assistant", "content": "x", "weight": 0}, {"content": "x", "train": False}),
        ({"role": "assistant", "content": "x", "weight": 1.0}, {"content": "x", "train": True}),
        ({"role": "assistant", "content": "x", "tool_calls": [], "refusal": None}, {"content": "x"}),
        ({"role": "assistant", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}, {"content": "xy"}),
        ({"role": "assistant", "content": ["x", "y"]}, {"content": "xy"}),
        ({"role": "assistant", "content": "  x\n"}, {"content": "  x\n"}),
        ({"role": "assistant", "content": 7, "id": 3, "timestamp": 12.5}, {"content": "7"}),
    ],
)
def test_what_an_assistant_says_is_kept(given, kept):
    assert parsed(ASKED, given) == [ASKED, {"role": "assistant"} | kept]


def test_what_a_tool_returns_is_kept():
    given = {"role": "tool", "content": "42", "tool_call_id": "c1", "name": "f"}
    assert parsed(ASKED, given)[1] == given
    assert parsed(ASKED, {"from": "observation", "value": "42"})[1] == {"role": "tool", "content": "42"}


@pytest.mark.parametrize(
    "given, what",
    [
        ({"role": "assistant", "content": None}, "message 2, of role assistant, has no content"),
        ({"role": "assistant"}, "message 2, of role assistant, has no content"),
        ({"role": "assistant", "content": ""}, "message 2, of role assistant, has an empty content"),
        ({"role": "user", "content": " \n"}, "message 2, of role user, has an empty content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "part of type 'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, "part of type 'text'"),
        ({"role": "user", "content": [7]}, "part of type 'int'"),
        ({"role": "user", "content": {"text": "x"}}, "content that is a dict"),
        ({"role": "user", "content": True}, "content that is a bool"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "field 'tool_calls', which is not known for the role user"),
        ({"role": "user", "content": "x", "images": ["a.png"]}, "field 'images'"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "field 'audio'"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "weight '0.5'"),
        ({"role": "assistant", "content": "x", "train": "yes"}, "train 'yes'"),
        ({"role": "assistant", "content": "x", "reasoning_content": ["r"]}, "reasoning that is a list"),
        ({"role": "assistant", "tool_calls": "call f"}, "no list of calls"),
        ({"role": "assistant", "tool_calls": [{"type": "function"}]}, "without a function's name"),
        ({"from": "function_call", "value": "call f"}, "no list of calls"),
    ],
)
def test_what_is_not_known_is_refused_by_place_and_field(given, what):
    with pytest.raises(ValueError) as caught:
        parsed(ASKED, given)
    said = str(caught.value)
    assert said.startswith("data.task: messages: message 2") and what in said and "\n" not in said


def test_tools_are_definitions_or_their_json():
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for given in ([tool], [tool["function"]], json.dumps([tool]), [json.dumps(tool)]):
        assert parse_tools(given, "data.task: tools") == [tool]
    for given in ("f", [7], {"name": "f"}, "7"):
        with pytest.raises(ValueError, match="^data.task: tools holds a .* no list of definitions"):
            parse_tools(given, "data.task: tools")


def test_a_row_keeps_its_last_answer_as_a_message_and_its_tools():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = _row({"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL]}], "tools": tools}, "data.task")
    assert row["messages"] == [ASKED] and row["tools"] == tools
    assert row["answer"] == {"role": "assistant", "content": None, "tool_calls": [CALL]} and row["response"] == '[{"name": "f", "arguments": {"a": 1}}]'
    assert "answer" not in _row({"messages": [ASKED, {"role": "assistant", "content": "x"}]}, "data.task")


def test_white_space_of_prompts_and_responses_is_theirs():
    row = _row({"prompt": "  q\n", "response": "\n    def f():\n"}, "data.task")
    assert (row["prompt"], row["messages"][0]["content"], row["response"]) == ("  q\n", "  q\n", "\n    def f():\n")
    assert _row({"prompt": "q", "response": " \n "}, "data.task")["response"] == "", "nothing is said"
