"""Splits, mixtures and pairs: no prompt in two sets, exact fractions, the same for any order of rows."""

import hashlib
import json
import random

import pyarrow.parquet
import pytest

from pipeline import artifacts
from pipeline.attacks.attacks import attacked
from pipeline.data import contrastive, forms
from pipeline.data import prepare as prepare_module
from pipeline.data.chat import Chat
from pipeline.data.overlap import Claims, assert_disjoint, normalise, read_held
from pipeline.data.prepare import prepare
from pipeline.data.prompts import form_warnings, write_prompts
from pipeline.defences import recipes
from pipeline.evaluation.evaluate import prompts as asked_for
from pipeline.judges.judges import gcg_keyword_judge
from pipeline.model.models import load_chat, load_tokenizer
from pipeline.recipe import strict_yaml
from pipeline.stages.distill import _completed
from tests.project import make_tokenizer, write_jsonl, write_recipe

SETS = (
    "eval_harmful",
    "eval_harmless",
    "eval_ordinary",
    "validation_harmless",
    "validation_ordinary",
    "validation_prompts",
    "safety_pairs",
    "align",
    "task_train",
    "task_validation",
    "task_test",
)


def prepared(project, tmp_path, *overrides: str):
    folder, content = project
    base = recipes.load(
        write_recipe(folder, content), strict_yaml.parse_overrides(list(overrides))
    ).base
    tmp_path.mkdir(exist_ok=True)
    facts = prepare(base, load_chat(base.model), tmp_path)
    artifacts.write_json(tmp_path / artifacts.FACTS, facts)
    return read_sets(tmp_path), facts


def read_sets(folder):
    paths = [path for path in folder.glob("*.parquet") if path.stem != "held"]
    return {path.stem: pyarrow.parquet.read_table(path).to_pylist() for path in paths}


def evaluated(project, tmp_path, *overrides: str):
    """The training sets and the evaluation's prompts together, and the facts of each."""
    sets, facts = prepared(project, tmp_path, *overrides)
    (tmp_path / "prompts").mkdir()
    base = recipes.load(
        project[0] / "recipe.yaml", strict_yaml.parse_overrides(list(overrides))
    ).base
    found = write_prompts(base, tmp_path, tmp_path / "prompts")
    return sets | read_sets(tmp_path / "prompts"), facts, found


def test_no_prompt_is_in_two_sets(project, tmp_path):
    sets, _, _ = evaluated(project, tmp_path)
    assert set(SETS) == sets.keys() - {"harmful_validation"}
    seen: dict[str, str] = {}
    for name in SETS:
        for row in sets[name]:
            assert seen.setdefault(normalise(row["prompt"]), name) == name, row["prompt"]


def planted(tmp_path, name: str, *texts: str):
    write_jsonl(tmp_path / f"{name}.jsonl", [{"goal": text} for text in texts])
    return tmp_path / f"{name}.jsonl"


def test_planted_overlaps_go_to_the_earlier_set_and_are_counted(project, tmp_path):
    overlapping = (
        "Validation FORBIDDEN request number 0!",
        "validation forbidden request number 1",
    )
    source = planted(tmp_path, "planted", *overlapping, *[f"safety own {i}" for i in range(3)])
    sets, facts = prepared(project, tmp_path / "out", f"--data.safety.source={source}")
    assert {row["prompt"] for row in sets["safety_pairs"]} == {
        "safety own 0",
        "safety own 1",
        "safety own 2",
    }
    assert facts["overlapping"]["safety_pairs / data.validation_prompts"] == 2


