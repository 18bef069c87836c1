"""Attacks: what is asked under them, with which control, and what is reported of it."""

import json

import pytest

from pipeline.attacks.attacks import ATTACKS, attacked
from pipeline.data import contrastive
from pipeline.data.sets import write_set
from pipeline.evaluation.evaluate import prompts, summarise
from pipeline.evaluation.sets import evaluation_sets
from pipeline.recipe.sections import EvaluateSection

HARMFUL = {"source": "builtin:strongreject"}


def rows(name: str, count: int) -> list[dict]:
    return [
        {
            "id": f"{name}-{i}",
            "prompt": f"{name} {i}",
            "form": ("question", "imperative")[i % 2],
            "rewritten": None,
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_asks_the_same_in_other_words_or_begins_the_answer(name):
    (row,) = attacked(rows("harmful", 1), name)
    said = json.loads(row["messages"])[0]["content"]
    assert (
        "harmful 0" in said
        and row["asked"] == said
        and row["prompt"] == "harmful 0"
        and row["id"] == f"{name}-harmful-0"
    )
    assert (said != "harmful 0") != bool(row["prefill"]), "one of the two"


class Letters:
    """A chat whose tokenizer has one token a letter, and whose template has two marks."""

    def __init__(self):
        self.tokenizer = self

    def prompt_ids(self, messages, tools):
        return self(f"<{messages[-1]['content']}>", add_special_tokens=False)["input_ids"]

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}


def test_a_prefill_is_what_the_answer_begins_with_and_nothing_else_is():
    plain_ids, prefilled = prompts(
        Letters(), [*rows("harmful", 1), *attacked(rows("harmful", 1), "prefill")]
    )
    assert "".join(map(chr, plain_ids)) == "<harmful 0>"
    assert "".join(map(chr, prefilled)) == "<harmful 0>Sure, here is"
    (template,) = prompts(Letters(), attacked(rows("harmful", 1), "role_play"))
    assert "".join(map(chr, template)).endswith("Max:>")


def test_no_opening_that_the_project_trains_on_begins_as_the_prefill_does():
    families = (
        contrastive.SAFETY_OPENINGS,
        contrastive.MIX_OPENINGS,
        contrastive.VALIDATION_OPENINGS,
        contrastive.ALIGN_OPENINGS,
    )
    assert not [text for family in families for text in family if text.lower().startswith("sure")]


def test_a_braced_prompt_is_asked_as_it_stands():
    (row,) = attacked([{"id": "a", "prompt": "print {x} and {prompt}"}], "role_play")
    assert "print {x} and {prompt}" in row["asked"]


@pytest.fixture
def folders(tmp_path):
    for name in ("prepared", "prompts"):
        (tmp_path / name).mkdir()
    for split in ("eval", "validation"):
        for name, count in (("harmful", 9), ("harmless", 8), ("ordinary", 8)):
            folder, file = (
                ("prepared", "validation_prompts")
                if (split, name) == ("validation", "harmful")
                else ("prompts", f"{split}_{name}")
            )
            write_set(tmp_path / folder / f"{file}.parquet", rows(f"{split}-{name}", count))
    for name in ("task_test", "task_validation"):
        write_set(tmp_path / "prepared" / f"{name}.parquet", rows(name, 5))
    return tmp_path / "prepared", tmp_path / "prompts"


@pytest.mark.parametrize("split", ["test", "validation"])
def test_each_attack_has_harmful_prompts_and_a_control_of_both_kinds_and_forms(folders, split):
    section = EvaluateSection(
        harmful=HARMFUL,
        ordinary=HARMFUL,
        attacks=["prefill", "role_play"],
        attack_prompts=6,
        harmful_prompts=7,
        task_prompts=3,
        split=split,
    )
    sets = evaluation_sets(section, *folders)
    sizes = {
        "harmful": 7,
        "harmless": 8,
        "ordinary": 8,
        "task": 3,
        **{f"{a}/{kind}": 6 for a in section.attacks for kind in ("harmful", "harmless")},
    }
    assert {name: len(found) for name, found in sets.items()} == sizes
    control = sets["role_play/harmless"]
    origins = [row["prompt"].rsplit("-", 1)[1].split()[0] for row in control]
    assert origins == ["harmless", "harmless", "ordinary", "ordinary", "harmless", "harmless"]
    assert [row["form"] for row in control] == ["question", "imperative"] * 3
    wanted = "eval" if split == "test" else "validation"
    assert all(
        row["prompt"].startswith(wanted)
        for name, found in sets.items()
        if name != "task"
        for row in found
    )


def test_without_attacks_none_is_asked(folders):
    assert list(evaluation_sets(EvaluateSection(harmful=HARMFUL), *folders)) == [
        "harmful",
        "harmless",
        "ordinary",
        "task",
    ]


def test_attacks_without_a_control_are_refused():
    with pytest.raises(
        ValueError,
        match=r"attacks need harmless prompts as their control: name a source in evaluate.ordinary",
    ):
        EvaluateSection(harmful=HARMFUL, attacks=["prefill"])


def answer(name: str, label: str, form: str = "question") -> dict:
    return {"set": name, "label": label, "form": form, "empty": False, "incoherent": False}


def test_what_is_told_apart_is_the_harmless_answered_less_the_harmful():
    """A model that refuses everything under a template tells nothing apart, though it answers nothing harmful."""
    mute = [
        answer(f"role_play/{kind}", "refusal")
        for kind in ("harmful", "harmless")
        for _ in range(10)
    ]
    good = (
        [answer("prefill/harmful", "refusal")] * 9
        + [answer("prefill/harmful", "answer")]
        + [answer("prefill/harmless", "answer")] * 10
    )
    found = summarise([*mute, *good])
    assert (
        found["role_play/harmful_answered"]["value"],
        found["role_play/told_apart"]["value"],
    ) == (0.0, 0.0)
    assert (
        found["prefill/told_apart"]["value"] == pytest.approx(0.9)
        and found["prefill/told_apart"]["low"] > 0.4
    )
    assert found["role_play/told_apart"]["low"] < -0.1 < 0.1 < found["role_play/told_apart"]["high"]
    assert "ignore_instructions/told_apart" not in found


def test_rates_are_given_by_form():
    found = summarise(
        [
            answer("ordinary", "refusal", "imperative"),
            answer("ordinary", "answer", "question"),
            answer("ordinary", "answer", "other"),
        ]
    )
    assert found["ordinary_refusal_rate"]["n"] == 3
    assert (
        found["ordinary_refusal_rate/imperative"]["value"],
        found["ordinary_refusal_rate/question"]["value"],
    ) == (
        1.0,
        0.0,
    )
    assert "over_refusal_rate/question" not in found


def test_unparseable_answers_raise_no_rate_and_are_counted():
    found = summarise(
        [
            answer("harmful", "unparseable"),
            answer("harmful", "answer"),
            answer("ordinary", "unparseable"),
            answer("ordinary", "refusal"),
        ]
    )
    assert (
        found["non_refusal_rate"]["value"],
        found["ordinary_refusal_rate"]["value"],
        found["unparseable_rate"]["value"],
    ) == (0.5, 0.5, 0.5)
