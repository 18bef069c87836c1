"""Messages as people write them: used as they are, or refused by place and field; nothing is left out."""

import json

import pytest

from pipeline.data.chat import Chat
from pipeline.data.messages import parse_messages, parse_tools
from pipeline.data.rows import _pair, _row
from pipeline.evaluation.evaluate import prompts as asked
from tests.project import make_project, make_tokenizer, write_jsonl
from tests.unit.data.test_prepare import prepared

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
ASKED = {"role": "user", "content": "q"}


def parsed(*messages):
    return parse_messages(list(messages), "data.task: messages")


@pytest.mark.parametrize(
    "given, kept",
    [
        (
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"content": "", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"content": None, "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "content": "so", "tool_calls": [CALL]},
            {"content": "so", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "tool_calls": json.dumps([CALL])},
            {"content": None, "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
            {"content": None, "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "tool_calls": [CALL | {"id": "c1"}]},
            {"content": None, "tool_calls": [{"id": "c1"} | CALL]},
        ),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": 1}'}},
            {"content": None, "tool_calls": [CALL]},
        ),
        (
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"content": None, "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "content": "x", "reasoning_content": "r"},
            {"content": "x", "reasoning_content": "r"},
        ),
        (
            {"role": "assistant", "content": "x", "thinking": "r"},
            {"content": "x", "reasoning_content": "r"},
        ),
        (
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "x"}],
            },
            {"content": "x", "reasoning_content": "r"},
        ),
        ({"role": "assistant", "content": "x", "train": False}, {"content": "x", "train": False}),
        ({"role": "assistant", "content": "x", "weight": 0}, {"content": "x", "train": False}),
        ({"role": "assistant", "content": "x", "weight": 1.0}, {"content": "x", "train": True}),
        (
            {"role": "assistant", "content": "x", "tool_calls": [], "refusal": None},
            {"content": "x"},
        ),
        (
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}],
            },
            {"content": "xy"},
        ),
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
    assert parsed(ASKED, {"from": "observation", "value": "42"})[1] == {
        "role": "tool",
        "content": "42",
    }


@pytest.mark.parametrize(
    "given, what",
    [
        ({"role": "assistant", "content": None}, "message 2, of role assistant, has no content"),
        ({"role": "assistant"}, "message 2, of role assistant, has no content"),
        (
            {"role": "assistant", "content": ""},
            "message 2, of role assistant, has an empty content",
        ),
        ({"role": "user", "content": " \n"}, "message 2, of role user, has an empty content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
            "part of type 'image_url'",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "part of type 'text'"),
        ({"role": "user", "content": [7]}, "part of type 'int'"),
        ({"role": "user", "content": {"text": "x"}}, "content that is a dict"),
        ({"role": "user", "content": True}, "content that is a bool"),
        (
            {"role": "user", "content": "x", "tool_calls": [CALL]},
            "field 'tool_calls', which is not known for the role user",
        ),
        ({"role": "user", "content": "x", "images": ["a.png"]}, "field 'images'"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "field 'audio'"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "weight '0.5'"),
        ({"role": "assistant", "content": "x", "train": "yes"}, "train 'yes'"),
        (
            {"role": "assistant", "content": "x", "reasoning_content": ["r"]},
            "reasoning that is a list",
        ),
        ({"role": "assistant", "tool_calls": "call f"}, "no list of calls"),
        ({"role": "assistant", "tool_calls": [{"type": "function"}]}, "without a function's name"),
        ({"from": "function_call", "value": "call f"}, "no list of calls"),
        ({"role": "assistant", "content": "a", "value": "b"}, "content and value, which differ"),
        (
            {"role": "assistant", "content": "a", "reasoning": "r", "thinking": "s"},
            "reasoning and thinking, which differ",
        ),
        (
            {"role": "assistant", "content": "a", "train": True, "weight": 0},
            "train and weight, which differ",
        ),
        (
            {"role": "assistant", "tool_calls": [CALL], "function_call": {"name": "g"}},
            "tool_calls and function_call",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "output": "x"}]},
            "tool call with the field 'output'",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "args": {"a": 1}, "input": {}}]},
            "args and input, which differ",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": {1, 2}}}]},
            "arguments are not JSON",
        ),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "x", "image": "y"}]},
            "part with the field 'image'",
        ),
        (
            {"role": "user", "content": [{"type": "thinking", "thinking": "r"}, "x"]},
            "a thought among the parts",
        ),
        ({"role": "assistant", "content": float("nan")}, "content that is a float"),
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
        with pytest.raises(
            ValueError, match=r"^data.task: tools holds a .* no list of definitions"
        ):
            parse_tools(given, "data.task: tools")


def test_a_row_keeps_its_last_answer_as_a_message_and_its_tools():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = _row(
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL]}], "tools": tools},
        "data.task",
    )
    assert row["messages"] == [ASKED] and row["tools"] == tools
    assert (
        row["answer"] == {"role": "assistant", "content": None, "tool_calls": [CALL]}
        and row["response"] == '[{"name": "f", "arguments": {"a": 1}}]'
    )
    assert "answer" not in _row(
        {"messages": [ASKED, {"role": "assistant", "content": "x"}]}, "data.task"
    )


