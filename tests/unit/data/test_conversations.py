"""Conversations of several turns, pairs given as messages, and values that are no text."""

import json
import random
import re

import pytest

from pipeline.data.messages import ROLES
from pipeline.data.overlap import Claims, assert_disjoint, normalise, user_turns
from pipeline.data.rows import _pair, _row
from tests.project import make_tokenizer, write_jsonl
from tests.unit.data.test_prepare import evaluated, prepared

KNOWN = [
    "system",
    "developer",
    "user",
    "human",
    "assistant",
    "gpt",
    "model",
    "tool",
    "function",
    "observation",
]


def chat(*turns: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [
        {"role": ("user", "assistant")[number % 2], "content": turn}
        for number, turn in enumerate(turns)
    ]


def conversations(count: int = 40) -> list[dict]:
    return [
        {
            "messages": chat(
                f"question {i} of a talk", f"answer {i}", f"and what of {i}", f"that is {i * i}"
            )
        }
        for i in range(count)
    ]


def planted(name: str, count: int) -> list[dict]:
    """Conversations whose first turns are prompts of one of the project's sources, and whose last are not."""
    turns = (
        (f"{name} forbidden request number {i}!", "Sure.", f"unheard of {i}", "Right.")
        for i in range(count)
    )
    return [{"messages": chat(*each)} for each in turns]


def with_source(
    project, tmp_path, field: str, rows: list[dict], *overrides: str, columns: str = "{}"
):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return prepared(
        project,
        tmp_path / "out",
        f"--{field}.source={tmp_path / 'rows.jsonl'}",
        f"--{field}.columns={columns}",
        *overrides,
    )


def supervised(row: dict, side: str) -> str:
    return make_tokenizer().decode([label for label in row[f"{side}_labels"] if label != -100])


def test_no_user_turn_of_a_training_sample_is_evaluated(project, tmp_path):
    """Of an early turn or of the last, and of every set of the task."""
    write_jsonl(tmp_path / "rows.jsonl", conversations() + planted("Harmful_eval", 6))
    source = (
        f"--data.task.source={tmp_path / 'rows.jsonl'}",
        "--data.task.columns={}",
        "--evaluate.harmful_prompts=8",
    )
    sets, _, facts = evaluated(project, tmp_path / "out", *source)
    left = {row["prompt"] for row in sets["eval_harmful"]}
    assert left == {f"harmful_eval forbidden request number {i}" for i in (6, 7)}
    assert sum(facts["overlapping"].values()) == 6
    assert all(pools.startswith("evaluate.harmful / task_") for pools in facts["overlapping"])


def test_no_user_turn_of_a_validation_prompt_is_trained_on(project, tmp_path):
    sets, facts = with_source(
        project, tmp_path, "data.task", conversations() + planted("Validation", 8)
    )
    held = {normalise(row["prompt"]) for row in sets["validation_prompts"]}
    assert len(held) == 8
    for name in ("task_train", "task_validation", "task_test"):
        assert sets[name] and not held & {
            normalise(turn) for row in sets[name] for turn in user_turns(row)
        }
    assert facts["overlapping"]["data.task / data.validation_prompts"] == 8


def test_a_row_is_refused_for_any_of_its_user_turns_that_is_asked_alone_and_claims_none():
    claims = Claims()
    claims.take("first", [{"prompt": "a"}], by_prompt=True)
    mixed = {"messages": chat("b", "x", "A!", "y", "c"), "prompt": "c"}
    assert claims.take("second", [mixed]) == [] and claims.facts()["overlapping"] == {
        "second / first": 1
    }
    assert claims.take("third", [{"prompt": "b"}, {"prompt": "c"}]), (
        "what was refused holds nothing"
    )


def test_conversations_that_end_alike_are_no_duplicates():
    claims = Claims()
    rows = [
        {"messages": chat(question, "x", "Thanks"), "prompt": "Thanks"}
        for question in ("one", "two", "Two!", "three")
    ]
    assert len(claims.take("a", rows)) == 3 and claims.facts() == {
        "overlapping": {},
        "duplicate": {"a": 1},
    }
    assert len(Claims().take("a", rows, by_prompt=True)) == 1, (
        "a pool that keeps the last turn alone"
    )


def test_turns_of_signs_alone_are_shared_by_many():
    claims = Claims()
    assert claims.take("a", [{"messages": chat("one", "x", "?"), "prompt": "?"}]) and claims.take(
        "b", [{"messages": chat("two", "x", "!")} | {"prompt": "!"}]
    )


def test_the_last_look_sees_every_user_turn():
    talk = chat("Earlier one", "x", "last")
    for messages in (talk, json.dumps(talk)):
        with pytest.raises(ValueError, match="'Earlier one' is in evaluation and in train"):
            assert_disjoint(
                {
                    "evaluation": [{"prompt": "earlier ONE?"}],
                    "train": [{"prompt": "last", "messages": messages}],
                }
            )


def test_the_last_look_sees_the_turns_of_pairs(project, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Claims, "take", lambda self, pool, rows, count=None, by_prompt=False: list(rows)[:count]
    )
    rows = [
        {"messages": chat("harmful_eval forbidden request number 1", "x", f"go on {i}")}
        for i in range(4)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    source = (f"--data.safety.source={tmp_path / 'rows.jsonl'}", "--data.safety.columns={}")
    with pytest.raises(ValueError, match="number 1' is in safety_pairs and in eval_harmful"):
        evaluated(project, tmp_path / "out", *source, "--evaluate.harmful_prompts=8")


def test_order_of_conversations_that_end_alike_does_not_matter(project, tmp_path):
    rows = [
        {"messages": chat(f"question {i} of a talk", "yes", f"and {i // 20}", "no")}
        for i in range(60)
    ]
    found = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(
            with_source(
                project,
                folder,
                "data.task",
                random.Random(number).sample(rows, 60),
                "--data.test_samples=1",
                "--data.validation_samples=1",
            )[0]
        )
    assert (
        found[0]["task_train"] == found[1]["task_train"]
        and found[0]["task_test"] == found[1]["task_test"]
    )


def test_pairs_supervise_the_last_turn_alone(project, tmp_path):
    rows = [
        {
            "messages": chat(f"hello {i}", "an earlier reply", f"now do {i}"),
            "chosen": "I will not.",
            "rejected": "Sure, here",
        }
        for i in range(4)
    ]
    sets, _ = with_source(project, tmp_path, "data.safety", rows)
    assert len(sets["safety_pairs"]) == 4 and "messages" not in sets["safety_pairs"][0]
    for row in sets["safety_pairs"]:
        assert "an earlier reply" in make_tokenizer().decode(row["chosen_input_ids"])
        assert (
            supervised(row, "chosen") == "I will not.<|im_end|>"
            and supervised(row, "rejected") == "Sure, here<|im_end|>"
        )


def test_pairs_that_truncation_makes_alike_are_dropped_and_counted(project, tmp_path):
    long = "the same words in both " * 20
    rows = [
        {"prompt": f"do {i}", "chosen": f"{long}no", "rejected": f"{long}yes"} for i in range(3)
    ]
    rows += [{"prompt": f"do not {i}", "chosen": "no", "rejected": "yes"} for i in range(3)]
    sets, facts = with_source(project, tmp_path, "data.safety", rows, "--data.safety_max_length=60")
    assert {row["prompt"] for row in sets["safety_pairs"]} == {"do not 0", "do not 1", "do not 2"}
    assert facts["encoding"]["data.safety"] == {"truncated": 0, "dropped": 3}


def test_pairs_as_lists_of_messages(project, tmp_path):
    shared = chat("a question before", "a reply before")
    rows = [
        {
            side: [*shared, *chat(f"do {i}", text)]
            for side, text in (("chosen", "No."), ("rejected", "Yes."))
        }
        for i in range(4)
    ]
    parted = [
        {
            "chosen": chat(f"x {i}", "a", "b", "No."),
            "rejected": chat(f"x {i}", "other", "b", "Yes."),
        }
        for i in range(3)
    ]
    sets, facts = with_source(project, tmp_path, "data.safety", rows + parted)
    assert {row["prompt"] for row in sets["safety_pairs"]} == {f"do {i}" for i in range(4)}
    assert all((row["chosen"], row["rejected"]) == ("No.", "Yes.") for row in sets["safety_pairs"])
    assert facts["encoding"]["data.safety"]["dropped"] == 3
    assert all(
        "a question before" in make_tokenizer().decode(row["chosen_input_ids"])
        for row in sets["safety_pairs"]
    )


def test_a_list_of_the_answer_alone_and_one_side_as_a_list():
    answer = [{"role": "assistant", "content": "No."}]
    row = _pair({"prompt": "q", "chosen": answer, "rejected": "Yes."}, "data.safety")
    assert row == {
        "messages": chat("q"),
        "prompt": "q",
        "response": "",
        "chosen": "No.",
        "rejected": "Yes.",
    }
    row = _pair({"prompt": "q", "chosen": chat("q", "No.")}, "data.safety")
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("q", "No.", "")
    assert _pair({"prompt": "q", "chosen": [], "rejected": None}, "data.safety")["chosen"] == ""


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(
    "value, what",
    [
        ({"text": "a"}, "dict"),
        (["a"], "list"),
        (chat("q"), "without an assistant's turn"),
        (b"a", "bytes"),
    ],
)
def test_pairs_of_anything_else_are_refused(side, value, what):
    one_sentence(
        lambda: _pair({"prompt": "q", side: value}, "data.safety"), f"data.safety: {side} .*{what}"
    )


@pytest.mark.parametrize("column", ["prompt", "input", "response", "system"])
@pytest.mark.parametrize(
    "value, what",
    [({"a": 1}, "dict"), (["a"], "list"), (chat("q"), "map a list of messages to messages")],
)
def test_columns_of_anything_but_text_are_refused(column, value, what):
    one_sentence(
        lambda: _row({"prompt": "q", "response": "a", column: value}, "data.task"),
        f"data.task: {column} .*{what}.*data.task.columns",
    )


def test_numbers_become_text_and_nothing_is_empty():
    row = _row({"prompt": 7, "response": 0, "system": None}, "data.task")
    assert row == {"messages": chat("7"), "prompt": "7", "response": "0"}
    assert _row({"prompt": None, "response": "a"}, "data.task") is None


@pytest.mark.parametrize("role", KNOWN)
def test_known_roles(role):
    kind = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}.get(
        role, role
    )
    kind = {"function": "tool", "observation": "tool"}.get(role, kind)
    for given in (
        [{"role": role, "content": "x"}],
        [{"from": role, "value": "x"}],
        json.dumps([{"role": role, "content": "x"}]),
    ):
        row = _row(
            {
                "messages": [
                    *chat("q"),
                    *(json.loads(given) if isinstance(given, str) else given),
                    *chat("last"),
                ]
            },
            "data.task",
        )
        assert [message["role"] for message in row["messages"]] == ["user", kind, "user"]


@pytest.mark.parametrize("role", ["narrator", "User", "bot", None, ["user"]])
def test_unknown_roles_are_refused(role):
    messages = [*chat("q"), {"role": role, "content": "x"}]
    one_sentence(
        lambda: _row({"messages": messages}, "data.task"),
        f"data.task: messages.*role '{re.escape(str(role))}'.*{', '.join(ROLES)}",
    )


@pytest.mark.parametrize(
    "messages", ["no JSON", "[1]", {"role": ["user"], "content": ["q"]}, ["q"]]
)
def test_messages_that_are_none_are_refused(messages):
    one_sentence(lambda: _row({"messages": messages}, "data.task"), "data.task: messages holds")


def test_the_source_of_a_prompt_is_written_without_secrets(project, tmp_path):
    folder = tmp_path / "hf_abcdefghijklmnopqrstuvwxyz"
    folder.mkdir()
    write_jsonl(folder / "eval.jsonl", [{"goal": f"other forbidden thing {i}"} for i in range(8)])
    sets, _, _ = evaluated(
        project, tmp_path / "out", f"--evaluate.harmful.source={folder / 'eval.jsonl'}"
    )
    assert all(
        "hf_abc" not in row["source"] and row["source"].endswith("/[redacted]/eval.jsonl")
        for row in sets["eval_harmful"]
    )


def one_sentence(call, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value) and ". " not in str(caught.value)
