"""Label masks over several chat templates: the response is in input_ids,
and exactly what the assistant says is supervised.
"""

import pytest

from pipeline.data.chat import Chat
from tests.project import TEMPLATE, make_tokenizer

CHATML_MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == "
    "'assistant' %}{% generation %}{{ message['content'] }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<s>[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }} </s>{% endif %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}<bos>"
    "{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt "
    "%}<start_of_turn>model\n{% endif %}"
)
GLUED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q:{{ m['content'] }} A:{% else %}{{ "
    "m['content'] }};{% endif %}{% endfor %}"
)
DATED = (
    "{% if add_generation_prompt %}(now){% else %}(then){% endif %}{% for m in messages %}[{{ "
    "m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Mistral's way: the system prompt stands in the last user turn, so it moves on with every turn
LAST_SYSTEM = (
    "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}{% for m in "
    "messages %}{% if m['role'] == 'user' %}[INST] "
    "{% if m == last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n\n{% "
    "endif %}{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
REASONING = (  # past turns lose what stands before </think>, and the generation prompt opens it
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and not loop.last "
    "%}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<end>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# template -> what must be supervised of "The answer is 4.":
# its end of turn, and the tokenizer's eos where that is none at which generation stops
TEMPLATES = {
    "chatml": (TEMPLATE, "The answer is 4.<|im_end|>"),
    "chatml with generation markers": (CHATML_MARKED, "The answer is 4.<|im_end|>"),
    "llama 2": (LLAMA2, " The answer is 4. </s><|im_end|>"),
    "gemma": (GEMMA, "The answer is 4.<end_of_turn><|im_end|>"),
    "no border": (GLUED, "The answer is 4.;<|im_end|>"),
    "past turns otherwise than present ones": (DATED, "The answer is 4.<|im_end|>"),
    "system in the last user turn": (LAST_SYSTEM, " The answer is 4.</s><|im_end|>"),
    "reasoning": (REASONING, "The answer is 4.<end><|im_end|>"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def supervised(tokenizer, encoded) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != -100])


def encode(tokenizer, messages, max_length: int, **how):
    """The one sequence that a conversation takes; None where no supervised token is left."""
    found = Chat(tokenizer).encode(messages, max_length, **how)
    assert len(found) <= 1
    return found[0] if found else None


def encode_all(tokenizer, messages, **how):
    return Chat(tokenizer).encode(messages, 10_000, **how)


@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_answer_is_supervised(tokenizer, name):
    tokenizer.chat_template, expected = TEMPLATES[name]
    messages = [
        {"role": "user", "content": "How much is 2 + 2?"},
        {"role": "assistant", "content": "The answer is 4."},
    ]
    encoded = encode(tokenizer, messages, 200)
    assert "The answer is 4." in tokenizer.decode(encoded.input_ids), (
        "the response is in input_ids: teacher forcing"
    )
    assert supervised(tokenizer, encoded).strip() == expected.strip()
    assert all(
        label in (-100, token)
        for label, token in zip(encoded.labels, encoded.input_ids, strict=True)
    )


CAPITALS = TEMPLATE.replace("message['content']", "message['content'] | upper")


def test_a_template_that_changes_answers_changes_no_thought_that_is_trained(tokenizer):
    """Thought and answer are put together by the template: not where it writes them otherwise than the data."""
    assert CAPITALS != TEMPLATE
    tokenizer.chat_template = CAPITALS
    answer = "<think>\nTwo and two.\n</think>\n\nThe answer is 4."
    encoded = encode(
        tokenizer,
        [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": answer}],
        200,
    )
    assert supervised(tokenizer, encoded) == f"{answer}<|im_end|>"


def test_a_template_that_changes_calls_is_refused(tokenizer):
    calls = (
        "{% for c in message.tool_calls or [] %}{{ c.function.name | upper }}{{ "
        "c.function.arguments | tojson | upper }}{% endfor %}"
    )
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ message['content'] }}", "{{ message['content'] or '' }}" + calls
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Bonn"}}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    with pytest.raises(ValueError, match="leaves out"):
        Chat(tokenizer).encode(messages, 200)


@pytest.mark.parametrize("many", [3, 40])
def test_a_template_that_writes_without_end_is_refused(tokenizer, many):
    """Also where only a long conversation makes it do so."""
    tokenizer.chat_template = (
        TEMPLATE
        + "{% if messages | length > "
        + str(many)
        + " %}{% for a in range(900) %}{{ 'x' * 3000 }}{% endfor %}{% endif %}"
    )
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": "Well."}
        for i in range(many + 2 + many % 2)
    ]
    with pytest.raises(
        ValueError, match=r"makes 2,70[0-9],[0-9]+ characters of [0-9,]+: set model.chat_template"
    ):
        Chat(tokenizer).encode(turns, 10_000)
    tokenizer.chat_template = TEMPLATE
    assert Chat(tokenizer).encode(turns, 10_000)


def test_a_template_that_ends_only_for_short_conversations_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr("pipeline.data.rendering.SECONDS", 0.3)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = TEMPLATE + "{% if messages | length > 3 %}" + loop + "{% endif %}"
    turns = [{"role": ("user", "assistant")[i % 2], "content": "Well."} for i in range(6)]
    with pytest.raises(ValueError, match=r"longer than 0.3 s for [0-9] messages: it does not end"):
        Chat(tokenizer).encode(turns, 200)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_assistant_turn_is_supervised(tokenizer, name):
    tokenizer.chat_template, _ = TEMPLATES[name]
    messages = [
        {"role": "user", "content": "First question"},
        {"role": "assistant", "content": "First reply"},
        {"role": "user", "content": "Second question"},
        {"role": "assistant", "content": "Second reply"},
    ]
    text = "".join(supervised(tokenizer, encoded) for encoded in encode_all(tokenizer, messages))
    assert "First reply" in text and "Second reply" in text and "question" not in text


@pytest.mark.parametrize("system", [None, "Say yes or no, assistant."])
@pytest.mark.parametrize("answer", ["yes", "no", "assistant", "end", "s", "I"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_that_the_user_or_the_template_says_too(tokenizer, name, answer, system):
    tokenizer.chat_template, expected = TEMPLATES[name]
    first, second = (
        "Is it true? Say yes or no, or I end as an assistant does.",
        "And now? Say yes or no, or I end.",
    )
    messages = [{"role": "system", "content": system}] if system else []
    for question, reply in ((first, answer), (second, f"{answer}, again"), (first, answer)):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    marker = expected.strip().removeprefix("The answer is 4.")
    runs = [
        (encoded, run) for encoded in encode_all(tokenizer, messages) for run in runs_of(encoded)
    ]
    assert [
        tokenizer.decode([encoded.labels[i] for i in run]).strip() for encoded, run in runs
    ] == [
        answer + marker,
        f"{answer}, again{marker}",
        answer + marker,
    ]
    ends = [tokenizer.decode(encoded.input_ids[: run[0]]) for encoded, run in runs]
    assert [text.count("Say yes or no, or I end") for text in ends] == [1, 2, 3], (
        "each stands after its own question"
    )


def runs_of(encoded) -> list[list[int]]:
    """Positions of the supervised tokens, one list for each stretch of them."""
    runs: list[list[int]] = []
    for position, label in enumerate(encoded.labels):
        if label != -100:
            if position and encoded.labels[position - 1] != -100:
                runs[-1].append(position)
            else:
                runs.append([position])
    return runs


def test_stripped_reasoning_is_trained_where_inference_produces_it(tokenizer):
    tokenizer.chat_template = REASONING
    messages = [
        {"role": "user", "content": "First question"},
        {"role": "assistant", "content": "a long thought before it</think>yes"},
        {"role": "user", "content": "Second question"},
        {"role": "assistant", "content": "hm</think>no"},
    ]
    first, second = encode_all(tokenizer, messages)
    assert supervised(tokenizer, first) == "a long thought before it</think>yes<end><|im_end|>"
    assert supervised(tokenizer, second) == "hm</think>no<end><|im_end|>"
    assert "a long thought" not in tokenizer.decode(second.input_ids), (
        "inference will not see it either"
    )


def test_a_template_that_changes_answers_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ loop.last }}{{ m['content'] | length if m['role'] == "
        "'assistant' else m['content'] }};{% endfor %}"
    )
    with pytest.raises(ValueError, match="leaves out what the assistant says"):
        Chat(tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_turn_alone_can_be_supervised(tokenizer, name):
    tokenizer.chat_template, expected = TEMPLATES[name]
    messages = [{"role": role, "content": "The answer is 4."} for role in ("user", "assistant") * 2]
    whole, (last,) = (
        encode_all(tokenizer, messages, last_turn_only=only) for only in (False, True)
    )
    assert (
        last.input_ids == whole[-1].input_ids
        and supervised(tokenizer, last).strip() == expected.strip()
    )
    assert (
        sum(len(runs_of(encoded)) for encoded in whole) == 2
        and runs_of(last) == runs_of(whole[-1])[-1:]
    )


@pytest.mark.parametrize(
    "given, left",
    [
        ("I cannot", " help with that.<|im_end|>"),
        ("I cannot help with that.", "<|im_end|>"),
        ("I can", " cannot help with that.<|im_end|>"),
    ],
)
def test_what_an_answer_is_given_is_not_trained(tokenizer, given, left):
    """A token that holds some of both is trained."""
    tokenizer.chat_template = TEMPLATE
    messages = [
        {"role": "user", "content": "I cannot count"},
        {"role": "assistant", "content": "I cannot help with that."},
    ]
    whole, found = encode(tokenizer, messages, 100), encode(tokenizer, messages, 100, given=given)
    assert found.input_ids == whole.input_ids and supervised(tokenizer, found) == left


def test_prompt_of_generation_is_a_prefix_of_training(tokenizer):
    tokenizer.chat_template = TEMPLATE
    user = [{"role": "user", "content": "Count the words"}]
    encoded = encode(tokenizer, [*user, {"role": "assistant", "content": "Three"}], 100)
    prompt = Chat(tokenizer).prompt_ids(user)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert (
        all(label == -100 for label in encoded.labels[: len(prompt)])
        and encoded.labels[len(prompt)] != -100
    )


def test_tokens_that_would_merge_at_the_border_do_not():
    """A template whose prompt ends in characters that a merge joins with the response's first ones:
    inference has them apart.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, "c": 2, ":": 3, ":b": 4, "<pad>": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(":", "b")]))
    tokenizer.decoder = decoders.Fuse()
    merging = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<pad>")
    merging.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}:{% endif %}{% "
        "endfor %}"
    )
    messages = [{"role": "user", "content": "aa"}, {"role": "assistant", "content": "bca"}]
    encoded = encode(merging, messages, 20)
    assert Chat(merging).prompt_ids(messages[:1]) == [0, 0, 3]
    assert encoded.input_ids == [0, 0, 3, 1, 2, 0, 5], (
        "the eos is put there, since the template has no end"
    )
    assert encoded.labels == [-100, -100, -100, 1, 2, 0, 5]


def test_system_message_moves_where_the_template_has_no_such_role(tokenizer):
    tokenizer.chat_template = GEMMA
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    encoded = encode(tokenizer, messages, 200)
    assert "Be brief.\n\nHi" in tokenizer.decode(encoded.input_ids) and "Hello" in supervised(
        tokenizer, encoded
    )
    assert "brief" not in supervised(tokenizer, encoded)


def test_truncation_never_leaves_a_sample_without_supervised_tokens(tokenizer):
    tokenizer.chat_template = TEMPLATE
    messages = [
        {"role": "user", "content": "word " * 20},
        {"role": "assistant", "content": "reply " * 20},
    ]
    whole = encode(tokenizer, messages, 10_000)
    first = next(i for i, label in enumerate(whole.labels) if label != -100)
    assert not whole.truncated
    for length in range(1, len(whole.input_ids) + 1):
        encoded = encode(tokenizer, messages, length)
        if length <= first:
            assert encoded is None
        else:
            assert len(encoded.input_ids) == length and any(
                label != -100 for label in encoded.labels[1:]
            )
            assert encoded.truncated == (length < len(whole.input_ids))


def test_a_slow_tokenizer_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="slow tokenizer"):
        Chat(Slow())
