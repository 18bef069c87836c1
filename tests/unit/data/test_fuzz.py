"""Random templates, conversations, rows, files and recipes: either a right result, or ValueError of one sentence.

Templates are checked against a renderer of their own, which knows nothing of Jinja. The examples are the same in every
run; FUZZ_EXAMPLES=5000 and a day of patience look further.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import string
from dataclasses import dataclass

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pipeline.data.chat import IGNORE, Chat
from pipeline.data.check import check_sources
from pipeline.data.rows import ordered_rows
from pipeline.defences import recipes
from pipeline.recipe.sections import SourceSection
from tests.project import make_project, make_tokenizer

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))
QUIET = [
    HealthCheck.too_slow,
    HealthCheck.function_scoped_fixture,
    HealthCheck.filter_too_much,
    HealthCheck.data_too_large,
]


def fuzzed(examples: int):
    return settings(
        max_examples=EXAMPLES or examples,
        deadline=None,
        derandomize=not EXAMPLES,
        suppress_health_check=QUIET,
        database=None,
    )


def one_sentence(error: ValueError) -> None:
    said = str(error)
    assert said and "\n" not in said and "Traceback" not in said, said


# Conversations

TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Co", "Cs"]), min_size=1, max_size=12
)
SAID = st.one_of(
    TEXT,
    st.sampled_from(
        [
            "yes",
            "  def f():\n\tpass\n",
            "I<b> & {{ x }}",
            "{% if %}",
            "</think>",
            "assistant",
            "你好。",
            "é\u0301 🙂",
        ]
    ),
)
# hypothesis draws texts that stand in this project's code, too: special tokens have tests of their own
SAID = SAID.filter(lambda text: text.strip() and "<|" not in text)


@st.composite
def conversations(draw) -> list[dict]:
    messages = [{"role": "system", "content": draw(SAID)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [
            {"role": "user", "content": draw(SAID)},
            {"role": "assistant", "content": draw(SAID)},
        ]
    return messages


# Templates of a small grammar, and what they render

OPENS = st.sampled_from(
    ["<|im_start|>{role}\n", "[{role}] ", "### {role}:\n", "{role}: ", "<{role}>"]
)


@dataclass(frozen=True)
class Grammar:
    """open: what a turn begins with, {role} in it. close: what it ends with. end: what stands after the conversation.

    system: own (a turn of its own), first or last (in that turn of the user's), lost, or refused.
    generation: whether the generation prompt opens the assistant's turn. thought: what it opens after that.
    past: whether past answers are rendered in another way. header: whether the user's opening follows an answer.
    """

    open: str
    close: str
    end: str
    system: str
    generation: bool
    thought: str
    past: bool
    header: bool
    trimmed: bool

    def jinja(self) -> str:
        def opened(role):
            return self.open.format(role=role).replace("\n", "\\n")

        close = self.close.replace("\n", "\\n")
        parts = [
            "{%- set ns = namespace(sys='', last=-1) %}{%- for m in messages %}{%- if m.role == 'system' %}"
        ]
        parts += [
            "{{- raise_exception('no system') }}"
            if self.system == "refused"
            else "{%- set ns.sys = m.content %}"
        ]
        parts += [
            (
                "{%- elif m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor "
                "%}{%- set f = namespace(seen=false, answered=false) %}"
            )
        ]
        parts += ["{%- for m in messages %}{%- if m.role == 'system' %}"]
        parts += [
            f"{{{{- '{opened('system')}' + m.content + '{close}' }}}}"
            if self.system == "own"
            else ""
        ]
        parts += ["{%- elif m.role == 'user' %}"]
        condition = {"first": "not f.seen", "last": "loop.index0 == ns.last"}.get(
            self.system, "false"
        )
        begun = (
            f"('' if f.answered else '{opened('user')}')" if self.header else f"'{opened('user')}'"
        )
        parts += [
            (
                f"{{{{- {begun} + ((ns.sys + '\\n') if ns.sys and {condition} else '') + m.content + "
                f"'{close}' }}}}{{%- set f.seen = true %}}"
            )
        ]
        said = "(m.content | trim)" if self.trimmed else "m.content"
        past = (
            f"('(earlier) ' + {said} if loop.index0 < ns.last else {said})" if self.past else said
        )
        after = f" + '{opened('user')}'" if self.header else ""
        parts += [
            (
                f"{{%- else %}}{{{{- '{opened('assistant')}' + {past} + '{close}'{after} }}}}{{%- set "
                f"f.answered = true %}}{{%- endif %}}{{%- endfor %}}"
            )
        ]
        generation = (opened("assistant") if self.generation else "") + self.thought.replace(
            "\n", "\\n"
        )
        parts += [
            (
                f"{{%- if add_generation_prompt %}}{{{{- '{generation}' }}}}{{%- else %}}{{{{- "
                f"'{self.end}' }}}}{{%- endif %}}"
            )
        ]
        return "".join(parts)

    def prompt(self, messages: list[dict]) -> str:
        """What inference puts before the next answer."""
        system = next((m["content"] for m in messages if m["role"] == "system"), "")
        users = [place for place, m in enumerate(messages) if m["role"] == "user"]
        text, answered = "", False
        for place, message in enumerate(messages):
            if message["role"] == "system":
                text += (
                    self.open.format(role="system") + system + self.close
                    if self.system == "own"
                    else ""
                )
            elif message["role"] == "user":
                mine = {"first": users[0], "last": users[-1], "refused": users[0]}.get(
                    self.system
                ) == place and system
                gap = "\n\n" if self.system == "refused" else "\n"
                text += "" if self.header and answered else self.open.format(role="user")
                text += (system + gap if mine else "") + message["content"] + self.close
            else:
                said = message["content"].strip() if self.trimmed else message["content"]
                said = f"(earlier) {said}" if self.past and place < users[-1] else said
                text += self.open.format(role="assistant") + said + self.close
                text += self.open.format(role="user") if self.header else ""
                answered = True
        return text + (self.open.format(role="assistant") if self.generation else "") + self.thought


GRAMMARS = st.builds(
    Grammar,
    open=OPENS,
    close=st.sampled_from(["<|im_end|>", "<|im_end|>\n", "\n", " ", "", "</s>\n"]),
    end=st.sampled_from(["", "", "<|im_end|>"]),
    system=st.sampled_from(["own", "first", "last", "lost", "refused"]),
    generation=st.booleans(),
    thought=st.sampled_from(["", "", "<think>\n", "<think>"]),
    past=st.booleans(),
    header=st.booleans(),
    trimmed=st.booleans(),
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@fuzzed(400)
@given(grammar=GRAMMARS, messages=conversations())
def test_a_random_template_is_held_to_the_contract_or_refused(tokenizer, grammar, messages):
    tokenizer.chat_template = grammar.jinja()
    assume(grammar.generation or not grammar.thought)
    try:
        chat = Chat(tokenizer)
        samples = chat.encode(messages, 100_000)
    except ValueError as error:
        one_sentence(error)
        assert "puts an answer where" in str(error), (
            "nothing in this grammar is to be refused but a border without a token"
        )
        return
    trained = 0
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    for sample in samples:
        runs = runs_of(sample.labels)
        for place, (start, end) in zip(turns[trained:], runs, strict=False):
            expected = tokenizer(grammar.prompt(messages[:place]), add_special_tokens=False)[
                "input_ids"
            ]
            assert sample.input_ids[:start] == expected
            said = tokenizer.decode(sample.input_ids[start:end], clean_up_tokenization_spaces=False)
            assert messages[place]["content"] in said
            assert sample.labels[end - 1] == tokenizer.eos_token_id
            assert said.count("<think>") <= 1 + messages[place]["content"].count("<think>")
        trained += len(runs)
    assert trained == len(turns), "every answer is trained once"


def runs_of(labels: list[int]) -> list[tuple[int, int]]:
    edges = [
        0,
        *(p for p in range(1, len(labels)) if (labels[p] == IGNORE) != (labels[p - 1] == IGNORE)),
        len(labels),
    ]
    return [(start, end) for start, end in itertools.pairwise(edges) if labels[start] != IGNORE]


PIECES = [
    "{{ ",
    " }}",
    "{% ",
    " %}",
    "{%- ",
    " -%}",
    "'",
    "\n",
    "messages",
    "m",
    "m.content",
    "for m in messages",
    "endfor",
    "if ",
    "endif",
]
PIECES += [
    "m.role",
    " | trim",
    " | tojson",
    "loop.last",
    "raise_exception('x')",
    "add_generation_prompt",
    "tools",
    "eos_token",
    "range(9)",
    "[0]",
]


@fuzzed(200)
@given(template=st.lists(st.sampled_from(PIECES), min_size=1, max_size=25).map("".join))
def test_text_that_is_hardly_a_template_is_refused_in_one_sentence(tokenizer, template):
    tokenizer.chat_template = template or " "
    try:
        Chat(tokenizer)
    except ValueError as error:
        one_sentence(error)


# Rows and files

JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 5),
        st.floats(),
        st.sampled_from(["", " ", "user", "assistant", "hi", "tool"]),
        TEXT,
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "from",
                    "value",
                    "type",
                    "text",
                    "train",
                    "tool_calls",
                    "function",
                    "name",
                    "x",
                ]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool", "human", "other"]),
            "content": st.one_of(SAID, JSON),
        },
        optional={
            "tool_calls": JSON,
            "reasoning_content": st.one_of(SAID, JSON),
            "weight": JSON,
            "name": TEXT,
            "images": JSON,
        },
    ),
    max_size=4,
)
ROWS = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"messages": st.one_of(MESSAGES, JSON)}, optional={"system": JSON, "tools": JSON}
        ),
        st.fixed_dictionaries(
            {"prompt": st.one_of(SAID, JSON), "response": st.one_of(SAID, JSON)},
            optional={"input": JSON, "history": JSON},
        ),
        JSON,
    ),
    min_size=1,
    max_size=4,
)


def read(path, share: float) -> list[dict]:
    return ordered_rows(
        "data.task", SourceSection(source=str(path), max_bad_rows=share), 0, ("prompt", "response")
    )


def spoken(value) -> set[str]:
    """Every text in a value."""
    if isinstance(value, dict):
        return {text for inner in value.values() for text in spoken(inner)}
    if isinstance(value, list):
        return {text for inner in value for text in spoken(inner)}
    return {value} if isinstance(value, str) else set()


@fuzzed(400)
@given(rows=ROWS, share=st.sampled_from([0.0, 0.9]))
def test_random_rows_are_read_or_refused_and_nothing_is_made_up(tmp_path, tokenizer, rows, share):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        found = read(path, share)
    except ValueError as error:
        one_sentence(error)
        assert str(error).startswith("data.task")
        return
    assert len(found) == len(rows) or share, "a row that is not used is refused"
    texts = "\0".join(spoken(rows)) + json.dumps(rows)
    for row in found:
        assert row["prompt"].strip() and row["response"].strip()
        assert all(
            part in texts or part in "\n\n".join(spoken(rows))
            for part in row["prompt"].split("\n\n")
        )


@fuzzed(300)
@given(
    lines=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4),
    suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".json"]),
    cut=st.tuples(st.integers(0, 200), st.integers(0, 3), st.binary(max_size=3)),
    share=st.sampled_from([0.0, 0.9]),
)
def test_damaged_files_are_read_or_refused(tmp_path, lines, suffix, cut, share):
    path = tmp_path / f"rows{suffix}"
    rows = [{"prompt": prompt, "response": response} for prompt, response in lines]
    if suffix in (".csv", ".tsv"):
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter="," if suffix == ".csv" else "\t")
        writer.writerows([("prompt", "response"), *lines])
        data = stream.getvalue().encode()
    else:
        data = (
            json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
        ).encode()
    at, gone, put = cut
    path.write_bytes(data[:at] + put + data[at + gone :])
    try:
        read(path, share)
    except ValueError as error:
        one_sentence(error)


@fuzzed(100)
@given(
    lines=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4),
    suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".json"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_whole_files_are_read_as_they_were_written(tmp_path, lines, suffix, encoding):
    path = tmp_path / f"rows{suffix}"
    assume(all("\r" not in text for line in lines for text in line))
    if suffix in (".csv", ".tsv"):
        stream = io.StringIO()
        csv.writer(stream, delimiter="," if suffix == ".csv" else "\t").writerows(
            [("prompt", "response"), *lines]
        )
        text = stream.getvalue()
    else:
        rows = [{"prompt": prompt, "response": response} for prompt, response in lines]
        text = (
            json.dumps(rows, ensure_ascii=False)
            if suffix == ".json"
            else "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        )
    path.write_bytes(text.encode(encoding))
    assert sorted((row["prompt"], row["response"]) for row in read(path, 0.0)) == sorted(lines)


# Recipes


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, make_project(folder)


def leaves(value, path=()) -> list[tuple]:
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    return [path]


@fuzzed(200)
@given(data=st.data())
def test_a_recipe_with_any_value_changed_is_read_or_refused(project, data):
    folder, content = project
    changed = json.loads(json.dumps(content))
    path = data.draw(st.sampled_from(leaves(changed)))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    how = data.draw(st.sampled_from(["set", "drop", "misname"]))
    value = inner.pop(path[-1])
    if how == "set":
        inner[path[-1]] = data.draw(JSON)
    elif how == "misname":
        inner[f"{path[-1]}{data.draw(st.sampled_from(string.ascii_lowercase))}"] = value
    file = folder / "fuzzed.yaml"
    file.write_text(yaml.safe_dump(changed))
    try:
        check_sources(recipes.load(file).base)
    except ValueError as error:
        one_sentence(error)
