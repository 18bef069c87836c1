"""What is the same prompt in two sets, what goes into which split, and that nothing is left out without a word."""

import json
import random

import pytest

from pipeline.data.check import check_sources
from pipeline.data.overlap import Claims, conversation, read_held
from pipeline.data.splits import split
from pipeline.defences import recipes
from pipeline.recipe import strict_yaml
from tests.project import write_jsonl, write_recipe
from tests.unit.data.test_conversations import chat, conversations, one_sentence
from tests.unit.data.test_prepare import evaluated, prepared

SPLITS = ("task_test", "task_validation", "task_train")
SIZES = {"task_test": 8, "task_validation": 8}
PLAIN = ("--align.enabled=false", "--data.harmful_fraction=0")
OPERATORS = ("+", "-", "*", "/", "<", ">", "^", "%")


def asked(*turns: str) -> dict:
    """A conversation that ends with its answer."""
    return {"messages": chat(*turns)}


def orders(last, count: int = 40) -> list[dict]:
    """Conversations of two questions, whose last `last` gives by number."""
    return [
        asked(f"My order {i} is late", f"Let me check {i}", last(i), "You're welcome.")
        for i in range(count)
    ]


def with_task(
    project, tmp_path, rows: list[dict], *overrides: str, seed: int = 0, columns: str = "{}"
):
    """The prepared sets, facts, and what dropped.jsonl lists."""
    write_jsonl(tmp_path / "task.jsonl", rows)
    source = (
        f"--data.task.source={tmp_path / 'task.jsonl'}",
        f"--data.task.columns={columns}",
        f"--data.seed={seed}",
    )
    sets, facts = prepared(project, tmp_path / "out", *source, *PLAIN, *overrides)
    return sets, facts, listed(tmp_path / "out")


def listed(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]


def number(entry: dict) -> int:
    """The line that an entry names."""
    return int(entry["place"].removeprefix("line "))


def by_conversation(rows: list[dict]) -> set[bytes]:
    return {conversation(row) for row in rows}


def answered(*prompts: str) -> list[dict]:
    """Rows of single prompts, each with an answer of its own."""
    return [
        {"prompt": prompt, "response": f"answer {number}"} for number, prompt in enumerate(prompts)
    ]