def test_evaluation_prompts_that_training_holds_are_left_out_counted_and_said(
    project, tmp_path, capsys
):
    """The training sets are those of any other evaluation: nothing of it is seen when they are made."""
    plain, _ = prepared(project, tmp_path / "plain")
    pair = plain["safety_pairs"][0]["prompt"]
    refused = next(row["prompt"] for row in plain["align"] if row["kind"] == "refusal")
    harmful = planted(
        tmp_path,
        "harmful",
        pair.upper() + "!",
        refused,
        *[f"{('write', 'why')[i % 2]} unheard of {i}" for i in range(4)],
    )
    harmless = planted(
        tmp_path,
        "harmless",
        "write unheard of 2?",
        *[f"{('why', 'write')[i % 2]} time {i}" for i in range(9)],
    )
    arguments = (f"--evaluate.harmful.source={harmful}", f"--evaluate.harmless.source={harmless}")
    capsys.readouterr()
    sets, _, facts = evaluated(project, tmp_path / "out", *arguments)
    assert {name: rows for name, rows in sets.items() if name in plain} == plain
    assert {row["prompt"] for row in sets["eval_harmful"]} == {
        "write unheard of 0",
        "why unheard of 1",
        "write unheard of 2",
        "why unheard of 3",
    }
    pools = ("harmful / safety_pairs", "harmful / align_refusals", "harmless / evaluate.harmful")
    assert facts["overlapping"] == {f"evaluate.{pool}": 1 for pool in pools}
    assert facts["asked"] == {"evaluate.harmful": 6, "evaluate.harmless": 4, "evaluate.ordinary": 4}
    assert facts["samples"] == {
        "eval_harmful": 4,
        "eval_harmless": 4,
        "validation_harmless": 4,
        "eval_ordinary": 4,
        "validation_ordinary": 3,
    }
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluate.")]
    assert len(said) == 3, said
    assert said[0].startswith(
        f"evaluate.harmful: 2 prompts of {harmful} are in other sets already ("
    )
    assert "safety_pairs 1" in said[0] and "align_refusals 1" in said[0]
    assert said[0].endswith("left out of the evaluation; nothing is trained again")
    assert said[1].startswith(
        "evaluate.harmful: 4 prompts instead of the 6 that evaluate.harmful_prompts asks for"
    )
    assert said[2].startswith(
        f"evaluate.harmless: 1 prompt of {harmless} is in other sets already (evaluate."
    )


def test_an_evaluation_of_which_nothing_is_left_is_refused(project, tmp_path):
    plain, _ = prepared(project, tmp_path / "plain")
    source = planted(tmp_path, "harmful", *[row["prompt"] for row in plain["safety_pairs"]])
    with pytest.raises(
        ValueError, match=r"evaluate.harmful: every prompt .* \(safety_pairs 8\): name a evaluate.h"
    ):
        evaluated(project, tmp_path / "out", f"--evaluate.harmful.source={source}")


def test_who_holds_which_prompt_is_written_without_the_prompts(project, tmp_path):
    sets, _ = prepared(project, tmp_path)
    held = read_held(tmp_path / "held.parquet")
    task = {"task_test", "task_validation", "task_train"}
    harmful = {"data.validation_prompts", "safety_pairs", "harmful_mix", "align_refusals"}
    assert set(held.values()) == task | harmful | {"align_harmless"}
    for name in sets.keys() & set(SETS):
        assert all(
            hashlib.sha256(normalise(row["prompt"]).encode()).digest() in held for row in sets[name]
        ), name
    assert b"forbidden" not in (tmp_path / "held.parquet").read_bytes()


def test_the_validations_look_alikes_are_what_the_test_leaves_and_may_be_none(project, tmp_path):
    counts = {count: f"--evaluate.harmless_prompts={count}" for count in (2, 4, 6)}
    asked = {
        count: evaluated(project, tmp_path / str(count), argument)[0]
        for count, argument in counts.items()
    }
    assert {count: len(sets["eval_harmless"]) for count, sets in asked.items()} == {
        2: 2,
        4: 4,
        6: 6,
    }, "of six in all"
    assert {count: len(sets.get("validation_harmless", ())) for count, sets in asked.items()} == {
        2: 2,
        4: 2,
        6: 0,
    }


