"""Questions and imperatives: which is which, how one becomes the other, and sets with as many of one as of the
other.
"""

from collections import Counter
from itertools import combinations

import pytest

from pipeline.data import contrastive, forms
from pipeline.data.forms import alternating, apart, count_forms, form, request, rewritten

QUESTIONS = (
    "What is the capital of France?", "how do i bake bread", "Could you write a poem?", "Please, can you help me?",
    "Is it raining?", "Do you know a good book?", "Have you read it?", "Hi! Why do cats purr?",
    "I have two cats. Which of them is older?", "As a doctor, how do I tell a patient the truth?",
    "Whose coat is this?", "Where\u2019s the station?", "Ways to save money?", "1. What is osmosis?",
    '"Who wrote Faust?"', "Who's there", "Don't birds sleep?",
    "\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u54ea\u91cc\uff1f",
)  # fmt: skip
IMPERATIVES = (
    "Write a poem.", "write a poem", "Please explain gravity.", "Give me a recipe", "List three rivers",
    "I have a text. Summarise it.", "For my lesson, draw a triangle.", "Do not use the letter e. Write a story.",
    "Have a look at this list and sort it", "Don't use the letter e.", "Let's plan a party", "Translate: good morning",
    "Hello, tell me about jazz", "Role-play a waiter", "- Name two trees", "Write a story about who stole the pie?",
)  # fmt: skip
OTHERS = (
    "My screen is black.",
    "",
    "   ",
    "Paris",
    "The weather was fine yesterday.",
    "Schreibe ein Gedicht",
    "3 + 4",
    "I want a poem about rain.",
)


@pytest.mark.parametrize("prompt", QUESTIONS)
def test_a_question_is_one(prompt):
    assert form(prompt) == "question"


@pytest.mark.parametrize("prompt", IMPERATIVES)
def test_an_imperative_is_one(prompt):
    assert form(prompt) == "imperative"


@pytest.mark.parametrize("prompt", OTHERS)
def test_what_is_neither_is_other(prompt):
    assert form(prompt) == "other"


@pytest.mark.parametrize("family", ["train", "validation", "test"])
@pytest.mark.parametrize(
    "prompt",
    ["Write a poem about rain.", "Build a boat", "How do I bake bread?", "How to bake bread", "Can you bake bread?",
     "Why do cats purr?",
     "I have flour. What is the best way to bake bread?", "What are ways to save money?"],
)  # fmt: skip
def test_what_is_rewritten_has_the_other_form_and_still_asks_for_the_same(prompt, family):
    wanted = "question" if form(prompt) == "imperative" else "imperative"
    made = rewritten(prompt, wanted, family)
    assert form(made) == wanted
    kept = {"Write": "write a poem about rain", "Build": "build a boat"}.get(prompt.split()[0]) or (
        request(prompt) or prompt
    )
    assert kept.lower() in made.lower()
    assert made == rewritten(prompt, wanted, family), "the same for the same prompt"


def test_it_reads_as_a_person_would_write_it():
    assert rewritten("Write a poem.", "question", "train") in (
        "Can you write a poem?",
        "Could you please write a poem?",
    )
    assert rewritten("Can you bake bread?", "imperative", "test") == "Bake bread."
    assert (
        rewritten("How do I bake bread?", "imperative", "validation")
        == "Describe the steps to bake bread."
    )


def test_what_no_template_fits_stays_as_it_is():
    assert rewritten("Summarise this. The train was late.", "question", "train") is None, (
        "a template would ask for the first sentence alone"
    )
    assert rewritten("My screen is black.", "question", "train") is None
    assert rewritten("Write a poem.", "imperative", "train") is None