NOTHING_IS_LOST = {
    "arithmetic": answered(*[f"What is {a} {sign} 2?" for a in range(10) for sign in OPERATORS]),
    "negative numbers": answered(*[f"Is {i} cold" for i in range(-30, 30)]),
    "decimal numbers": answered(*[f"Is {i}{point}5 cold" for i in range(20) for point in ("", ".", ",", "/")]),
    "languages with signs": answered(*[f"{i} in C{sign}" for i in range(8) for sign in ("", "++", "#", "--", "_")]),
    "emoji": answered(*[chr(0x1F600 + i) for i in range(60)]),
    "han": answered(*[f"{chr(0x4E00 + i)}?" for i in range(60)]),
    "vowel signs": answered(*[f"{letter}{sign}" for letter in "कखगघचछज" for sign in "ािीुूेो"]),
    "arabic diacritics": answered(*[f"{letter}{chr(0x64B + i)}" for letter in "بتثجحخد" for i in range(8)]),
    "names": answered(*[f"What is x{sign}{i}" for i in range(9) for sign in ("_", "", "-", ".")]),
    "end alike": orders(lambda i: "Thanks!"),
    "end alike as one does alone": [*orders(lambda i: "Thanks!"), {"messages": chat("Thanks!", "Welcome!")}],
    "half end alike": orders(lambda i: "Thanks!" if i % 2 else f"and item {i}?"),
    "small talk": orders(lambda i: ("ok", "perfect", "Thanks!", "yes", f"and item {i}?")[i % 5]),
    "begin alike": [asked("Hi", "Hello, how can I help?", f"My order {i} is late", "Let me check") for i in range(40)],
    "one is a beginning": [asked("Hi", "Hello"), *[asked("Hi", "Hello", f"order {i}", "ok") for i in range(40)]],
    "every turn a row": [row for i in range(20) for row in (asked(f"a {i}", "x"), asked(f"a {i}", "x", "b", "y"))],
    "other answers on the way": [asked("Guess", f"Is it {i}?", "No", "Tell me") for i in range(40)],
    "many answers": answered(*[f"Write haiku {i % 13}" for i in range(39)]),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", NOTHING_IS_LOST)
def test_no_row_is_lost_and_no_conversation_is_in_two_splits(project, tmp_path, kind, seed):
    rows = NOTHING_IS_LOST[kind]
    columns = "{}" if "messages" in rows[0] else "{prompt: prompt, response: response}"
    sets, facts, dropped = with_task(project, tmp_path, rows, seed=seed, columns=columns)
    assert sum(len(sets[name]) for name in SPLITS) == len(rows)
    assert not dropped and not facts["overlapping"] and not facts["duplicate"]
    found = [by_conversation(sets[name]) for name in SPLITS]
    assert len(set.union(*found)) == sum(map(len, found))
    if kind != "many answers":
        assert {name: len(sets[name]) for name in SIZES} == SIZES


def test_seeds_draw_other_rows_of_conversations_that_end_alike(project, tmp_path):
    rows = NOTHING_IS_LOST["half end alike"]
    drawn = []
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        sets, _, _ = with_task(project, tmp_path / str(seed), rows, seed=seed)
        drawn.append(sets["task_test"])
    assert len({frozenset(by_conversation(rows)) for rows in drawn}) == 3
    ends = [{row["prompt"] == "Thanks!" for row in rows} for rows in drawn]
    assert {True, False} in ends, "those that end alike do not come in one block"


def test_what_is_left_out_is_the_same_for_every_seed_and_said_and_listed(project, tmp_path, capsys):
    rows = [
        *conversations(30),
        *conversations(3),
        {"messages": chat("VALIDATION forbidden request number 3!", "a")},
    ]
    rows.append({"messages": chat("first", "b", "Validation forbidden request number 4", "c")})
    rows.append({"messages": chat("much " * 200, "too long")})
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        capsys.readouterr()
        sets, facts, dropped = with_task(project, tmp_path / str(seed), rows, seed=seed)
        said = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("data.task")
        ]
        assert [len(sets[name]) for name in SPLITS] == [8, 8, 14]
        assert facts["overlapping"] == {"data.task / data.validation_prompts": 2} and facts[
            "duplicate"
        ] == {"data.task": 3}
        assert facts["encoding"]["data.task"]["dropped"] == 1
        found = sorted(
            (
                entry["reason"],
                number(entry) % 30 if entry["reason"] == "duplicate" else number(entry),
            )
            for entry in dropped
        )
        assert found == [
            ("duplicate", 1),
            ("duplicate", 2),
            ("duplicate", 3),
            ("overlapping", 34),
            ("overlapping", 35),
            ("too_long", 36),
        ]
        assert {entry["field"] for entry in dropped} == {"data.task"}
        assert "forbidden" not in (tmp_path / str(seed) / "out" / "dropped.jsonl").read_text(), (
            "data may be private"
        )
        assert sorted(line.split(" (")[0] for line in said) == [
            "data.task: 1 row left out, for nothing of the response is left within data.max_length",
            "data.task: 2 rows left out, for data.validation_prompts has the prompt already",
            "data.task: 3 rows left out, for another says the same",
        ]
        assert any(line.endswith("(lines 34, 35)") for line in said)
        assert any("(line 36; they need " in line for line in said)


def test_answers_to_one_prompt_stay_together_and_the_console_says_where_that_makes_other_sizes(
    project, tmp_path, capsys
):
    rows = [{"prompt": f"Write haiku {i % 5}", "response": f"haiku {i}"} for i in range(50)]
    columns = "{prompt: prompt, response: response}"
    sets, _, _ = with_task(project, tmp_path, rows, "--data.test_samples=25", columns=columns)
    assert [len(sets[name]) for name in SPLITS] == [20, 10, 20]
    said = capsys.readouterr().err
    assert (
        "data.test_samples: 20 instead of 25, for rows of one conversation stay together, and one"
        in said
    )
    assert "data.validation_samples: 10 instead of 8" in said


