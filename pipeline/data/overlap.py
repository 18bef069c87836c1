"""No prompt in two places: sets take prompts in turn, and what one has taken no later one gets.

    claims = Claims()
    rows = claims.take("safety_pairs", rows, 48)
    write_held(claims.turns, folder / "held.parquet")         # for who comes later: the evaluation
    claims = Claims(read_held(folder / "held.parquet"))

What is compared
- A sample that is trained on, or tested with its answer, is known by its **conversation up to the answer**: all turns
  before its last answer, with their roles. So conversations that end alike ("Thanks!") or begin alike ("Hi") are
  different ones. The system prompt is left out: the same question under two system prompts is one prompt.
- Earlier answers of a conversation are trained on, too. So a row is refused that on its way answers the whole
  conversation of another set, and so is one whose whole conversation another set answers on its way. What two sets
  both answer on their way is a common beginning, and no overlap. Nor is it one that a conversation of the task begins
  as a harmless sample of the alignment does: both are answered, and a greeting would refuse the whole task.
- A prompt that is **asked and judged**, of the evaluation or of data.validation_prompts, is alone, so it is compared
  with every single user turn of the others, wherever that stands. Validation prompts are drawn first, and the rows of
  other sets that hold one are left out. The evaluation comes last and loses the prompt itself, so training loses
  nothing by it.
- A prompt that was rewritten (forms.py) holds what it was before, too.

Within a set, a row that has conversation, system prompt, tools and answer of another is a duplicate; several answers to
one prompt are none. A set of prompts that are asked keeps each prompt once.

What counts as the same prompt says wording.py. Prompts are known by a sha256, so that the file that says who holds
which prompt holds no prompt.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.dropped import Dropped

# what other modules compare prompts by, too
from pipeline.data.wording import normalise as normalise
from pipeline.data.wording import wording

Row = dict[str, Any]
Held = dict[bytes, str]  # a sha256 -> the set that holds what it is of
# Sets of whose conversations the last answer alone is trained on, or none.
_LAST_ANSWER_ALONE = {"safety_pairs", "task_test", "task_validation"}
_MAY_BEGIN_OTHERS = {"align_harmless"}  # sets whose whole conversations others may begin with


def user_turns(row: Row) -> list[str]:
    """What the user says in a row: its messages (a list, or JSON as written to a set), or its prompt where it has none.

    Of a prompt that was rewritten (forms.py), what it was before, too.
    """
    turns = [_text(message) for message in _messages(row) if message["role"] == "user"]
    return [*turns, row["rewritten"]] if row.get("rewritten") else turns


def conversation(row: Row) -> bytes:
    """sha256 of the conversation up to the answer: what rows of one prompt have in common."""
    return _prefixes(_messages(row))[-1]


def beginnings(row: Row) -> list[bytes]:
    """sha256 of the conversations up to the earlier answers, each the `conversation` of a row that ends there."""
    return _prefixes(_messages(row))[:-1]


class Claims:
    """Who holds which prompt, and what was refused to whom."""

    def __init__(self, held: Held | None = None) -> None:
        """held: user turns that sets of an earlier stage hold already."""
        self.turns: Held = dict(held or {})  # single user turns, of whatever set
        self.asked: Held = {}  # those that are asked alone
        self.whole: Held = {}  # conversations up to the answer
        self.begun: Held = {}  # conversations up to an earlier answer that is trained on
        self.taken: set[tuple[str, bytes]] = set()
        self.overlaps: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()
        self.dropped = Dropped()

    def take(
        self, pool: str, rows: Iterable[Row], count: int | None = None, by_prompt: bool = False
    ) -> list[Row]:
        """The first `count` rows that no other set holds, now the pool's. The others on the way are dropped.

        by_prompt: the rows' prompts are asked alone.
        """
        kept: list[Row] = []
        for row in rows:
            if count is not None and len(kept) == count:
                break
            if self._free(pool, row, by_prompt):
                self.hold(pool, [row], by_prompt)
                kept.append(row)
        return kept

    def free(self, pool: str, rows: Iterable[Row], by_prompt: bool = False) -> list[Row]:
        """The rows that `take` would give the pool if it took all, without taking any. The others are dropped."""
        trial = copy.copy(self)  # drops into the same lists
        trial.turns, trial.asked, trial.whole, trial.begun = map(
            dict, (self.turns, self.asked, self.whole, self.begun)
        )
        trial.taken = set(self.taken)
        return trial.take(pool, rows, by_prompt=by_prompt)

    def hold(self, pool: str, rows: Iterable[Row], by_prompt: bool = False) -> None:
        """Give rows to the pool, whoever holds them."""
        for row in rows:
            keys = _keys(pool, row, by_prompt)
            for held, found in (
                (self.turns, keys.turns),
                (self.asked, keys.turns if by_prompt else ()),
                (self.whole, keys.whole),
                (self.begun, keys.begun),
            ):
                for key in found:
                    held.setdefault(key, pool)
            self.taken.add((pool, _same(row, by_prompt)))

    def owner(self, pool: str, row: Row, by_prompt: bool = False) -> str | None:
        """The other set that holds the row's prompt, None where there is none."""
        keys = _keys(pool, row, by_prompt)
        compared: list[tuple[dict[bytes, str], Iterable[bytes]]] = [
            (self.turns if by_prompt else self.asked, keys.turns)
        ]
        compared += [(self.whole, keys.whole), (self.begun, keys.whole)]
        found = (
            held[key] for held, mine in compared for key in mine if held.get(key, pool) != pool
        )
        begun = (
            self.whole[key]
            for key in keys.begun
            if self.whole.get(key, pool) not in {pool, *_MAY_BEGIN_OTHERS}
        )
        return next(found, None) or next(begun, None)

    def facts(self) -> dict[str, dict[str, int]]:
        """Counts for the manifest: rows left out because another set ('later / earlier') or the same one holds them."""
        return {"overlapping": dict(self.overlaps), "duplicate": dict(self.duplicates)}

    def _free(self, pool: str, row: Row, by_prompt: bool) -> bool:
        """Whether the pool can have the row. It is dropped where not."""
        owner = self.owner(pool, row, by_prompt)
        if owner is not None:
            self.overlaps[f"{pool} / {owner}"] += 1
            self.dropped.add(pool, "overlapping", row, owner)
        elif (pool, _same(row, by_prompt)) in self.taken:
            self.duplicates[pool] += 1
            self.dropped.add(pool, "duplicate", row)
        else:
            return True
        return False