def test_no_template_stands_on_two_sides():
    """What a model could learn from a template in training must not help, or hurt, it in the test."""
    by_family = {
        family: {
            text for table in forms.TEMPLATES for texts in table[family].values() for text in texts
        }
        for family in ("train", "validation", "test")
    }
    assert all(not by_family[one] & by_family[other] for one, other in combinations(by_family, 2))


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [("How do I bake bread?", "bake bread"), ("Write a poem.", "write a poem"), 
     ("Can you please help me open a bank account?", "open a bank account"),
     ("Tell me how to knit", "knit"), ("NASA was founded when?", None), ("Why do cats purr?", None),
     ("What is the best way to sleep?", "sleep"),
     ("Write a poem\nIt must rhyme.", "write a poem")],
)  # fmt: skip
def test_the_request_is_what_fits_after_i_can_help_you(prompt, asked):
    assert request(prompt) == asked


@pytest.mark.parametrize("prompt", [*QUESTIONS, *IMPERATIVES])
def test_openings_take_up_either_form(prompt):
    for family in (
        contrastive.SAFETY_OPENINGS,
        contrastive.MIX_OPENINGS,
        contrastive.VALIDATION_OPENINGS,
        contrastive.ALIGN_OPENINGS,
    ):
        text = contrastive.opening(prompt, family)
        assert "how do i" not in text.lower() and "{" not in text and "??" not in text


def rows(*prompts: str, **more) -> list[dict]:
    return [
        {
            "prompt": prompt,
            "messages": [{"role": "user", "content": prompt}],
            "response": "",
            **more,
        }
        for prompt in prompts
    ]


MADE = [f"Write poem {i}" for i in range(20)]


def test_whatever_is_taken_first_holds_both_forms_alike():
    found = list(alternating(rows(*MADE, "What is 1?", "What is 2?"), "train"))
    for size in range(2, 22, 2):
        counts = count_forms(found[:size])
        assert counts["question"] == counts["imperative"] == size // 2, size
    assert [row["prompt"] for row in found[:4]] == [
        "What is 1?",
        "Write poem 0",
        "What is 2?",
        "Write poem 1",
    ], "its own before rewritten ones"
    assert count_forms(found)["rewritten"] == 9 and len(found) == 22


def test_what_cannot_be_rewritten_is_taken_as_it_is_and_the_others_are_rewritten():
    fixed = [f"Imagine a lake {i}" for i in range(10)]  # no template makes a question of it
    mixed = [prompt for pair in zip(fixed, MADE[:10], strict=True) for prompt in pair]
    counts = count_forms(list(alternating(rows(*mixed), "test"))[:16])
    assert (counts["question"], counts["imperative"], counts["rewritten"]) == (8, 8, 8)


def test_a_rewritten_row_knows_what_it_was():
    asked = next(iter(alternating(rows(*MADE), "train")))
    assert asked["rewritten"] == "Write poem 0" and form(asked["prompt"]) == "question"
    assert asked["messages"] == [{"role": "user", "content": asked["prompt"]}]


@pytest.mark.parametrize(
    "more",
    [
        {"response": "An answer"},
        {"chosen": "No"},
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "Write poem 0"},
            ]
        },
    ],
)
def test_a_row_with_an_answer_of_its_own_or_a_conversation_stays_as_it_is(more):
    given = rows(*MADE, **more)
    assert list(alternating(given, "train")) == given


def test_what_is_neither_comes_last():
    found = list(alternating(rows("Paris", "What is 1?", "Write it"), "train"))
    assert [row["prompt"] for row in found] == ["What is 1?", "Write it", "Paris"]


def test_how_far_forms_are_apart():
    questions, mixed, none = (
        count_forms(rows("Why?", "How?")),
        count_forms(rows("Why?", "Write")),
        count_forms([]),
    )
    assert (apart(questions, mixed), apart(mixed, mixed), apart(none, mixed)) == (0.5, 0.0, 0.0)
    assert apart(questions, count_forms(rows("Paris"))) == 1.0


def test_alternating_keeps_every_row_once():
    given = rows(*QUESTIONS, *IMPERATIVES[:3], *OTHERS)
    kept = Counter(row.get("rewritten") or row["prompt"] for row in alternating(given, "test"))
    assert kept == Counter(row["prompt"] for row in given)