@pytest.mark.parametrize(
    "rows, sentence",
    [
        (
            [{"prompt": "Write a haiku", "response": f"haiku {i}"} for i in range(40)],
            "has 1 different prompt, and all answers to one prompt stay in one split",
        ),
        (
            [{"prompt": ("a", "A!", "b")[i % 3], "response": f"{i}"} for i in range(40)],
            "has 2 different prompts",
        ),
        (
            [asked(*["more", "x"] * n) for n in range(1, 30)],
            "has 1 conversations that are not the beginning of a longer",
        ),
    ],
)
def test_too_few_prompts_for_three_splits_are_refused_before_and_while_preparing(
    project, tmp_path, rows, sentence
):
    folder, content = project
    columns = {} if "messages" in rows[0] else {"prompt": "prompt", "response": "response"}
    write_jsonl(tmp_path / "task.jsonl", rows)
    given = f"--data.task.columns={json.dumps(columns)}"
    small = ("--data.test_samples=1", "--data.validation_samples=1")
    one_sentence(
        lambda: prepared(
            project,
            tmp_path / "out",
            f"--data.task.source={tmp_path / 'task.jsonl'}",
            given,
            *small,
        ),
        f"data.task: .*{sentence}.*data.test_samples.*use data of more prompts",
    )
    arguments = [f"--data.task.source={tmp_path / 'task.jsonl'}", given, *small]
    base = recipes.load(write_recipe(folder, content), strict_yaml.parse_overrides(arguments)).base
    one_sentence(lambda: check_sources(base), f"data.task: .*{sentence}")


def test_the_check_compares_no_more_rows_than_it_needs_but_all_before_it_refuses(
    project, monkeypatch
):
    folder, content = project
    compared: list[int] = []
    free = Claims.free
    monkeypatch.setattr(
        Claims,
        "free",
        lambda self, pool, rows: compared.append(len(rows)) or free(self, pool, rows),
    )

    def check(rows: list[dict], *overrides: str) -> None:
        write_jsonl(folder / "many.jsonl", rows)
        arguments = [f"--data.task.source={folder / 'many.jsonl'}", *overrides]
        check_sources(
            recipes.load(write_recipe(folder, content), strict_yaml.parse_overrides(arguments)).base
        )

    check([{"question": f"q {i}", "answer": "a"} for i in range(400)])
    assert compared == [4 * 17]
    rare = [{"question": ("same", f"q {i}")[i % 40 == 0], "answer": f"{i}"} for i in range(400)]
    check(rare, "--data.test_samples=1", "--data.validation_samples=1")
    assert compared[1:] == [12, 400]
    with pytest.raises(ValueError, match="has 1 different prompt, "):
        check([{"question": "same", "answer": f"{i}"} for i in range(400)])
    assert compared[-2:] == [68, 400]


def test_a_task_of_which_an_earlier_set_holds_everything_is_refused_after_it_was_said(
    project, tmp_path, capsys
):
    rows = [asked(f"validation forbidden request number {i % 8}", f"answer {i}") for i in range(40)]
    one_sentence(
        lambda: with_task(project, tmp_path, rows),
        "data.task: every prompt of .* is held by an earlier set",
    )
    assert (
        "data.task: 40 rows left out, for data.validation_prompts has the prompt already"
        in capsys.readouterr().err
    )


def test_one_question_under_two_system_prompts_is_one_prompt_and_two_rows(project, tmp_path):
    rows = [
        {"system": system, "prompt": f"q {i}", "response": "a"}
        for i in range(20)
        for system in ("Be brief.", "Rhyme!")
    ]
    columns = "{system: system, prompt: prompt, response: response}"
    sets, facts, dropped = with_task(project, tmp_path, [*rows, *rows[:4]], columns=columns)
    assert [len(sets[name]) for name in SPLITS] == [8, 8, 24] and len(dropped) == facts[
        "duplicate"
    ]["data.task"] == 4
    assert all(len(by_conversation(sets[name])) * 2 == len(sets[name]) for name in SPLITS)


def drawn(*sizes: int, beginnings: int = 0) -> list[dict]:
    """Rows of conversations with so many answers each, and some that longer ones begin with."""
    rows = [
        {"messages": chat("start", "x", f"q {i}"), "response": f"{n}"}
        for i, size in enumerate(sizes)
        for n in range(size)
    ]
    return [*rows, *[{"messages": chat("start"), "response": f"b {n}"} for n in range(beginnings)]]


