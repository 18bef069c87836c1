"""The prepare stage's training sets: sources -> chat messages -> tokens and labels, pairs, validation prompts.

    sap prepare launch/recipes/demo.yaml

Writes one Parquet file a set. Splits and mixtures depend on data.seed and on the prompts themselves, never on the order
of rows, and data.seed decides what is drawn, not what can be: rows that cannot be used are left out before. No prompt
is in two sets (overlap.py); earlier ones win: validation, safety pairs, harmful mix, alignment, task. The rows of the
task that are left are split by conversation (splits.py). What is left out is counted, said and listed (dropped.py). The
evaluation's prompts come after all of these and have a folder of their own (prompts.py), which reads in held.parquet
who holds which prompt. Sets that teach or test refusing hold as many questions as imperatives (forms.py, data.forms).
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.data import contrastive, forms
from pipeline.data.chat import IGNORE, Chat, Encoded
from pipeline.data.dropped import LISTED, Reason
from pipeline.data.malformed import Bad, Skipped
from pipeline.data.messages import Message
from pipeline.data.overlap import Claims, assert_disjoint, write_held
from pipeline.data.rows import Row, ordered_rows, task_rows
from pipeline.data.sets import HELD, prompt_rows, tools_as_json, write_set
from pipeline.data.splits import check_split, split
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.redaction import redact
from pipeline.recipe.sections import SourceSection

_VALIDATION_PAIRS = 32  # harmful prompts whose opening's loss is followed during training
_VALIDATION_PROMPTS = 150
_SECONDS = 5  # between two lines of progress


def prepare(recipe: Recipe, chat: Chat, folder: Path) -> dict[str, Any]:
    """Write every set below `folder`; returns the counts for the manifest.

    ValueError where a split gets no usable sample.
    """
    return _Preparation(recipe, chat).write(folder)


class _Preparation:
    def __init__(self, recipe: Recipe, chat: Chat):
        self.recipe, self.data, self.chat = recipe, recipe.data, chat
        self.claims = Claims()
        self.skipped = Skipped()
        self.counts: dict[str, dict[str, int]] = {}
        # field -> what its rendering does otherwise than the chat template
        self.notes: dict[str, Counter[str]] = {}

    def write(self, folder: Path) -> dict[str, Any]:
        data, sets = self.data, {}
        if data.validation_prompts is not None:
            field, source = "data.validation_prompts", data.validation_prompts
            rows = self._by_form(field, self._ordered(field, source), "validation", by_prompt=True)
            taken = self.claims.take(field, rows, _VALIDATION_PROMPTS, by_prompt=True)
            sets["validation_prompts"] = prompt_rows(field, source, taken)
            numbered = zip(
                sets["validation_prompts"], [row.get("row") for row in taken], strict=True
            )
            opened = [
                self._with_opening(
                    {**row, "row": number}, contrastive.VALIDATION_OPENINGS, "harmful"
                )
                for row, number in list(numbered)[:_VALIDATION_PAIRS]
            ]
            sets["harmful_validation"] = self._encoded("data.validation_prompts", opened)
        sets["safety_pairs"] = self._pairs()
        task = task_rows(data, self.skipped)
        check_split(data, len(task))
        kept = len(task) - data.validation_samples - data.test_samples
        harmful = self._harmful(kept)
        if self.recipe.align.enabled:
            sets["align"] = self._alignment()
        sets |= self._task(task)
        wanted = _share(data.harmful_fraction, len(sets["task_train"]))
        sets["task_train"] = _interleave(sets["task_train"], _repeated(harmful, wanted), data.seed)
        # harmful_validation opens the validation prompts
        held = assert_disjoint(
            {name: rows for name, rows in _by_kind(sets).items() if name != "harmful_validation"}
        )
        write_held(held | self.claims.turns, folder / HELD)
        self.claims.dropped.write(folder / LISTED)
        for row in sets["safety_pairs"]:
            del row["messages"]  # were there for the check alone
        for name, rows in sets.items():
            write_set(folder / f"{name}.parquet", rows)
        self.skipped.write(folder)
        for sentence in self.skipped.sentences():
            print(sentence, file=sys.stderr, flush=True)
        return {
            "skipped": self.skipped.facts(),
            "notes": self.skipped.notes,
            "without_reasoning": self.skipped.thoughts,
            "samples": {name: len(rows) for name, rows in sets.items()},
            "forms": {
                name: forms.count_forms(rows) for name, rows in self._with_role(sets).items()
            },
            "encoding": self.counts,
            "template": self._tell_notes(),
            **self.claims.facts(),
            "harmful_in_training": sum(row["kind"] == "harmful" for row in sets["task_train"]),
        }

    def _with_role(self, sets: dict[str, list[Row]]) -> dict[str, list[Row]]:
        """The sets by the recipe's field that fills them, as far as the form of their prompts matters."""

        def by_kind(name: str, kind: str) -> list[Row]:
            return [row for row in sets.get(name, []) if row["kind"] == kind]

        found = {
            "data.validation_prompts": sets.get("validation_prompts", []),
            "data.safety": sets["safety_pairs"],
            "data.harmful": by_kind("task_train", "harmful"),
            "data.refusals": by_kind("align", "refusal"),
            "data.harmless": by_kind("align", "harmless"),
            "data.task": by_kind("task_train", "task"),
        }
        return {field: rows for field, rows in found.items() if rows}

    def _by_form(
        self, field: str, rows: list[Row], family: forms.Family, by_prompt: bool = False
    ) -> Iterable[Row]:
        """The rows that no other set holds, questions and imperatives in turn; as they come where data.forms says so.

        All that cannot be used are dropped, however few are then drawn: their number depends on no seed.
        """
        usable = self.claims.free(field, rows, by_prompt)
        return usable if self.data.forms == "as_they_are" else forms.alternating(usable, family)

    def _ordered(self, field: str, source: SourceSection, pairs: bool = False) -> list[Row]:
        return ordered_rows(field, source, self.data.seed, pairs=pairs, skipped=self.skipped)

    def _pairs(self) -> list[Row]:
        source = self.data.safety
        pairs: list[Row] = []
        counts = self.counts.setdefault("data.safety", {"truncated": 0, "dropped": 0})
        found = self._ordered("data.safety", source, pairs=True)
        for row in found:
            if row["chosen"] is None:
                self._drop("data.safety", "no_common_prompt", row)
        paired = [row for row in found if row["chosen"] is not None]
        for row in self._by_form("safety_pairs", paired, "train"):
            if len(pairs) == self.data.safety_pairs:
                break
            texts = {
                "chosen": row["chosen"] or contrastive.refusal(row["prompt"]),
                "rejected": row["rejected"]
                or contrastive.opening(row["prompt"], contrastive.SAFETY_OPENINGS),
            }
            sides = {
                side: self._encode(
                    "data.safety",
                    row,
                    _said(text),
                    self.data.safety_max_length,
                    last_turn_only=True,
                )
                for side, text in texts.items()
            }
            if None in sides.values():
                continue
            encoded = {side: samples[0] for side, samples in sides.items() if samples}
            if len(encoded) < 2:
                self._drop("data.safety", "too_long", row, "data.safety_max_length")
                continue
            if _alike(*encoded.values()):
                self._drop("data.safety", "no_difference", row)
                continue
            if not self.claims.take("safety_pairs", [row]):
                continue
            counts["truncated"] += sum(item.truncated for item in encoded.values())
            tokens = {
                f"{side}_{kind}": getattr(item, kind)
                for side, item in encoded.items()
                for kind in ("input_ids", "labels")
            }
            pairs.append(
                {
                    "id": f"safety-{len(pairs)}",
                    "prompt": row["prompt"],
                    "messages": row["messages"],
                    "rewritten": row.get("rewritten"),
                    **texts,
                    **tokens,
                }
            )
        self._say_fewer("data.safety_pairs", source, len(pairs), self.data.safety_pairs)
        if len(pairs) < 2:
            self.claims.dropped.say()
            raise ValueError(
                f"data.safety: {source.source} yields {len(pairs)} usable pairs "
                f"(data.safety_max_length {self.data.safety_max_length}): at least 2 are needed"
            )
        return pairs

    def _harmful(self, task_samples: int) -> list[Row]:
        source, wanted = self.data.harmful, _share(self.data.harmful_fraction, task_samples)
        if source is None or (wanted == 0 and source.limit is None):
            return []
        # With a limit the whole pool is claimed whatever the fraction,
        # so that what is left for other sets does not depend on it.
        found = self._by_form("harmful_mix", self._ordered("data.harmful", source), "train")
        self.counts["data.harmful"] = {"truncated": 0, "dropped": 0}

        def samples(row: Row) -> list[Row]:
            opened = (
                row
                if row["response"]
                else self._with_opening(row, contrastive.MIX_OPENINGS, "harmful")
            )
            return self._samples("data.harmful", opened, "harmful")

        pool = self._drawn(
            "harmful_mix", found, wanted if source.limit is None else source.limit, samples
        )
        encoded = [sample for row in pool[:wanted] for sample in row]
        if not encoded and wanted:
            raise ValueError(self._none_left("data.harmful", source))
        self.counts["data.harmful"]["different"] = len(encoded)
        if encoded and len(encoded) < wanted:
            print(
                f"data.harmful_fraction: {len(encoded)} different samples of {redact(source.source)} make up {wanted}, "
                "so some are used more than once",
                file=sys.stderr,
                flush=True,
            )
        return encoded

    def _task(self, rows: list[Row]) -> dict[str, list[Row]]:
        """The task's three sets, of the rows that no earlier set holds and that have something to learn."""
        usable = self.claims.free("data.task", rows)
        samples = {
            id(row): self._samples("data.task", row, "task") for row in _shown("data.task", usable)
        }
        left = [row for row in usable if samples[id(row)]]
        self.claims.dropped.say()  # also where too few are left
        if not usable:
            source = self.data.task.source
            raise ValueError(
                f"data.task: every prompt of {source} is held by an earlier set: use other data"
            )
        if not left:
            raise ValueError(self._none_fits("data.task"))
        splits = split(self.data, left)
        for note in splits.notes:
            print(note, file=sys.stderr, flush=True)
        parts = {
            "task_test": splits.test,
            "task_validation": splits.validation,
            "task_train": splits.train,
        }
        for name, taken in parts.items():
            self.claims.hold(name, taken)
        # Of a conversation that takes several sequences the last answer alone is tested: each is asked once.
        whole = {name: [samples[id(row)][-1] for row in taken] for name, taken in parts.items()}
        return whole | {
            "task_train": [sample for row in splits.train for sample in samples[id(row)]]
        }

    def _drawn(
        self, pool: str, rows: Iterable[Row], count: int, samples: Callable[[Row], list[Row]]
    ) -> list[list[Row]]:
        """Samples of the first `count` rows that have any and that no other set holds, now the pool's, row by row.

        What cannot be used holds no prompt, and takes no place among the rows that are drawn.
        """
        drawn: list[list[Row]] = []
        for row in rows:
            if len(drawn) == count:
                break
            found = samples(row)
            if found and self.claims.take(pool, [row]):
                drawn.append(found)
        return drawn

    def _none_left(self, field: str, source: SourceSection) -> str:
        """The sentence for a source of which nothing is left, after saying why its rows were left out."""
        self.claims.dropped.say()
        return f"{field}: {source.source} leaves no prompt that can be used and that no earlier set holds"

    def _say_fewer(self, field: str, source: SourceSection, found: int, asked: int) -> None:
        if found < asked:
            print(
                f"{field}: {found} instead of {asked}, for {redact(source.source)} has no more that can be used",
                file=sys.stderr,
                flush=True,
            )

    def _drop(
        self, field: str, reason: Reason, row: Row, other: str = "", tokens: int | None = None
    ) -> None:
        counts = self.counts.setdefault(field, {"truncated": 0, "dropped": 0})
        counts["dropped"] += 1
        if field == "align":
            field = "data.refusals" if row["kind"] == "refusal" else "data.harmless"
        self.claims.dropped.add(field, reason, row, other, tokens)

    def _alignment(self) -> list[Row]:
        """Refusals and answers as samples, then the harmless prompts that the model itself will answer."""
        data = self.data
        kinds: dict[str, list[list[Row]]] = {}
        for kind, field, source, count in (
            ("refusal", "data.refusals", data.refusals, data.refusal_samples),
            ("harmless", "data.harmless", data.harmless, data.harmless_samples),
        ):
            assert source is not None, "a recipe that aligns names both (AlignSection)"
            pool = "align_refusals" if kind == "refusal" else "align_harmless"
            found = self._by_form(pool, self._ordered(field, source), "train")
            kinds[kind] = self._drawn(
                pool, found, count, functools.partial(self._aligning, kind=kind)
            )
            self._say_fewer(f"data.{kind}_samples", source, len(kinds[kind]), count)
            if not kinds[kind]:
                raise ValueError(self._none_left(field, source))
        rows = [sample for drawn in (*kinds["refusal"], *kinds["harmless"]) for sample in drawn]
        answered = [row for row in rows if row["response"] is not None]
        numbered = [
            row | {"id": f"harmless-open-{number}"}
            for number, (row, *_) in enumerate(kinds["harmless"])
            if row["response"] is None
        ]
        return answered + numbered

    def _aligning(self, row: Row, kind: str) -> list[Row]:
        """A row of the alignment as samples. A harmless prompt without an answer is one that the model will answer."""
        row = {**row, "kind": kind}
        if kind == "refusal":
            response = row["response"] or contrastive.refusal(row["prompt"])
            return self._samples(
                "align", {**row, "response": response, "given": self._given(row)}, kind
            )
        if row["response"]:
            return self._samples("align", row, kind)
        known = {name: row.get(name) for name in ("kind", "prompt", "rewritten")}
        messages = json.dumps(row["messages"])
        unanswered: dict[str, Any] = {
            "response": None,
            "given": self._given(row),
            "messages": messages,
            "input_ids": [],
            "labels": [],
        }
        return [{"id": "harmless-open", **known, **unanswered, **tools_as_json(row)}]

    def _encode(
        self, field: str, row: Row, answer: Message, max_length: int, **how: Any
    ) -> list[Encoded] | None:
        """The row with this answer as sequences; what is done otherwise than the template does is noted for the field.

        None where it cannot be rendered, and its source lets malformed rows be left out.
        """
        try:
            found = self.chat.encode(
                [*row["messages"], answer], max_length, tools=row.get("tools"), **how
            )
        except ValueError as error:
            name = {"refusal": "data.refusals", "harmless": "data.harmless"}.get(
                row.get("kind", ""), field
            )
            source, place = getattr(self.data, name.removeprefix("data.")), row.get("row")
            if place is None or source.max_bad_rows == 0:
                met = place or f"the prompt {row['prompt'][:60]!r}"
                raise ValueError(
                    f"{name}: {error} (met in {met}; {name}.max_bad_rows leaves such rows out)"
                ) from None
            self.skipped.add(name, source, Bad(place, "cannot be rendered", str(error)))
            return None
        self.notes.setdefault(field, Counter()).update(self.chat.notes)
        self.chat.notes.clear()
        return found

    def _sample(self, row: Row, answer: Message, encoded: Encoded, label: str) -> Row:
        messages = [*row["messages"], answer]
        identity = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:12]
        known: dict[str, Any] = {
            name: row[name] for name in ("harmful", "given", "rewritten") if name in row
        }
        known |= tools_as_json(row)
        before, said, response = row["messages"], answer, row["response"]
        if encoded.turn < len(messages) - 1:  # a sequence of an earlier turn
            identity, before, said = (
                f"{identity}-{encoded.turn}",
                messages[: encoded.turn],
                messages[encoded.turn],
            )
            response = said["content"]
            known["earlier_turn"] = True
        if said.get("tool_calls"):
            spoken = [token for token in encoded.labels if token != IGNORE]
            response = self.chat.tokenizer.decode(spoken, skip_special_tokens=True).strip()
        return {
            "id": f"{label}-{identity}", "kind": label, "prompt": row["prompt"], "response": response,
            "messages": json.dumps(before), "input_ids": encoded.input_ids, "labels": encoded.labels, **known,
        }  # fmt: skip

    def _tell_notes(self) -> dict[str, dict[str, int]]:
        """What was rendered otherwise than the template does, in how many conversations; said, and for the manifest."""
        found = {field: dict(notes) for field, notes in self.notes.items() if notes}
        for field, notes in found.items():
            for note, count in notes.items():
                print(f"{field}: {note} ({count} conversations)", file=sys.stderr, flush=True)
        return found

    def _given(self, row: Row) -> str:
        """What the answer begins with and is not trained on; '' for most, and for answers that came with the data."""
        begins = not row["response"] and contrastive.chosen_share(
            row["prompt"], "given", self.data.begun_share
        )
        return contrastive.begun(row["prompt"]) if begins else ""

    def _with_opening(self, row: Row, family: tuple[str, ...], kind: str) -> Row:
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        known = {name: row.get(name) for name in ("prompt", "rewritten", "row")}
        return {
            "messages": messages,
            "response": contrastive.opening(row["prompt"], family),
            "kind": kind,
            **known,
        }

    def _encoded(self, field: str, rows: list[Row], kind: str | None = None) -> list[Row]:
        """The rows as samples, one for each sequence that a conversation takes."""
        self.counts.setdefault(field, {"truncated": 0, "dropped": 0})
        found = [
            sample for row in rows for sample in self._samples(field, row, kind or row["kind"])
        ]
        if rows and not found:
            raise ValueError(self._none_fits(field))
        return found

    def _samples(self, field: str, row: Row, kind: str) -> list[Row]:
        """A conversation as samples, the last of which has its last answer; none where nothing of it can be trained."""
        counts = self.counts.setdefault(field, {"truncated": 0, "dropped": 0})
        given = row.get("given") or ""
        answer = row.get("answer") or _said(
            f"{given} {row['response']}" if given else row["response"]
        )
        found = self._encode(field, row, answer, self.data.max_length, given=given)
        if found is None:
            return []
        if not found:
            self._drop_untrained(field, row, answer)
        counts["truncated"] += sum(encoded.truncated for encoded in found)
        return [self._sample(row, answer, encoded, kind) for encoded in found]

    def _drop_untrained(self, field: str, row: Row, answer: Message) -> None:
        """Drop a row of which no token can be learned: it is too long, or none of its turns is to be trained."""
        whole = self.chat.encode([*row["messages"], answer], 10**9, tools=row.get("tools"))
        self.chat.notes.clear()  # counted already
        if not whole:
            self._drop(field, "not_trained", row)
            return
        needed = 1 + next(place for place, label in enumerate(whole[-1].labels) if label != IGNORE)
        self._drop(field, "too_long", row, "data.max_length", needed)

    def _none_fits(self, field: str) -> str:
        shortest = self.claims.dropped.shortest(field)
        if shortest is None:
            return f"{field}: no conversation has a turn that is to be trained"
        needed, place = shortest
        return (
            f"{field}: no sample has a token to learn within data.max_length {self.data.max_length}: "
            f"the shortest prompt with a token of its answer takes {needed} ({place}): raise it, or shorten the prompts"
        )