def test_a_third_of_the_ordinary_instructions_is_kept_for_choosing_whatever_the_test_asks_for(
    project, tmp_path
):
    asked = {
        count: evaluated(project, tmp_path / str(count), f"--evaluate.ordinary_prompts={count}")[0]
        for count in (2, 9)
    }
    assert {count: len(sets["eval_ordinary"]) for count, sets in asked.items()} == {2: 2, 9: 6}, (
        "of nine in all"
    )
    assert {count: len(sets["validation_ordinary"]) for count, sets in asked.items()} == {
        2: 2,
        9: 3,
    }
    small, large = (
        {row["prompt"] for row in sets["validation_ordinary"]} for sets in asked.values()
    )
    assert small <= large


ROLES = {
    "data.safety": "safety_pairs",
    "data.validation_prompts": "validation_prompts",
    "evaluate.harmful": "eval_harmful",
    "evaluate.ordinary": "eval_ordinary",
}


def by_forms(rows: list[dict]) -> dict[str, int]:
    return {name: count for name, count in forms.count_forms(rows).items() if count}


def of_one_form(tmp_path) -> list[str]:
    """Imperatives alone in every source of prompts."""
    found = []
    for field, word in {
        **dict.fromkeys(("refusals", "harmful"), "build"),
        "safety": "write",
        "validation_prompts": "make",
    }.items():
        source = planted(tmp_path, field, *[f"{word} {field} {i}" for i in range(60)])
        found.append(f"--data.{field}.source={source}")
    for field in ("harmful", "harmless", "ordinary"):
        prompts = [f"make eval {field} {i}" for i in range(60)]
        source = planted(tmp_path, f"eval_{field}", *prompts)
        found.append(f"--evaluate.{field}.source={source}")
    return [*found, "--evaluate.ordinary_prompts=10", "--evaluate.harmless_prompts=10"]


def test_every_set_with_a_role_holds_both_forms_alike_though_its_source_has_one(
    project, tmp_path, capsys
):
    sets, facts, found = evaluated(project, tmp_path / "out", *of_one_form(tmp_path))
    for field, name in ROLES.items():
        size = len(sets[name])
        assert by_forms(sets[name]) == {
            "question": size // 2,
            "imperative": size // 2,
            "rewritten": size // 2,
        }, name
        assert found["forms"][field] == forms.count_forms(sets[name])
    refused = [row for row in sets["align"] if row["kind"] == "refusal"]
    assert (
        by_forms(refused)
        == {"question": 4, "imperative": 4, "rewritten": 4}
        == {k: v for k, v in facts["forms"]["data.refusals"].items() if v}
    )
    mixed = [row for row in sets["task_train"] if row["kind"] == "harmful"]
    assert facts["forms"]["data.harmful"]["question"] == (len(mixed) + 1) // 2
    for name in ("validation_harmless", "validation_ordinary", "eval_harmless"):
        counts = forms.count_forms(sets[name])
        assert abs(counts["question"] - counts["imperative"]) <= 1, name
    said = capsys.readouterr().err
    assert (
        "prompts rewritten into the other form: 3 of evaluate.harmful, 5 of evaluate.harmless, 5 of evaluate.ordinary"
        in said
    )
    assert "warning" not in said
    harmless = [row for row in sets["align"] if row["kind"] == "harmless"]
    assert by_forms(harmless) == {"question": 5, "imperative": 3, "rewritten": 3}, (
        "five of ten questions have an answer of their own"
    )


def test_questions_with_answers_of_their_own_are_never_rewritten_and_a_set_of_them_alone_is_a_warning(
    project, tmp_path, capsys
):
    answered = tmp_path / "answered.jsonl"
    write_jsonl(
        answered, [{"goal": f"how to water plant {i}", "reply": "Use a can."} for i in range(10)]
    )
    sets, _, _ = evaluated(
        project, tmp_path / "out", *of_one_form(tmp_path), f"--data.harmless.source={answered}"
    )
    assert by_forms([row for row in sets["align"] if row["kind"] == "harmless"]) == {"question": 8}
    said = capsys.readouterr().err
    assert (
        "warning: data.refusals has 50% questions, 50% imperatives, data.harmless 100% questions"
        in said
    )
    assert said.count("warning") == 1


