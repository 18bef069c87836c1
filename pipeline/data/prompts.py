"""The evaluation's prompts: those of its sources that nothing prepared for training holds.

    facts = write_prompts(recipe, Path("runs/demo/prepare-1a2b3c4d"), Path("runs/demo/prompts-5e6f7a8b"))

They come after the training sets, so that other prompts to evaluate on never change what is trained. Where one stands
in a training set, as any turn of a user, it is left out of the evaluation, which is said, counted and listed. No prompt
is in two sets (overlap.py). Each set holds as many questions as imperatives (forms.py), unless evaluate.forms says
otherwise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.data import forms
from pipeline.data.dropped import LISTED
from pipeline.data.malformed import Skipped
from pipeline.data.overlap import Claims, assert_disjoint, read_held
from pipeline.data.rows import ordered_rows
from pipeline.data.sets import HELD, Row, prompt_rows, write_set
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.redaction import redact
from pipeline.recipe.sections import SourceSection

# Sets that a model learns or is measured to tell apart: where the form tells them apart as well, that is what it
# learns,
# or what is measured.
_COUNTERPARTS = (
    ("data.refusals", "data.harmless", "data.forms"),
    ("data.safety", "evaluate.harmful", "data.forms"),
    ("evaluate.harmful", "evaluate.harmless", "evaluate.forms"),
    ("evaluate.harmful", "evaluate.ordinary", "evaluate.forms"),
)


def write_prompts(recipe: Recipe, prepared: Path, folder: Path) -> dict[str, Any]:
    """Write eval_harmful, and where they are named eval_harmless and eval_ordinary, each with its validation_ set,
    below `folder`.

    prepared: the complete folder of the training sets. Returns the counts for the manifest: samples by set, forms by
    field (the training's too), prompts asked for by field, overlapping and duplicate ones. ValueError where a source
    leaves no prompt.
    """
    evaluate, held = recipe.evaluate, read_held(prepared / HELD)
    taking = _Taking(Claims(held), recipe)
    asked = {"evaluate.harmful": evaluate.harmful_prompts}
    sets = {
        "eval_harmful": taking.test("evaluate.harmful", evaluate.harmful, evaluate.harmful_prompts)
    }
    if evaluate.harmless is not None:
        # A choice of settings that did not see over-refusal chose a method that refused half of the test's
        # look-alikes (docs/results.md): so some are kept for choosing.
        count = asked["evaluate.harmless"] = evaluate.harmless_prompts
        sets["eval_harmless"] = taking.test("evaluate.harmless", evaluate.harmless, count)
        sets["validation_harmless"] = taking.validation(
            "evaluate.harmless", evaluate.harmless, count
        )
    if evaluate.ordinary is not None:
        count = asked["evaluate.ordinary"] = evaluate.ordinary_prompts
        sets["eval_ordinary"] = taking.test(
            "evaluate.ordinary", evaluate.ordinary, count, keep_a_third=True
        )
        sets["validation_ordinary"] = taking.validation(
            "evaluate.ordinary", evaluate.ordinary, count
        )
    sets = {name: rows for name, rows in sets.items() if rows}
    assert_disjoint(sets, held)
    for name, prompts in sets.items():
        write_set(folder / f"{name}.parquet", prompts)
    taking.skipped.write(folder)
    for sentence in taking.skipped.sentences():
        _say(sentence)
    taking.claims.dropped.say(but=("overlapping",))  # said where the prompts were taken
    taking.claims.dropped.write(folder / LISTED)
    by_field = {
        name.replace("eval_", "evaluate."): forms.count_forms(rows)
        for name, rows in sets.items()
        if name.startswith("eval_")
    }
    rewritten = {
        field: counts["rewritten"] for field, counts in by_field.items() if counts["rewritten"]
    }
    if rewritten:
        counts = ", ".join(f"{count} of {field}" for field, count in rewritten.items())
        _say(f"prompts rewritten into the other form: {counts}")
    by_field = json.loads((prepared / artifacts.FACTS).read_text())["forms"] | by_field
    for sentence in form_warnings(
        by_field, {"data.forms": recipe.data.forms, "evaluate.forms": evaluate.forms}
    ):
        _say(f"warning: {sentence}")
    return {
        "samples": {name: len(prompts) for name, prompts in sets.items()},
        "forms": by_field,
        "asked": asked,
        "skipped": taking.skipped.facts(),
        "notes": taking.skipped.notes,
        **taking.claims.facts(),
    }


def form_warnings(by_field: dict[str, dict[str, int]], settings: dict[str, str]) -> list[str]:
    """One sentence for every two sets whose forms differ by more than forms.TOLERANCE.

    by_field: field -> forms.count_forms of its set. settings: data.forms and evaluate.forms.
    """
    sentences = []
    for one, other, setting in _COUNTERPARTS:
        if (
            one in by_field
            and other in by_field
            and forms.apart(by_field[one], by_field[other]) > forms.TOLERANCE
        ):
            cure = f"name sources of questions and imperatives in {one} and {other}"
            if settings[setting] != "balanced":
                cure = f"set {setting} to balanced, or {cure}"
            sentences.append(
                f"{one} has {_shares(by_field[one])}, {other} {_shares(by_field[other])}: a model can tell them apart "
                f"by their form alone, and what is measured between them may be the form; {cure}"
            )
    return sentences


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts[name] for name in forms.FORMS)
    return ", ".join(f"{counts[name] / total:.0%} {name}s" for name in forms.FORMS if counts[name])


class _Taking:
    """Takes the evaluation's prompts from their sources, each for one set, and says what is left out and missing."""

    def __init__(self, claims: Claims, recipe: Recipe):
        self.claims, self.recipe = claims, recipe
        self.skipped = Skipped()
        self.left: dict[str, list[Row]] = {}  # what the test did not take of a field's source

    def test(
        self, field: str, source: SourceSection, asked: int, keep_a_third: bool = False
    ) -> list[Row]:
        """Up to `asked` prompts that no set holds.

        keep_a_third: every third is for `validation`, whether or not the test needs it.
        """
        rows = ordered_rows(field, source, self.recipe.data.seed, skipped=self.skipped)
        free = self.claims.free(field, rows, by_prompt=True)
        kept = free[2::3] if keep_a_third else []
        usable = (
            [row for number, row in enumerate(free) if number % 3 != 2] if keep_a_third else free
        )
        self._say_left_out(field, source, len(usable), asked)
        taken = self.claims.take(field, self._by_form(usable, "test"), asked, by_prompt=True)
        gone = {row.get("rewritten") or row["prompt"] for row in taken}
        self.left[field] = kept or [row for row in free if row["prompt"] not in gone]
        return prompt_rows(field, source, taken)

    def validation(self, field: str, source: SourceSection, asked: int) -> list[Row]:
        """Up to `asked` prompts of what `test` left, for choosing settings."""
        pool = f"{field}, validation"
        taken = self.claims.take(
            pool, self._by_form(self.left[field], "validation"), asked, by_prompt=True
        )
        return [
            {**row, "id": f"validation-{row['id']}"} for row in prompt_rows(field, source, taken)
        ]

    def _by_form(self, rows: list[Row], family: forms.Family) -> Iterable[Row]:
        return (
            rows if self.recipe.evaluate.forms == "as_they_are" else forms.alternating(rows, family)
        )

    def _say_left_out(self, field: str, source: SourceSection, usable: int, asked: int) -> None:
        prefix, name = f"{field} / ", redact(source.source)
        others = {
            pools.removeprefix(prefix): count
            for pools, count in self.claims.overlaps.items()
            if pools.startswith(prefix)
        }
        by_pool, total = (
            ", ".join(f"{pool} {count}" for pool, count in others.items()),
            sum(others.values()),
        )
        if not usable:
            raise ValueError(
                f"{field}: every prompt of {name} is held by another set already ({by_pool}): "
                f"name a {field}.source of which something is left, or take fewer of its prompts elsewhere"
            )
        if total:
            are = f"{total} prompts of {name} are" if total > 1 else f"1 prompt of {name} is"
            _say(
                f"{field}: {are} in other sets already ({by_pool}): left out of the evaluation; "
                "nothing is trained again"
            )
        if usable < asked:
            _say(
                f"{field}: {usable} prompts instead of the {asked} that {field}_prompts asks for: "
                f"{name} has no more that no other set holds"
            )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