def _shown(field: str, rows: list[Row]) -> Iterator[Row]:
    """The rows; every few seconds a line says how many were taken."""
    last = time.monotonic()
    for number, row in enumerate(rows):
        if time.monotonic() - last > _SECONDS:
            last = time.monotonic()
            print(
                f"[prepare] {field}: {number:,} of {len(rows):,} rows", file=sys.stderr, flush=True
            )
        yield row


def _alike(chosen: Encoded, rejected: Encoded) -> bool:
    """Whether no supervised position tells the sides apart:
    such a pair has no gradient, or none that means anything.
    """
    return chosen.input_ids == rejected.input_ids or chosen.labels[1:] == rejected.labels[1:]


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _share(fraction: float, samples: int) -> int:
    """Harmful samples to add to `samples` others so that they are `fraction` of all."""
    return round(fraction / (1 - fraction) * samples)


def _repeated(pool: list[Row], wanted: int) -> list[Row]:
    """A small pool is used again rather than the fraction missed; the manifest counts the different prompts."""
    return [{**pool[i % len(pool)], "id": f"harmful-{i}"} for i in range(wanted)] if pool else []


def _by_kind(sets: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The sets as their prompts were claimed: harmful samples and the two of the alignment are sets themselves.

    Without the sequences of earlier turns, which are no conversations of their own.
    """
    owners: dict[tuple[str, str | None], str] = {
        ("task_train", "harmful"): "harmful_mix",
        ("align", "refusal"): "align_refusals",
        ("align", "harmless"): "align_harmless",
    }
    found: dict[str, list[Row]] = {}
    for name, rows in sets.items():
        for row in rows:
            if not row.get("earlier_turn"):
                found.setdefault(owners.get((name, row.get("kind")), name), []).append(row)
    return found


def _interleave(task: list[Row], harmful: list[Row], seed: int) -> list[Row]:
    def key(row: Row) -> bytes:
        return hashlib.sha256(f"{seed}\0{row['id']}".encode()).digest()

    return sorted([*task, *harmful], key=key)