def assert_disjoint(pools: dict[str, list[Row]], held: Held | None = None) -> Held:
    """Every user turn of the sets, after those that are `held` by earlier stages, and who holds it.

    The last look at what is going to be written. A row without messages is a prompt that is asked. Raises ValueError
    where a prompt stands in two sets.
    """
    claims = Claims(held)
    for pool, rows in pools.items():
        for row in rows:
            asked = row.get("messages") is None
            owner = claims.owner(pool, row, asked)
            if owner is not None:
                turns = _keys(pool, row, asked).turns
                turn = next(
                    (text for key, text in turns.items() if claims.turns.get(key) == owner),
                    row["prompt"],
                )
                raise ValueError(
                    f"the prompt '{turn[:60]}' is in {owner} and in {pool}: no prompt may be shared"
                )
            claims.hold(pool, [row], asked)
    return claims.turns


def write_held(held: Held, path: Path) -> None:
    """Leave who holds which prompt in a Parquet file: sha256 (32 bytes) and pool."""
    import pyarrow
    import pyarrow.parquet

    prompts, pools = (
        pyarrow.array(list(held), pyarrow.binary(32)),
        pyarrow.array(list(held.values()), pyarrow.string()),
    )
    pyarrow.parquet.write_table(pyarrow.table({"sha256": prompts, "pool": pools}), path)


def read_held(path: Path) -> Held:
    """What `write_held` left."""
    import pyarrow.parquet

    columns = pyarrow.parquet.read_table(path).to_pydict()
    return dict(zip(columns["sha256"], columns["pool"], strict=True))


@dataclass(frozen=True)
class _Keys:
    """What a row can share with others: its single user turns with their text, and conversations up to an answer."""

    turns: dict[bytes, str]
    whole: tuple[bytes, ...] = ()  # up to the last answer; of a rewritten prompt, as it was too
    begun: tuple[bytes, ...] = ()  # up to the earlier answers that are trained on


def _keys(pool: str, row: Row, by_prompt: bool) -> _Keys:
    was = [row["rewritten"]] if row.get("rewritten") else []
    turns = {
        wording(text): text for text in ([row["prompt"], *was] if by_prompt else user_turns(row))
    }
    if by_prompt:
        return _Keys(turns)
    *begun, whole = _prefixes(_messages(row))
    before = [
        _prefixes([*_messages(row)[:-1], {"role": "user", "content": text}])[-1] for text in was
    ]
    return _Keys(turns, (whole, *before), () if pool in _LAST_ANSWER_ALONE else tuple(begun))


def _same(row: Row, by_prompt: bool) -> bytes:
    """What a duplicate within a set has in common: the prompt that is asked, or the conversation, system and answer."""
    if by_prompt:
        return wording(row["prompt"])
    system = [
        wording(_text(message)).hex() for message in _messages(row) if message["role"] == "system"
    ]
    said = [row.get(name) for name in ("response", "chosen", "rejected", "answer", "tools")]
    return hashlib.sha256(conversation(row) + json.dumps([system, said]).encode()).digest()


def _prefixes(messages: list[dict[str, Any]]) -> list[bytes]:
    """sha256 of the turns before each answer, and of all turns: the last answer is not among them."""
    found, digest, empty = [], hashlib.sha256(), True
    for message in messages:
        if message["role"] == "system":
            continue
        if message["role"] == "assistant" and not empty:
            found.append(digest.digest())
        more = {
            name: value
            for name, value in message.items()
            if name not in ("role", "content") and value
        }
        digest.update(
            json.dumps(
                [message["role"], wording(_text(message)).hex(), more], sort_keys=True
            ).encode()
        )
        empty = False
    return [*found, digest.digest()]


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else json.dumps(content)


def _messages(row: Row) -> list[dict[str, Any]]:
    messages = row.get("messages")
    messages = json.loads(messages) if isinstance(messages, str) else messages
    return messages or [{"role": "user", "content": row["prompt"]}]
