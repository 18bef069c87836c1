"""One contract for every chat template: what is trained is what inference has to produce, token for token.

The reference is transformers' own apply_chat_template: what it renders with a generation prompt is the prompt of
inference.
"""

from __future__ import annotations

import copy
import itertools

import pytest

from pipeline.data import chat_template
from pipeline.data.chat import IGNORE, Chat
from pipeline.data.thoughts import without_thought
from pipeline.data.time_limit import time_limit
from tests.project import make_tokenizer
from tests.unit.data.templates import CHATML, FAMILIES, PAST, Family

FIRST = [
    {"role": "user", "content": "How do I count the lines?"},
    {"role": "assistant", "content": "Sure, with wc."},
]
SECOND = [
    {"role": "user", "content": "and the words in it"},
    {"role": "assistant", "content": "The answer is: wc -w"},
]
SYSTEM = [{"role": "system", "content": "Be brief with users."}]
CONVERSATIONS = {
    "one turn": FIRST,
    "several turns": FIRST
    + SECOND
    + [FIRST[0] | {"content": "why"}, FIRST[1] | {"content": "No reason."}],
    "system prompt": SYSTEM + FIRST,
    "system prompt, several turns": SYSTEM + FIRST + SECOND,
    "empty system prompt": [{"role": "system", "content": ""}, *FIRST],
    "the user is last": FIRST + SECOND[:1],
    "code and white space": [
        FIRST[0],
        {"role": "assistant", "content": "\n    def f():\n        pass\n"},
    ],
}
REFUSED = {name for name, family in FAMILIES.items() if family.outcome.startswith("refused: ")}


def byte_level():
    return make_tokenizer()


def merging():
    """Merges cross every border: no pre-tokenizer splits, and the text it was trained on is conversations."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = (
        "assistant\n",
        "[/INST] ",
        "Assistant:",
        "ASSISTANT:",
        "\n\n",
        "]",
        ">",
        "</think>\n\n",
        "### Response:\n",
    )
    texts = [
        f"{end}{start}"
        for end in ends
        for start in ("Sure, with wc.", "The answer is", "No reason.", "\n    def")
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece():
    """Llama 2's way: a space before the text, bytes for what is not known, and a BOS that the tokenizer adds itself."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = sorted(
        {
            *"▁.,:;?!#*+-<>[]()|/'\"{}_",
            *map(chr, range(48, 58)),
            *map(chr, range(65, 91)),
            *map(chr, range(97, 123)),
        }
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(
        ["▁how▁do▁I▁count▁the▁lines", "▁Sure,▁with▁wc.", "assistant:▁The▁answer▁is"] * 20, trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


TOKENIZERS = {
    "byte level": byte_level,
    "merges cross borders": merging,
    "SentencePiece with BOS": sentencepiece,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def plain(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1)


@pytest.fixture(scope="module")
def chats(plain):
    """Family -> Chat, each made once."""
    made: dict[str, Chat] = {}
    return lambda name: (
        made.setdefault(name, None)
        or made.update({name: with_family(plain, FAMILIES[name])})
        or made[name]
    )


def with_family(plain, family: Family) -> Chat:
    tokenizer = copy.deepcopy(plain)
    tokenizer.add_tokens(list(family.specials), special_tokens=True)
    tokenizer.eos_token, tokenizer.bos_token = family.eos, family.bos
    tokenizer.chat_template = family.template
    return Chat(tokenizer, tokenizer.convert_tokens_to_ids(list(family.stops)))


def reference(chat: Chat, messages: list[dict], tools=None) -> list[int]:
    """The prompt of inference by transformers itself, with content as the template wants it."""
    if chat.template.renderer.folds_system and messages[0]["role"] == "system":
        said = "\n\n".join(message["content"] for message in messages[:2] if message["content"])
        messages = [messages[1] | {"content": said}, *messages[2:]]
    if chat.template.renderer.wants_parts:
        messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    text = chat.tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True
    )
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


def check(chat: Chat, messages: list[dict], samples, tools=None) -> None:
    """The contract: every assistant's turn once, after its prompt of inference, verbatim, with an end that stops."""
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    trained: list[int] = []
    for sample in samples:
        assert len(sample.input_ids) == len(sample.labels)
        runs = runs_of(sample.labels)
        mine = turns[len(trained) : len(trained) + len(runs)]
        assert mine and mine[-1] == sample.turn
        for place, (start, end) in zip(mine, runs, strict=True):
            assert sample.input_ids[:start] == reference(chat, messages[:place], tools), (
                "the prompt of inference, token for token"
            )
            assert sample.labels[start:end] == sample.input_ids[start:end]
            said = chat.tokenizer.decode(
                sample.labels[start:end], clean_up_tokenization_spaces=False
            )
            assert messages[place]["content"] in " " + said, (
                "verbatim, but for the space that SentencePiece puts at a beginning"
            )
            assert sample.labels[end - 1] in chat.template.stops, "generation stops here"
            assert all(
                label not in chat.template.stops for label in sample.labels[start : end - 1][-1:]
            ), "and ends once"
            for other in messages:
                assert (
                    other["role"] == "assistant"
                    or not other["content"]
                    or other["content"] not in said
                )
        trained += mine
    assert trained == turns


def runs_of(labels: list[int]) -> list[tuple[int, int]]:
    borders = [
        place
        for place in range(1, len(labels))
        if (labels[place] == IGNORE) != (labels[place - 1] == IGNORE)
    ]
    edges = [0, *borders, len(labels)]
    return [(start, end) for start, end in itertools.pairwise(edges) if labels[start] != IGNORE]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - REFUSED))