def test_nesting_without_end_is_refused():
    for messages in ("[" * 100_000, [ASKED, {"role": "assistant", "tool_calls": "[" * 100_000}]):
        with pytest.raises(ValueError, match=r"data.task: messages"):
            _row({"messages": messages}, "data.task")


def test_a_text_beside_a_conversation_is_its_answer_part_of_it_or_refused():
    asked = [ASKED]
    assert _row({"messages": asked, "response": "y"}, "data.task")["response"] == "y"
    both = {"messages": [*asked, {"role": "assistant", "content": "y"}], "prompt": "q"}
    assert _row(both, "data.task")["response"] == "y"
    for name in ("prompt", "input", "response"):
        with pytest.raises(
            ValueError,
            match=f"^data.task: {name} stands beside a conversation that does not hold it",
        ):
            _row(both | {name: "The documents say five."}, "data.task")


def test_pairs_whose_answers_are_more_than_text_are_refused():
    for key, value in {"tool_calls": [CALL], "reasoning_content": "r", "train": False}.items():
        sides = {
            side: [ASKED, {"role": "assistant", "content": side, key: value}]
            for side in ("chosen", "rejected")
        }
        with pytest.raises(
            ValueError, match=f"data.safety: chosen ends with a message that has {key}"
        ):
            _pair(sides, "data.safety")


def test_white_space_of_prompts_and_responses_is_theirs():
    row = _row({"prompt": "  q\n", "response": "\n    def f():\n"}, "data.task")
    assert (row["prompt"], row["messages"][0]["content"], row["response"]) == (
        "  q\n",
        "  q\n",
        "\n    def f():\n",
    )
    assert _row({"prompt": "q", "response": " \n "}, "data.task")["response"] == "", (
        "nothing is said"
    )


TOOL_TEMPLATE = (
    "{% for t in tools or [] %}<|im_start|>tool {{ t.function.name }}<|im_end|>\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<why>{{ m.reasoning_content }}</why>{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("messages")
    content = make_project(folder)
    (folder / "tools.jinja").write_text(TOOL_TEMPLATE)
    return folder, content


def prepared_rows(project, tmp_path, rows, *overrides):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    source = (
        f"--data.task.source={tmp_path / 'rows.jsonl'}",
        "--data.task.columns={}",
        f"--model.chat_template={project[0] / 'tools.jinja'}",
    )
    return prepared(project, tmp_path / "out", *source, *overrides)


def test_calls_of_tools_are_trained_tested_and_asked_for_with_their_tools(project, tmp_path):
    """What is expected of a tested answer is what the template makes of the call."""
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
    calls = [
        {
            "id": f"c{i}",
            "type": "function",
            "function": {"name": "find", "arguments": json.dumps({"what": f"thing {i}"})},
        }
        for i in range(40)
    ]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"find {i}"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ],
            "tools": tools,
        }
        for i, call in enumerate(calls)
    ]
    sets, facts = prepared_rows(project, tmp_path, rows)
    assert not facts["encoding"]["data.task"]["dropped"]
    chat = Chat(make_tokenizer_with(TOOL_TEMPLATE))
    for row in (*sets["task_test"], *[row for row in sets["task_train"] if row["kind"] == "task"]):
        said = chat.tokenizer.decode([token for token in row["labels"] if token != -100])
        number = row["prompt"].removeprefix("find ")
        assert f'"what": "thing {number}"' in said and said.endswith("</call><|im_end|>")
        assert row["response"] == said.removesuffix("<|im_end|>")
        (prompt,) = asked(chat, [row])
        assert row["input_ids"][: len(prompt)] == prompt and "tool find" in chat.tokenizer.decode(
            prompt
        )


def test_reasoning_is_kept_refused_or_left_out_and_counted(project, tmp_path, capsys):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"ask {i}"},
                {"role": "assistant", "content": f"say {i}", "reasoning_content": f"think {i}"},
            ]
        }
        for i in range(40)
    ]
    for folder in ("kept", "dropped", "refused"):
        (tmp_path / folder).mkdir()
    sets, facts = prepared_rows(project, tmp_path / "kept", rows)
    text = make_tokenizer().decode(sets["task_test"][0]["input_ids"])
    assert "<why>think" in text and facts["without_reasoning"] == {}
    plain = "--model.chat_template=null"
    with pytest.raises(
        ValueError,
        match=r"data.task: .* leaves out reasoning_content: set `reasoning` of the source to drop",
    ):
        prepared_rows(project, tmp_path / "refused", rows, plain)
    capsys.readouterr()
    sets, facts = prepared_rows(
        project, tmp_path / "dropped", rows, plain, "--data.task.reasoning=drop"
    )
    assert all(
        "think" not in make_tokenizer().decode(row["input_ids"]) for row in sets["task_train"]
    )
    assert facts["without_reasoning"] == {"data.task": 40}
    assert (
        "data.task: the reasoning of 40 rows is left out, as data.task.reasoning says"
        in capsys.readouterr().err
    )


def make_tokenizer_with(template: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer
