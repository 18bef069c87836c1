"""The form of a prompt: question, imperative or other; sets with as many of one as of the other.

    form("How do I bake bread?")                                    # "question"
    rewritten("How do I bake bread?", "imperative", "train")        # "Explain how to bake bread."

A model that is trained on refusals to imperatives and on answers to questions learns the form, and a test whose
harmless prompts are all questions does not see it (issue 14). So prepare takes both forms alike into every set that
has a role, and rewrites what a source has in one form only. Three families of templates do it, one for what is
trained on, one for validation and one for the test: no template stands on two sides.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal

Form = Literal["question", "imperative", "other"]
Family = Literal["train", "validation", "test"]
Row = dict[str, Any]
FORMS: tuple[Form, ...] = ("question", "imperative", "other")
# Share by which the forms of a set may differ from its counterpart's before it is said.
TOLERANCE = 0.2

_ASKING = {
    "what", "what's", "whats", "who", "who's", "whom", "whose", "which", "when", "where", "where's", "why", "how",
    "how's", "can", "could", "would", "should", "shall", "will", "may", "might", "must", "is", "are", "am", "was",
    "were", "does", "did", "isn't", "aren't", "wasn't", "doesn't", "didn't", "can't", "couldn't", "won't", "wouldn't",
    "shouldn't", "has", "had", "hasn't", "haven't",
}  # fmt: skip
_AUXILIARIES_OR_VERBS = {"do", "have", "don't"}  # "Do you know ...?" and "Do it like this"
_PRONOUNS = {"i", "you", "we", "they", "he", "she", "it", "people", "there"}
_PRELUDE = re.compile(
    r"^(?:(?:please|kindly|hi|hello|hey|ok|okay|so|well|now|first|then|and|but|also|quick question|hypothetically"
    r"|just|quickly|briefly|carefully|slowly|step by step)\b[\s,.:!;-]*"
    r"|(?:as|in|for|if|given|since|suppose|while|when|using)\b[^,.:;?!\n]{1,80},\s*)+",
    re.I,
)
# First words that are imperatives in the sources of this project and in common instruction sets.
_VERBS = frozenset(
    """
    abuse accept act add address adjust advise agree aid allow analyse analyze announce answer apply argue arm arrange
    ask assassinate assess assign assist assume attach attack automate avoid bake be beat begin blackmail blend blow
    boil bomb book brainstorm break breed bribe bring bug build bully burn bury buy bypass calculate call capitalise
    capitalize caption categorise categorize change characterise characterize cheat check choose cite claim clarify
    classify clean click code coerce collect combine come commit compare compile complete compose compute conclude
    conduct confirm connect consider construct continue contrast convert convince cook copy correct count counterfeit
    crack craft crash create critique customise cut deduce define delete deliver demonstrate derive describe design
    destroy detail detect determine develop devise diagnose differentiate direct disable discuss disregard disrupt
    distribute divide document download dox draft draw edit educate elaborate eliminate embed emulate encode encourage
    end engage enhance enter enumerate escape estimate evade evaluate examine execute expand explain exploit explore
    expose express extract fabricate fake fetch figure fill find fix fold follow forge form format formulate frame
    gather generate get give go grade greet group guess guide hack harass help hide highlight hire hypothesize
    identify ignore illustrate imagine implement improve include incorporate increase indicate infect infer inform
    insert inspect install instruct insult interfere interpret interview introduce invent invest invite join justify
    keep kidnap kill label launder lead leak leave let let's list listen locate log look lure make manipulate map mark
    match measure mention merge misuse mix mock modify motivate move murder name narrate negotiate note obtain offer
    omit open optimise optimize order organise organize outline output override paint paraphrase parse perform
    persuade phish pick picture place plan plant play point poison post practice practise predict prepare present
    pretend prevent print prioritise prioritize produce program promote pronounce proofread propose prove provide
    publish put quote raise rank rap rate read reason recite recommend record recruit redesign reduce refactor refine
    reformat rehearse release remember remind remove rename reorder repeat rephrase replace reply report request
    research resolve respond restate retell return reveal reverse review revise rewrite roast rob role-play roleplay
    run sabotage say scam scan schedule search seduce select sell send separate sequence set share shoot shorten show
    simplify simulate sing sketch smuggle solve sort speak specify spell split spoof spread spy stab stalk start state
    steal stop structure substitute suggest sum summarise summarize supply support swap tailor take talk tamper teach
    tell test think threaten torture trace track trade traffic train transcribe transform translate transport trick
    troubleshoot try turn type update upload use verify visualise visualize wait walk watch weigh wish word work write
    """.split()
)
# Requests for something to be done rather than written: "How do I build a boat?" asks for the same as "Build a boat",
# and "How do I write a poem?" for something else than "Write a poem".
_DOING = frozenset(
    """
    arrange assemble attack bake beat become begin blackmail blow bomb boil breed bribe build burn bury buy bypass
    cheat clean coerce collect cook counterfeit crack crash cut destroy develop disable disrupt distribute download
    enter escape evade exploit fake fix forge frame get grow hack harass hide hire infect install interfere invest
    kidnap kill launder leak lure make manipulate modify murder obtain organise organize poison prevent produce raise
    recruit reduce remove repair rob sabotage scam seduce sell set shoot smuggle spoof spread stab stalk start steal
    stop tamper threaten torture trade traffic train transport trick upload use
    """.split()
)
# What nobody asks as a question.
_NEVER_ASKED = frozenset(
    "let let's imagine be go pretend suppose ignore assume act play guess do don't have".split()
)
# {} takes the request without its first capital and its last stop; "ways" for what is done, "please" for what is
# written.
_TO_QUESTION: dict[Family, dict[str, tuple[str, ...]]] = {
    "train": {
        "ways": ("How do I {}?", "What is the best way to {}?", "How do people {}?"),
        "please": ("Can you {}?", "Could you please {}?"),
    },
    "validation": {
        "ways": ("How can somebody {}?", "What would I have to do to {}?"),
        "please": ("Are you able to {}?", "May I ask you to {}?"),
    },
    "test": {
        "ways": ("How can I {}?", "What does it take to {}?", "How does one {}?"),
        "please": ("Would you {}?", "Will you please {}?"),
    },
}
_TO_IMPERATIVE: dict[Family, dict[str, tuple[str, ...]]] = {
    "train": {
        "how": ("Explain how to {}.", "Give me instructions to {}."),
        "you": ("Please {}.",),
        "any": ("Answer this question: {}", "Help me with this question: {}"),
    },
    "validation": {
        "how": ("Describe the steps to {}.",),
        "you": ("Kindly {}.",),
        "any": ("Give me a reply to this question: {}",),
    },
    "test": {
        "how": ("Tell me how to {}.", "Show me a way to {}."),
        "you": ("{}.",),
        "any": ("Find an answer to this: {}", "Respond to the following: {}"),
    },
}
TEMPLATES = (_TO_QUESTION, _TO_IMPERATIVE)
# What decides which prompts are taken and how they read: part of the names of prepared folders.
TEXTS = (*TEMPLATES, sorted(_VERBS), sorted(_ASKING), sorted(_DOING), sorted(_NEVER_ASKED))
_HOW_TO = re.compile(
    r"^(?:how (?:do|can|could|would|should|might) i|how (?:can|could) (?:you|we)|how to"
    r"|what(?:'s| is| are)? (?:the |a )?(?:best |easiest |fastest |good )?"
    r"ways? (?:for me )?to)\s+"
    r"(?P<request>(?!(?:feel|know|have|think|become|help you)\b)"
    r"(?:(?!, (?:and )?(?:what|why|how|when|where)\b).)+?)[?.!\s]*$",
    re.I | re.S,
)
_ASKED_FOR = re.compile(
    r"^(?:please )?(?:(?:help|assist|guide) (?:me (?:to |with |in |on how to )?|to |with )"
    r"|(?:tell|show|teach) me (?:how (?:to|i can|i could) )?|explain how to )",
    re.I,
)
_YOU = re.compile(
    r"^(?:can|could|would|will) you (?:please |kindly )?"
    r"(?P<request>(?!(?:have|be|not|ever|rather|like|mind|prefer|know|think|feel|believe|swim|marry)\b).+?)[?.!\s]*$",
    re.I | re.S,
)


def form(prompt: str) -> Form:
    """Whether a prompt is a question, an imperative, or other (statements, fragments, languages other than English).

    The first sentence decides where it is one of the first two; else the last that is, for what comes before it is
    context.
    """
    found = _form_of_sentence(prompt)
    if found == "other":
        sentences = re.split(r"(?<=[.!?:])\s+|\n+", prompt.strip())
        found = next(
            (kind for text in reversed(sentences) if (kind := _form_of_sentence(text)) != "other"),
            "other",
        )
    return found


def _form_of_sentence(text: str) -> Form:
    bare = _bare(text)
    words = re.findall(r"[a-z][a-z'-]*", bare[:80].lower().replace("\u2019", "'"))
    if words and bare[:1].isascii():
        first, second = words[0], words[1] if len(words) > 1 else ""
        asked = bare.rstrip().endswith("?")  # "Do the birds sing?" and "Do the dishes"
        if first in _ASKING or (first in _AUXILIARIES_OR_VERBS and (asked or second in _PRONOUNS)):
            return "question"
        if first in _VERBS or first in _AUXILIARIES_OR_VERBS:
            return "imperative"
    return "question" if bare.rstrip().endswith(("?", "\uff1f")) else "other"


def rewritten(prompt: str, wanted: Form, family: Family) -> str | None:
    """The same request in the wanted form, by a template of the family; None where no template fits.

    The same for the same prompt.
    """
    if wanted == "question" and form(prompt) == "imperative":
        return _as_question(prompt, family)
    if wanted == "imperative" and form(prompt) == "question":
        return _as_imperative(prompt, family)
    return None


def request(prompt: str) -> str | None:
    """What is asked for, as it stands after "I can help you": "How do I bake bread?" -> "bake bread".

    None where that cannot be told: the words of a question that is no "how to" do not fit there.
    """
    text = _bare(prompt.strip().split("\n")[0]).strip()
    found = _HOW_TO.match(text) or _YOU.match(text)
    if found:
        text = found["request"]
    elif form(text) == "question":
        return None
    text = _ASKED_FOR.sub("", text).rstrip(".!?, ")
    return text[:1].lower() + text[1:] if text[:1].isupper() and not text[:2].isupper() else text


def alternating(rows: Sequence[Row], family: Family) -> Iterator[Row]:
    """The rows (prompt, messages, response), questions and imperatives in turn: what is taken first is half and half.

    Where one form is used up, rows of the other are rewritten in every second place by the family's templates; their
    `rewritten` is then the prompt as it was. A row with a response of its own, or with turns before its prompt, is
    never rewritten. Rows of neither form come last.
    """
    waiting: dict[Form, deque[Row]] = {name: deque() for name in FORMS}
    # seen: they cannot be rewritten
    fixed: dict[Form, deque[Row]] = {name: deque() for name in FORMS}
    for row in rows:
        waiting[form(row["prompt"])].append(row)
    turn: tuple[Form, Form] = ("question", "imperative")
    while any(rows_left[name] for rows_left in (waiting, fixed) for name in turn):
        wanted, spare = turn
        own = fixed[wanted] or waiting[wanted]
        changed = None
        while not own and changed is None and waiting[spare]:
            row = waiting[spare].popleft()
            changed = _rewritten_row(row, wanted, family)
            if changed is None:
                fixed[spare].append(row)
        yield changed or (own or fixed[spare]).popleft()
        turn = (spare, wanted)
    yield from waiting["other"]


def count_forms(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows have which form, and how many of them were rewritten."""
    found = Counter(form(row["prompt"]) for row in rows)
    changed = sum(bool(row.get("rewritten")) for row in rows)
    return {name: found[name] for name in FORMS} | {"rewritten": changed}