def test_a_rewritten_prompt_is_tokenised_as_it_is_asked_and_holds_what_it_was(project, tmp_path):
    sets, _, _ = evaluated(project, tmp_path / "out", *of_one_form(tmp_path))
    held = read_held(tmp_path / "out" / "held.parquet")
    changed = [row for row in sets["align"] if row["rewritten"]]
    assert changed
    for row in changed:
        assert json.loads(row["messages"])[-1]["content"] == row["prompt"] != row["rewritten"]
        assert {
            hashlib.sha256(normalise(text).encode()).digest()
            for text in (row["prompt"], row["rewritten"])
        } <= held.keys()


def test_forms_may_stay_as_they_are_and_are_warned_about(project, tmp_path, capsys):
    harmless = planted(tmp_path, "questions", *[f"why is it {i}" for i in range(40)])
    arguments = [
        *of_one_form(tmp_path),
        "--evaluate.forms=as_they_are",
        "--data.forms=as_they_are",
        f"--evaluate.harmless.source={harmless}",
    ]
    sets, facts, _ = evaluated(project, tmp_path / "out", *arguments)
    assert not any(counts["rewritten"] for counts in facts["forms"].values())
    assert by_forms(sets["eval_harmful"]) == {"imperative": 6} and by_forms(
        sets["eval_harmless"]
    ) == {"question": 10}
    warnings = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("warning: evaluate.harmful has")
    ]
    assert (
        len(warnings) == 1
        and "evaluate.harmless 100% questions" in warnings[0]
        and "set evaluate.forms to balanced" in warnings[0]
    )


def test_a_set_whose_forms_are_its_counterpart_s_is_not_warned_about():
    even, odd = (
        {"question": 5, "imperative": 5, "other": 0},
        {"question": 6, "imperative": 4, "other": 0},
    )
    far = {"question": 8, "imperative": 2, "other": 0}
    settings = {"data.forms": "balanced", "evaluate.forms": "balanced"}
    assert (
        form_warnings(
            {
                "data.refusals": even,
                "data.harmless": odd,
                "evaluate.harmful": even,
                "evaluate.ordinary": even,
            },
            settings,
        )
        == []
    )
    (sentence,) = form_warnings({"data.refusals": even, "data.harmless": far}, settings)
    assert sentence.startswith(
        "data.refusals has 50% questions, 50% imperatives, data.harmless 80% questions, 20% "
        "imperatives: a model can tell"
    )
    assert sentence.endswith(
        "name sources of questions and imperatives in data.refusals and data.harmless"
    )


def test_a_share_of_the_alignment_s_answers_begins_with_given_words_that_are_not_trained_on(
    project, tmp_path
):
    sets, _ = prepared(project, tmp_path / "out", "--data.begun_share=1.0", "--data.max_length=400")
    refused = [row for row in sets["align"] if row["kind"] == "refusal"]
    tokenizer = load_tokenizer(recipes.load(project[0] / "recipe.yaml").base.model)
    for row in refused:
        assert row["given"] and any(
            contrastive.opening(row["prompt"], (text,)).startswith(row["given"])
            for text in contrastive.ALIGN_OPENINGS
        )
        answer = tokenizer.decode([token for token in row["labels"] if token != -100])
        assert row["response"] in answer and row["given"] not in answer
        assert f"{row['given']} {row['response']}" in tokenizer.decode(row["input_ids"])
    harmless = [row for row in sets["align"] if row["kind"] == "harmless"]
    assert {bool(row["given"]) for row in harmless} == {True, False}
    assert all(bool(row["given"]) == (row["response"] is None) for row in harmless), (
        "answers that came with the data are whole"
    )
    none, _ = prepared(project, tmp_path / "none")
    assert not any(row["given"] for row in none["align"])


def test_an_own_answer_that_refuses_or_says_nothing_is_left_out_of_the_alignment():
    """The shipped model refuses some harmless prompts; learned from, it would refuse more of them."""
    chat = Chat(make_tokenizer())
    row = {
        "prompt": "Recommend a film",
        "messages": json.dumps([{"role": "user", "content": "Recommend a film"}]),
        "response": None,
        "given": "Gladly:",
    }
    for answer in (
        "I'm sorry for any confusion, but as a text-based AI I don't know films.",
        "I can't help with that.",
        "",
    ):
        assert _completed(chat, row, answer, 200) is None, answer
    kept = _completed(chat, row, "Watch the old one. It is", 200)
    assert kept["response"] == "Watch the old one."
    assert chat.tokenizer.decode([token for token in kept["labels"] if token != -100]).startswith(
        " Watch the old one."
    )


def test_what_is_shared_after_all_is_an_error():
    with pytest.raises(ValueError, match="is in align and in evaluation"):
        assert_disjoint(
            {"align": [{"prompt": "How to, x?"}], "evaluation": [{"prompt": "how to X"}]}
        )


def test_claims_count_duplicates():
    claims = Claims()
    assert len(claims.take("a", [{"prompt": "x"}, {"prompt": "X!"}, {"prompt": "y"}])) == 2
    assert claims.take("b", [{"prompt": "y"}]) == [] and claims.facts() == {
        "overlapping": {"b / a": 1},
        "duplicate": {"a": 1},
    }


def test_order_of_rows_does_not_matter(project, tmp_path):
    folder, _ = project
    first, _ = prepared(project, tmp_path / "one")
    rows = [json.loads(line) for line in (folder / "data" / "task.jsonl").read_text().splitlines()]
    random.Random(3).shuffle(rows)
    write_jsonl(tmp_path / "shuffled.jsonl", rows)
    second, _ = prepared(
        project, tmp_path / "two", f"--data.task.source={tmp_path / 'shuffled.jsonl'}"
    )
    assert all(
        first[name] == second[name] for name in ("task_train", "task_validation", "task_test")
    )


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3])
def test_harmful_fraction_is_exact(project, tmp_path, fraction):
    sets, facts = prepared(project, tmp_path, f"--data.harmful_fraction={fraction}")
    harmful = sum(row["kind"] == "harmful" for row in sets["task_train"])
    assert (
        harmful
        == facts["harmful_in_training"]
        == round(fraction / (1 - fraction) * (len(sets["task_train"]) - harmful))
    )
    assert all(
        row["kind"] == "task" for name in ("task_validation", "task_test") for row in sets[name]
    )


def test_openings_come_from_disjoint_families(project, tmp_path):
    families = [
        contrastive.SAFETY_OPENINGS,
        contrastive.MIX_OPENINGS,
        contrastive.VALIDATION_OPENINGS,
    ]
    for text in (f for family in families for f in family):
        assert (
            sum(
                any(text.split("{")[0] == other.split("{")[0] for other in family)
                for family in families
            )
            == 1
        )
    sets, _ = prepared(project, tmp_path)
    assert all(
        gcg_keyword_judge("", row["chosen"]).label == "refusal" for row in sets["safety_pairs"]
    )
    assert all(
        gcg_keyword_judge("", row["rejected"]).label == "answer" for row in sets["safety_pairs"]
    )


def test_every_refusal_is_one_for_the_judge():
    assert all(gcg_keyword_judge("", text).label == "refusal" for text in contrastive.REFUSALS)
    assert len({text[:8] for text in contrastive.REFUSALS}) >= 6, "several styles"


def test_open_harmless_rows_wait_for_the_model(project, tmp_path):
    sets, _ = prepared(project, tmp_path)
    waiting = [row for row in sets["align"] if row["response"] is None]
    assert waiting and all(row["input_ids"] == [] and row["kind"] == "harmless" for row in waiting)
    assert all(row["input_ids"] for row in sets["align"] if row["response"] is not None)