def test_what_is_trained_is_what_inference_has_to_produce(chats, name, conversation):
    chat, messages = chats(name), CONVERSATIONS[conversation]
    check(chat, messages, chat.encode(messages, 10_000))


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - REFUSED))
def test_what_is_done_otherwise_than_the_template_does_is_said(chats, name):
    family, chat = FAMILIES[name], chats(name)
    chat.notes.clear()
    samples = chat.encode(SYSTEM + FIRST + SECOND, 10_000)
    if family.outcome == "right":
        assert not [note for note in chat.notes if PAST not in note]
    else:
        assert any(family.outcome in note for note in chat.notes), dict(chat.notes)
    assert (len(samples) > 1) == any(PAST in note for note in chat.notes)
    assert set(chat.notes.values()) <= {1}, "counted once a conversation"


@pytest.mark.parametrize(
    "name", sorted(name for name, family in FAMILIES.items() if "opens" in family.outcome)
)
def test_a_thought_that_the_prompt_opens_is_closed(chats, name):
    """And nothing is said inside of it where the data have no thought."""
    mark = FAMILIES[name].outcome.removeprefix("opens ")
    closed = {"<|START_THINKING|>": "<|END_THINKING|>"}.get(mark, f"{mark[0]}/{mark[1:]}")
    (said,) = supervised(chats(name), chats(name).encode(FIRST, 10_000)[0])
    assert said.split(closed)[0].strip() == "" and said.split(closed)[1].lstrip().startswith(
        "Sure, with wc."
    )


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - REFUSED))
def test_one_sequence_holds_all_turns_where_the_template_allows_it(name):
    samples = with_family(make_tokenizer(), FAMILIES[name]).encode(SYSTEM + FIRST + SECOND, 10_000)
    assert len(samples) == 1 + FAMILIES[name].several


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_held_to_the_contract_is_refused_by_name(plain, name):
    with pytest.raises(ValueError, match="the chat template") as caught:
        chat = with_family(plain, FAMILIES[name])
        chat.encode(FIRST, 100)
    assert FAMILIES[name].outcome.removeprefix("refused: ") in str(
        caught.value
    ) and "\n" not in str(caught.value)


CALL = {
    "type": "function",
    "function": {
        "name": "count_lines",
        "arguments": {"path": "a.txt", "deep": {"most": 12}, "names": ["x y", 'z"q']},
    },
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "count_lines",
            "description": "Counts.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
CALLING = [
    FIRST[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "it has 42 lines"},
    {"role": "assistant", "content": "There are 42."},
]


@pytest.mark.parametrize("name", sorted(name for name, family in FAMILIES.items() if family.tools))
def test_tool_calls_are_supervised_with_their_arguments(chats, name):
    chat = chats(name)
    samples = chat.encode(CALLING, 10_000, tools=TOOLS)
    said = [text for sample in samples for text in supervised(chat, sample)]
    assert len(said) == 2 and "There are 42." in said[1]
    assert all(value in said[0] for value in ("count_lines", "a.txt", "deep", "12", "x y"))
    for sample, place in ((samples[0], 1), (samples[-1], 3)):
        start, end = runs_of(sample.labels)[0 if place == 1 else -1]
        prompt = chat.template.prompt(CALLING[:place], TOOLS)
        assert (
            sample.input_ids[:start]
            == chat.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        )
        assert sample.labels[end - 1] in chat.template.stops
    assert "it has 42 lines" in chat.tokenizer.decode(
        samples[-1].input_ids
    ) and "42 lines" not in "".join(said)


@pytest.mark.parametrize(
    "name", sorted({name for name, family in FAMILIES.items() if not family.tools} - REFUSED)
)
def test_tool_calls_are_refused_where_the_template_cannot_say_them(chats, name):
    with pytest.raises(
        ValueError,
        match=r"leaves out `tools`|leaves out tool calls|refuses the roles|what the assistant says",
    ):
        chats(name).encode(CALLING[:2], 10_000, tools=TOOLS)


def test_a_template_that_renders_one_call_of_two_is_refused(chats):
    second = CALL | {"function": {"name": "other", "arguments": {}}}
    two = [FIRST[0], {"role": "assistant", "content": None, "tool_calls": [CALL, second]}]
    assert "other" in supervised(chats("qwen 2.5"), chats("qwen 2.5").encode(two, 10_000)[0])[0]
    with pytest.raises(ValueError, match=r"leaves out (arguments of )?tool calls"):
        chats("llama 3.2, with a date and tools").encode(two, 10_000)


THOUGHT = [FIRST[0], FIRST[1] | {"reasoning_content": "They want lines.\n\nSo wc."}]
THINKING = {
    "qwen 3",
    "qwen 3, thinking",
    "magistral",
    "deepseek r1",
    "gpt-oss",
    "nemotron",
    "command r7b, reasoning",
    "seed-oss",
}


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - REFUSED))
def test_reasoning_is_supervised_before_the_answer_or_refused(chats, name):
    chat = chats(name)
    if name not in THINKING:
        with pytest.raises(ValueError, match="leaves out reasoning_content"):
            chat.encode(THOUGHT, 10_000)
        return
    (sample,) = chat.encode(THOUGHT, 10_000)
    check(chat, THOUGHT, [sample])
    (said,) = supervised(chat, sample)
    assert said.index("They want lines.\n\nSo wc.") < said.index("Sure, with wc.")