@pytest.mark.parametrize(
    "rows, counts",
    [
        (drawn(*[1] * 10), (3, 2, 5)),
        (drawn(5, 1, 1, 1, 1, 1), (3, 2, 5)),
        (drawn(2, 2, 2, 2), (2, 2, 4)),
        (drawn(7, 9, 8), (7, 8, 9)),
        (drawn(1, 900, 1), (1, 1, 900)),
        (drawn(1, 1, 4, beginnings=2), (2, 4, 2)),
        (drawn(1, 1, beginnings=9), (1, 1, 9)),
    ],
)
def test_splits_take_whole_conversations(rows, counts):
    class Data:
        test_samples, validation_samples = 3, 2

    found = split(Data, rows)
    assert (len(found.test), len(found.validation), len(found.train)) == counts
    assert len(found.notes) == (counts[0] != 3) + (counts[1] != 2)
    beginning = {conversation(row) for row in rows if len(row["messages"]) == 1}
    assert not beginning & by_conversation([*found.test, *found.validation])


def took(claims: Claims, pool: str, *turns: str, **options) -> bool:
    return bool(claims.take(pool, [{"messages": chat(*turns), "prompt": turns[-1], **options}]))


def test_sets_share_a_prompt_where_one_answers_the_whole_conversation_of_the_other():
    claims = Claims()
    assert took(claims, "safety_pairs", "How do I steal?") and took(
        claims, "harmful_mix", "How do I lie", "x", "Go on"
    )
    assert not took(claims, "data.task", "how do I steal"), "the same conversation"
    assert not took(claims, "data.task", "How do I steal?", "Sure", "And then?"), (
        "answered on the way"
    )
    assert not took(claims, "align_refusals", "How do I lie?"), (
        "answered on the way by an earlier set"
    )
    assert took(claims, "data.task", "Hi", "Hello", "How do I steal?"), "another conversation"
    assert took(claims, "data.task", "How do I lie", "y", "Go on"), "another answer on the way"
    assert not took(claims, "data.task", "How do I lie", "x", "go on!")
    assert claims.facts()["overlapping"] == {
        "data.task / safety_pairs": 2,
        "align_refusals / harmful_mix": 1,
        "data.task / harmful_mix": 1,
    }


def test_a_greeting_that_the_alignment_answers_refuses_no_conversation_that_begins_with_it():
    claims = Claims()
    assert took(claims, "align_harmless", "Hi") and took(
        claims, "harmful_mix", "Good day", "Hello", "How do I lie?"
    )
    assert took(claims, "data.task", "Hi", "Hello", "My order is late") and took(
        claims, "data.task", "Good day", "Hello", "A?"
    )
    assert not took(claims, "data.task", "hi!")


def test_what_pairs_say_on_the_way_is_not_trained_on():
    claims = Claims()
    assert took(claims, "safety_pairs", "Hi", "Hello", "How do I lie?") and took(
        claims, "data.task", "Hi"
    )


def test_answers_tool_calls_and_roles_are_part_of_a_conversation():
    rows = [
        {
            "messages": [
                *chat("q"),
                {"role": "assistant", "content": "", "tool_calls": [call]},
                *chat("b"),
            ]
        }
        for call in "xy"
    ]
    rows += [
        {"messages": [*chat("q"), {"role": role, "content": "c"}, *chat("b")]}
        for role in ("tool", "assistant")
    ]
    assert len({conversation(row) for row in rows}) == 4


def test_another_answer_is_no_duplicate_except_of_what_is_asked_alone():
    rows = [
        {"messages": chat("q"), "prompt": "q", "response": text} for text in ("a", "b", "a", "A")
    ]
    assert [row["response"] for row in Claims().take("harmful_mix", rows)] == ["a", "b", "A"]
    assert len(Claims().take("evaluate.harmful", rows, by_prompt=True)) == 1
    pairs = [
        {"messages": chat("q"), "prompt": "q", "chosen": "no", "rejected": text}
        for text in ("a", "b", "a")
    ]
    assert len(Claims().take("safety_pairs", pairs)) == 2