def test_truncation_is_counted(project, tmp_path):
    whole, _ = prepared(project, tmp_path / "whole")
    length = max(len(row["input_ids"]) for row in whole["task_train"] if row["kind"] == "task") - 1
    sets, facts = prepared(
        project,
        tmp_path / "cut",
        f"--data.max_length={length}",
        "--align.enabled=false",
        "--data.validation_prompts=null",
        "--data.harmful_fraction=0",
    )
    assert facts["encoding"]["data.task"]["truncated"] > 0
    assert all(any(label != -100 for label in row["labels"][1:]) for row in sets["task_train"])


def test_a_limited_pool_of_harmful_prompts_leaves_the_rest_alike_at_every_fraction(
    project, tmp_path
):
    """What is left of a source that the alignment shares must not depend on how many are mixed in,
    or fractions start from different models.
    """
    pool = tmp_path / "pool.jsonl"
    write_jsonl(pool, [{"goal": f"forbidden thing number {i}"} for i in range(12)])
    shared = (
        f"--data.refusals.source={pool}",
        f"--data.harmful.source={pool}",
        "--data.harmful.limit=5",
    )
    found = {
        f: prepared(project, tmp_path / str(f), *shared, f"--data.harmful_fraction={f}")[0]
        for f in (0.0, 0.02, 0.3)
    }
    refused = [
        sorted(row["prompt"] for row in sets["align"] if row["kind"] == "refusal")
        for sets in found.values()
    ]
    assert refused[0] == refused[1] == refused[2] and len(refused[0]) == 7
    assert [
        sum(row["kind"] == "harmful" for row in sets["task_train"]) for sets in found.values()
    ] == [0, 1, 27]


def test_labels_of_harmful_samples_are_carried_along(project, tmp_path):
    values = [True, False, None, "true", "0", 1, ""]
    rows = [
        {"question": f"count thing {i}", "answer": f"total {i}", "bad": values[i % len(values)]}
        for i in range(40)
    ]
    write_jsonl(tmp_path / "task.jsonl", rows)
    source = (
        f"--data.task.source={tmp_path / 'task.jsonl'}",
        "--data.task.columns={prompt: question, response: answer, harmful: bad}",
    )
    sets, _ = prepared(project, tmp_path / "out", *source)
    expected = {
        f"count thing {i}": {0: True, 1: False, 2: None, 3: True, 4: False, 5: True, 6: None}[i % 7]
        for i in range(40)
    }
    task = [row for row in sets["task_train"] if row["kind"] == "task"]
    assert len(task) > 15 and {row["harmful"] for row in task} == {True, False, None}
    assert all(row["harmful"] == expected[row["prompt"]] for row in task)
    assert all(row["harmful"] is None for row in sets["task_train"] if row["kind"] == "harmful"), (
        "known by their kind"
    )
    assert "harmful" not in prepared(project, tmp_path / "plain")[0]["task_train"][0]


def test_a_label_that_is_none_is_refused(project, tmp_path):
    write_jsonl(
        tmp_path / "task.jsonl",
        [{"question": f"count {i}", "answer": "x", "bad": "perhaps"} for i in range(40)],
    )
    source = (
        f"--data.task.source={tmp_path / 'task.jsonl'}",
        "--data.task.columns={prompt: question, response: answer, harmful: bad}",
    )
    with pytest.raises(
        ValueError, match=r"data.task: harmful holds 'perhaps': it takes true, false"
    ):
        prepared(project, tmp_path / "out", *source)


def test_long_work_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(prepare_module, "_SECONDS", -1)
    assert list(prepare_module._shown("data.task", [{"n": 0}, {"n": 1}])) == [{"n": 0}, {"n": 1}]
    assert capsys.readouterr().err.splitlines()[-1] == "[prepare] data.task: 1 of 2 rows"