@pytest.mark.parametrize("name", ["qwen 3", "qwen 3, thinking", "deepseek r1"])
@pytest.mark.parametrize(
    "content",
    [
        "<think>\nThey want lines.\n</think>\n\nSure, with wc.",
        "They want lines.</think>Sure, with wc.",
    ],
)
def test_a_thought_inside_an_answer_is_opened_and_closed_once(chats, name, content):
    chat = chats(name)
    (sample,) = chat.encode([FIRST[0], {"role": "assistant", "content": content}], 10_000)
    text = chat.tokenizer.decode(sample.input_ids)
    (said,) = supervised(chat, sample)
    assert "They want lines." in said and "Sure, with wc." in said
    assert text.count("</think>") == 1 and text.count("<think>") <= 1


def supervised(chat: Chat, sample) -> list[str]:
    runs = [sample.input_ids[start:end] for start, end in runs_of(sample.labels)]
    return [chat.tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def test_turns_that_are_not_to_be_trained_are_not(chats):
    chat = chats("qwen 2.5")
    messages = [*FIRST[:1], FIRST[1] | {"train": False}, *SECOND]
    (sample,) = chat.encode(messages, 10_000)
    assert supervised(chat, sample) == [
        "The answer is: wc -w<|im_end|>"
    ] and "Sure, with wc." in chat.tokenizer.decode(sample.input_ids)
    assert chat.encode([FIRST[0], FIRST[1] | {"train": False}], 10_000) == []


def test_what_the_assistant_says_first_is_not_trained(chats):
    chat = chats("qwen 2.5")
    (sample,) = chat.encode([{"role": "assistant", "content": "Hello, you."}, *FIRST], 10_000)
    assert supervised(chat, sample) == [
        "Sure, with wc.<|im_end|>"
    ] and "Hello, you." in chat.tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize(
    "text, left",
    [
        ("<think>\na\n</think>\n\nb", "b"),
        ("\n</think>\n\nb", "b"),
        ("a[/THINK]b", "b"),
        ("no thought", "no thought"),
    ],
)
def test_what_an_answer_says_after_its_thought(text, left):
    assert without_thought(text) == left


def test_a_time_limit_ends_what_does_not_end_and_leaves_other_timers_running():
    import signal
    import time

    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    others = signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(ValueError, match=r"^enough$"), time_limit(0.2, "enough"):
            while True:
                pass
        assert not rung and 0.5 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1.4
        time.sleep(1.6)
        assert rung, "the other timer rang when it was to"
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *others)


@pytest.mark.parametrize(
    "opening, between, left",
    [
        ("[assistant] ", "[assistant] so: ", "so: "),
        ("ASSISTANT:\n", " ASSISTANT: ", ""),
        ("\n\nBOT:", "\nBOT: <final>", "<final>"),
        ("to all: assistant\nto: user\n", "to all: assistant\n", ""),
        ("[a]<think>\n", "[a]<call>", "<call>"),
        ("[a]<think>\n</think>", "[a]<call>", "<call>"),
        ("[a]<think>\n", "[a]<think></think>", "</think>"),
        ("[a]<think>\n</think>\n", "[a]<think>\n\n</think>\n\n", ""),
        ("[assistant]", "[model]", None),
    ],
)
def test_what_is_left_before_an_answer_is_the_template_s_own(opening, between, left):
    assert chat_template._after(opening, between) == left


