"""Greedy generation: the batch an answer was made in cannot be seen in it, and it ends where the turn ends."""

import copy

import pytest
import torch

from pipeline.data.chat import Chat
from pipeline.generation.generation import generate
from pipeline.model.models import load_model, load_tokenizer
from pipeline.recipe.sections import ModelSection
from tests.project import make_model

TOKENS = 12
QUESTIONS = [
    "hi",
    "how do I count",
    "item " * 12,
    "I cannot help with that, can you?",
    "x",
    "total of the words in line 7",
    "Sure",
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation") / "model"
    make_model(folder)
    return load_model(str(folder), torch.float32), load_tokenizer(ModelSection(path=str(folder)))


@pytest.fixture(scope="module")
def prompts(loaded) -> list[list[int]]:
    return [
        Chat(loaded[1]).prompt_ids([{"role": "user", "content": question}])
        for question in QUESTIONS
    ]


@torch.no_grad()
def greedy(model, ids: list[int], count: int) -> list[int]:
    """The reference: one sequence, no cache, no padding, one argmax at a time."""
    out = list(ids)
    for _ in range(count):
        out.append(int(model.eval()(input_ids=torch.tensor([out])).logits[0, -1].argmax()))
    return out[len(ids) :]


def cut(tokenizer, tokens: list[int]) -> str:
    end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
    return tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def reference(loaded, prompts) -> list[list[int]]:
    return [greedy(loaded[0], ids, TOKENS) for ids in prompts]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 32])
def test_answers_do_not_depend_on_the_batch(loaded, prompts, reference, batch_size):
    model, tokenizer = loaded
    expected = [cut(tokenizer, tokens) for tokens in reference]
    assert len({len(ids) for ids in prompts}) >= 5 and len(set(expected)) >= 5, (
        "the rows are padded, and their answers differ"
    )
    assert generate(model, tokenizer, prompts, TOKENS, batch_size) == expected


def test_answers_come_in_the_order_of_the_prompts(loaded, prompts):
    model, tokenizer = loaded
    forwards = generate(model, tokenizer, prompts, TOKENS, 3)
    assert generate(model, tokenizer, prompts[::-1], TOKENS, 3) == forwards[::-1]


def test_no_prompts_give_no_answers(loaded):
    assert generate(*loaded, [], TOKENS, 4) == []


def ending(loaded, prompts, reference):
    """A copy of the model that says <|im_end|> where it said another token;
    returns it, the row and the position where that happens.
    """
    model, tokenizer = loaded
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    row, position = next(
        (row, position)
        for row, tokens in enumerate(reference)
        for position in range(2, TOKENS - 2)
        if tokens[position] not in tokens[:position] and end not in tokens[: position + 1]
    )
    changed = copy.deepcopy(model)
    weights = changed.lm_head.weight.data
    weights[[end, reference[row][position]]] = weights[[reference[row][position], end]]
    return changed, row, position


def test_an_answer_stops_at_the_end_of_turn(loaded, prompts, reference):
    _, tokenizer = loaded
    model, row, position = ending(loaded, prompts, reference)
    before = tokenizer.decode(reference[row][:position], skip_special_tokens=True).strip()
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    stops = Chat(tokenizer).template.stops
    assert generate(model, tokenizer, [prompts[row]], TOKENS, 1, stops=stops) == [before]
    handle.remove()
    assert len(passes) == position + 1, "nothing is computed after the end"
    others = [i for i in range(len(prompts)) if i != row][:3]
    assert (
        generate(model, tokenizer, [prompts[i] for i in (row, *others)], TOKENS, 4)[0] == before
    ), "also when other rows go on"


def test_an_end_of_turn_that_is_not_the_end_of_text_stops_too(loaded, prompts, reference):
    """Many chat models keep <|endoftext|> as eos and end their turns with another token."""
    model, row, position = ending(loaded, prompts, reference)
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    before = tokenizer.decode(reference[row][:position], skip_special_tokens=True).strip()
    stops = Chat(tokenizer).template.stops
    assert generate(model, tokenizer, [prompts[row]], TOKENS, 1, stops=stops) == [before]


def test_the_token_limit_is_kept_and_progress_is_told(loaded, prompts, reference):
    model, tokenizer = loaded
    seen = []
    answers = generate(
        model, tokenizer, prompts, 3, 4, lambda done, total: seen.append((done, total))
    )
    assert answers == [cut(tokenizer, tokens[:3]) for tokens in reference]
    assert seen == [(4, 7), (7, 7)]
