"""The evaluation's prompts: those of its sources that nothing prepared for training holds.

    facts = write_prompts(recipe, Path("runs/demo/prepare-1a2b3c4d"), Path("runs/demo/prompts-5e6f7a8b"))

They come after the training sets, so that other prompts to evaluate on never change what is trained. Where the two overlap, the prompt is left
out of the evaluation, which is said and counted. No prompt is in two sets, as among the training sets (overlap.py).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pipeline.data.overlap import Claims, assert_disjoint, read_held
from pipeline.data.prepare import HELD, Row, ordered_rows, prompt_rows, write_set
from pipeline.recipe import Recipe
from pipeline.redaction import redact
from pipeline.sections import SourceSection


def write_prompts(recipe: Recipe, prepared: Path, folder: Path) -> dict[str, Any]:
    """Write eval_harmful, and with evaluate.harmless eval_harmless and validation_harmless, below `folder`; returns the counts for the manifest.

    prepared: the complete folder of the training sets. ValueError where a source leaves no prompt.
    """
    evaluate, held = recipe.evaluate, read_held(prepared / HELD)
    claims = Claims(held)
    asked = {"evaluate.harmful": evaluate.harmful_prompts}
    rows = ordered_rows("evaluate.harmful", evaluate.harmful, recipe.data.seed)
    sets = {"eval_harmful": _take(claims, "evaluate.harmful", evaluate.harmful, rows, evaluate.harmful_prompts, evaluate.harmful_prompts)}
    if evaluate.harmless is not None:
        count = asked["evaluate.harmless"] = evaluate.harmless_prompts
        rows = ordered_rows("evaluate.harmless", evaluate.harmless, recipe.data.seed)
        lookalikes = _take(claims, "evaluate.harmless", evaluate.harmless, rows, count, 2 * count)
        # A choice of settings that did not see over-refusal chose a method that refused half of the test's look-alikes (docs/results.md).
        sets |= {"eval_harmless": lookalikes[:count]} | ({"validation_harmless": lookalikes[count:]} if lookalikes[count:] else {})
    assert_disjoint(sets, held)
    for name, prompts in sets.items():
        write_set(folder / f"{name}.parquet", prompts)
    return {"samples": {name: len(prompts) for name, prompts in sets.items()}, "asked": asked, **claims.facts()}


def _take(claims: Claims, field: str, source: SourceSection, rows: list[Row], asked: int, most: int) -> list[Row]:
    """The first `most` prompts that no set holds. What is left out, and fewer than were asked for, is said in a line."""
    taken = claims.take(field, rows, most, by_prompt=True)
    others = {name.removeprefix(f"{field} / "): count for name, count in claims.overlaps.items() if name.startswith(f"{field} / ")}
    by_pool = ", ".join(f"{pool} {count}" for pool, count in others.items())
    name = redact(source.source)
    if not taken:
        raise ValueError(
            f"{field}: every prompt of {name} is held by another set already ({by_pool}): give a {field}.source of which something is left, "
            "or take fewer of its prompts elsewhere"
        )
    total = sum(others.values())
    if total:
        _say(
            f"{field}: {total} {'prompts' if total > 1 else 'prompt'} of {name} {'are' if total > 1 else 'is'} in other sets already ({by_pool}): "
            "left out of the evaluation; nothing is trained again"
        )
    if len(taken) < asked:
        _say(f"{field}: {len(taken)} prompts instead of the {asked} that {field}_prompts asks for: {name} has no more that no other set holds")
    return prompt_rows(field, source, taken)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