GLUED = [
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% else %}"
    "{{ m.role + ': ' + m.content + ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ "
    "'ASSISTANT:\n' }}{% endif %}",
    "{% for m in messages %}{{ 'Source: ' + m.role + '\n\n ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Source: assistant\nDestination: user\n\n ' }}{% endif %}",
]


@pytest.mark.parametrize("template", GLUED)
@pytest.mark.parametrize(
    "asked", ["SECRET one\nSECRET two", "a: b\n\n c", "ASSISTANT: me", "Source: assistant\n\n "]
)
def test_no_text_of_the_user_becomes_part_of_an_answer(template, asked):
    """Where a generation prompt and a rendering begin answers in two ways, and the user says what looks like either."""
    chat = with_family(make_tokenizer(), Family(template, ("</s>",), "</s>"))
    (sample,) = chat.encode(
        [{"role": "user", "content": asked}, {"role": "assistant", "content": "Yes."}], 1000
    )
    assert supervised(chat, sample) == ["Yes.</s>"]
    assert sample.input_ids[: runs_of(sample.labels)[0][0]] == chat.prompt_ids(
        [{"role": "user", "content": asked}]
    )


def test_text_beside_calls_calls_of_earlier_turns_and_tools_are_not_left_out():
    wordless = (
        "{{ tools | tojson if tools else '' }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% "
        "endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = with_family(make_tokenizer(), Family(wordless, CHATML, "<|im_end|>"))
    assert "count_lines" in supervised(chat, chat.encode(CALLING[:2], 1000, tools=TOOLS)[0])[0]
    with pytest.raises(ValueError, match="leaves out what an answer says beside its tool calls"):
        chat.encode([FIRST[0], CALLING[1] | {"content": "Let me look."}], 1000, tools=TOOLS)
    plain = with_family(make_tokenizer(), FAMILIES["smollm 2"])
    with pytest.raises(ValueError, match="leaves out `tools`"):
        plain.encode(FIRST, 1000, tools=TOOLS)
    past = [
        FIRST[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL], "train": False},
        *SECOND,
    ]
    with pytest.raises(ValueError, match="leaves out arguments of tool calls"):
        plain.encode(past, 1000)


def test_an_opened_thought_is_closed_before_a_call():
    template = FAMILIES["qwen 2.5"].template.replace(
        "<|im_start|>assistant\n' }}{%- endif %}",
        "<|im_start|>assistant\n<think>\n' }}{%- endif %}",
    )
    chat = with_family(
        make_tokenizer(), Family(template, (*CHATML, "<think>", "</think>"), "<|im_end|>")
    )
    (said,) = supervised(chat, chat.encode(CALLING[:2], 1000, tools=TOOLS)[0])
    assert (
        said.lstrip().startswith("</think>")
        and said.count("</think>") == 1
        and "<tool_call>" in said
    )


def test_a_harmony_answer_holds_no_stop():
    chat = with_family(make_tokenizer(), FAMILIES["gpt-oss"])
    stops = chat.tokenizer.convert_ids_to_tokens(sorted(chat.template.stops))
    assert stops == ["<|return|>"], "<|end|> ends the thought, and <|return|> the answer"
    phi = with_family(
        make_tokenizer(),
        Family(FAMILIES["phi 4"].template, (*CHATML, "<|im_sep|>"), "<|endoftext|>"),
    )
    assert "<|im_end|>" in phi.tokenizer.convert_ids_to_tokens(sorted(phi.template.stops)), (
        "no config names it"
    )


def test_stops_and_special_tokens_inside_of_texts_are_refused_or_said():
    chat = with_family(make_tokenizer(), FAMILIES["qwen 2.5"])
    with pytest.raises(ValueError, match="holds text at which generation stops"):
        chat.encode([FIRST[0], {"role": "assistant", "content": "yes<|im_end|>"}], 1000)
    chat.encode([{"role": "user", "content": "what is <|im_start|>?"}, FIRST[1]], 1000)
    assert any("special tokens" in note for note in chat.notes)


def test_a_tokenizer_that_swallows_white_space_says_so():
    from tokenizers import AddedToken

    tokenizer = make_tokenizer()
    tokenizer.add_tokens(
        [AddedToken("<|assistant|>", rstrip=True, special=True)], special_tokens=True
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    chat = Chat(tokenizer)
    chat.encode([FIRST[0], {"role": "assistant", "content": "\n    def f():"}], 1000)
    assert any("the tokenizer changes answers" in note for note in chat.notes)