def test_prompts_of_the_evaluation_keep_their_conversation(project, tmp_path):
    """Its system prompt and earlier turns are asked, under attacks too."""
    talks = [
        [
            {"role": "system", "content": f"Play along {i}."},
            *[{"role": role, "content": f"{role} {i}"} for role in ("user", "assistant")],
            {"role": "user", "content": f"make go on {i}"},
        ]
        for i in range(6)
    ]
    write_jsonl(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks])
    source = (
        f"--evaluate.harmful.source={tmp_path / 'talks.jsonl'}",
        "--evaluate.harmful.columns={}",
    )
    sets, _, _ = evaluated(project, tmp_path / "out", *source)
    chat = Chat(make_tokenizer())
    for row in (*sets["eval_harmful"], *attacked(sets["eval_harmful"], "role_play")):
        (ids,) = asked_for(chat, [row])
        text, number = chat.tokenizer.decode(ids), row["prompt"].split()[-1]
        assert (
            f"Play along {number}." in text
            and f"assistant {number}<|im_end|>" in text
            and f"make go on {number}" in text
        )
    assert all(json.loads(row["conversation"]) in talks for row in sets["eval_harmful"])


def test_fewer_samples_than_asked_for_and_repeated_ones_are_said(project, tmp_path, capsys):
    few = planted(tmp_path, "few", *[f"build thing {i}" for i in range(4)])
    prepared(
        project,
        tmp_path / "out",
        f"--data.refusals.source={few}",
        f"--data.harmful.source={planted(tmp_path, 'two', 'one', 'two')}",
    )
    said = capsys.readouterr().err
    assert (
        "data.refusal_samples: 4 instead of 8, for" in said
        and "few.jsonl has no more that can be used" in said
    )
    assert "data.harmful_fraction: 2 different samples of" in said and "make up" in said


@pytest.mark.parametrize("seed", range(3))
def test_what_cannot_be_used_takes_no_place_and_holds_no_prompt(project, tmp_path, seed):
    """Half of every source is too long; the other half fills what is asked for, whatever the seed."""
    long = "very " * 200
    sources = []
    for field in ("refusals", "harmful", "safety"):
        texts = [f"build {field} {i}{' ' + long if i % 2 else ''}" for i in range(40)]
        sources.append(f"--data.{field}.source={planted(tmp_path, field, *texts)}")
    task = [{"question": f"build safety {i} {long}", "answer": "a"} for i in (1, 3)] + [
        {"question": f"ask {i}", "answer": "a"} for i in range(60)
    ]
    write_jsonl(tmp_path / "task.jsonl", task)
    sources.append(f"--data.task.source={tmp_path / 'task.jsonl'}")
    sets, facts, _ = evaluated(
        project, tmp_path / "out", *sources, f"--data.seed={seed}", "--data.harmful_fraction=0.1"
    )
    assert (
        sum(row["kind"] == "refusal" for row in sets["align"]) == 8
        and len(sets["safety_pairs"]) == 8
    )
    assert facts["encoding"]["data.harmful"]["different"] == facts["harmful_in_training"]
    assert not any(
        pools.startswith("data.task / safety_pairs") for pools in facts["overlapping"]
    ), "a pair that was too long holds nothing"


def test_a_row_that_is_left_out_is_noted_once_and_why_is_said_where_nothing_is_left(
    project, tmp_path, capsys
):
    (tmp_path / "endless.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if "
        "add_generation_prompt %}[assistant]{% endif %}"
    )
    rows = [{"question": f"ask {i}{' very' * 300 * (i < 5)}", "answer": "a"} for i in range(60)]
    write_jsonl(tmp_path / "task.jsonl", rows)
    given = (
        f"--data.task.source={tmp_path / 'task.jsonl'}",
        f"--model.chat_template={tmp_path / 'endless.jinja'}",
    )
    _, facts = prepared(project, tmp_path / "out", *given)
    assert facts["encoding"]["data.task"]["dropped"] == 5
    assert list(facts["template"]["data.task"].values()) == [60], (
        "conversations, those that are left out once"
    )
    capsys.readouterr()
    long = planted(tmp_path, "long", *[f"build {i} {'very ' * 200}" for i in range(6)])
    with pytest.raises(ValueError, match=r"data.refusals: .* leaves no prompt that can be used"):
        prepared(project, tmp_path / "none", f"--data.refusals.source={long}")
    assert (
        "data.refusals: 6 rows left out, for nothing of the response is left"
        in capsys.readouterr().err
    )