def apart(one: dict[str, int], other: dict[str, int]) -> float:
    """The greatest difference between two counts in the share of one form, in [0, 1]; 0 where one is of nothing."""
    sizes = [sum(counts[name] for name in FORMS) for counts in (one, other)]
    if 0 in sizes:
        return 0.0
    return max(abs(one[name] / sizes[0] - other[name] / sizes[1]) for name in FORMS)


def _rewritten_row(row: Row, wanted: Form, family: Family) -> Row | None:
    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    single = (
        sum(message["role"] == "user" for message in messages) == 1
        and messages[-1]["role"] == "user"
    )
    if not single or row.get("response") or row.get("chosen") or row.get("rejected"):
        return None
    prompt = rewritten(row["prompt"], wanted, family)
    if prompt is None:
        return None
    return {
        **row,
        "prompt": prompt,
        "messages": [*messages[:-1], {"role": "user", "content": prompt}],
        "rewritten": row["prompt"],
    }


def _as_question(prompt: str, family: Family) -> str | None:
    text = _bare(prompt).strip()
    if "\n" in text or re.search(r"[.!?:]\s+\S", text):  # more than one sentence
        return None
    text = text.rstrip(".!?: ")
    text = text[:1].lower() + text[1:]
    first = text.split()[0]
    if first in _NEVER_ASKED:
        return None
    kind = "ways" if first in _DOING else "please"
    return _template(prompt, _TO_QUESTION[family][kind]).format(text)


def _as_imperative(prompt: str, family: Family) -> str | None:
    text = _bare(prompt).strip()
    # of several sentences a template would ask for the first alone
    whole = not re.search(r"[.!?]\s+\S", text)
    for kind, pattern in (("how", _HOW_TO), ("you", _YOU)):
        found = pattern.match(text) if whole else None
        if found:
            made = _template(prompt, _TO_IMPERATIVE[family][kind]).format(found["request"])
            return made[:1].upper() + made[1:]
    return _template(prompt, _TO_IMPERATIVE[family]["any"]).format(prompt.strip())


def _template(prompt: str, templates: tuple[str, ...]) -> str:
    return templates[
        int.from_bytes(hashlib.sha256(f"form\0{prompt}".encode()).digest()[:8], "big")
        % len(templates)
    ]


def _bare(prompt: str) -> str:
    """Without greeting, politeness, quotes and list marks before the first word."""
    prompt = re.sub(
        r"^\W*(?:task|question|instruction|prompt|request)\s*:\W*", "", prompt, flags=re.I
    )
    text = re.sub(r"^[\s\"'“”‘’*#>_`\-–•\d.)(\]]+(?=\S)", "", prompt)
    return _PRELUDE.sub("", text)