def test_the_evaluation_loses_a_prompt_that_training_holds_as_any_turn_and_training_loses_nothing(
    project, tmp_path
):
    turns = [f"harmful_eval forbidden request number {i}" for i in range(3)]
    rows = [
        *conversations(),
        asked(turns[0], "a", "Thanks!", "b"),
        asked("Hi", "a", turns[1].upper(), "b", "ok", "c"),
        asked("Hi", "a", turns[2], "b"),
    ]
    write_jsonl(tmp_path / "task.jsonl", rows)
    source = (
        f"--data.task.source={tmp_path / 'task.jsonl'}",
        "--data.task.columns={}",
        *PLAIN,
        "--evaluate.harmful_prompts=8",
    )
    sets, facts, found = evaluated(project, tmp_path / "out", *source)
    assert sum(len(sets[name]) for name in SPLITS) == len(rows) and not facts["overlapping"]
    assert {row["prompt"][-1] for row in sets["eval_harmful"]} == set("34567") and sum(
        found["overlapping"].values()
    ) == 3
    entries = [
        entry
        for entry in listed(tmp_path / "out" / "prompts")
        if entry["field"] == "evaluate.harmful"
    ]
    assert sorted(number(entry) for entry in entries) == [1, 2, 3] and {
        entry["reason"] for entry in entries
    } == {"overlapping"}


def test_unusable_pairs_are_said_and_listed_by_reason_whatever_is_drawn(project, tmp_path, capsys):
    parted = [
        {
            "chosen": chat(f"x {i}", "a", "b", "No."),
            "rejected": chat(f"x {i}", "other", "b", "Yes."),
        }
        for i in range(3)
    ]
    rows = [
        {"chosen": chat(f"do {i}", "No."), "rejected": chat(f"do {i}", "Yes.")} for i in range(9)
    ]
    write_jsonl(tmp_path / "pairs.jsonl", random.Random(0).sample([*parted, *rows], 12))
    source = (
        f"--data.safety.source={tmp_path / 'pairs.jsonl'}",
        "--data.safety.columns={}",
        "--data.safety_pairs=2",
    )
    for seed in range(3):
        _, facts = prepared(project, tmp_path / str(seed), *source, *PLAIN, f"--data.seed={seed}")
        assert facts["encoding"]["data.safety"]["dropped"] == 3
        assert [entry["reason"] for entry in listed(tmp_path / str(seed))] == [
            "no_common_prompt"
        ] * 3
    assert (
        capsys.readouterr().err.count(
            "data.safety: 3 rows left out, for chosen and rejected answer different"
        )
        == 3
    )


def test_the_harmful_fraction_is_exact_where_whole_conversations_leave_more_to_train_on(
    project, tmp_path
):
    rows = [{"prompt": f"Write haiku {i % 10}", "response": f"haiku {i}"} for i in range(90)]
    write_jsonl(tmp_path / "task.jsonl", rows)
    source = (
        f"--data.task.source={tmp_path / 'task.jsonl'}",
        "--data.task.columns={prompt: prompt, response: response}",
    )
    sets, facts = prepared(
        project, tmp_path / "out", *source, "--data.test_samples=17", "--data.validation_samples=17"
    )
    assert (len(sets["task_test"]), len(sets["task_validation"])) == (9, 9)
    assert facts["harmful_in_training"] == 8 == len(sets["task_train"]) - 72, "a tenth"
    assert set(read_held(tmp_path / "out" / "held.parquet").values()) >= {
        "task_test",
        "task_validation",
        "task_train",
        "harmful_mix",
    }


def test_rows_that_differ_in_tools_or_reasoning_are_no_duplicates():
    answer = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    rows = [
        {"messages": chat("q"), "prompt": "q", "response": "a", **more}
        for more in (
            {},
            {"tools": [{"name": "f"}]},
            {"answer": answer},
            {"answer": answer | {"reasoning_content": "s"}},
            {},
        )
    ]
    claims = Claims()
    assert len(claims.take("data.task", rows)) == 4 and claims.facts()["duplicate"] == {
        "data.task": 1
    }
