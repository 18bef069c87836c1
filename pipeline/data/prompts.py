"""The evaluation's prompts: those of its sources that nothing prepared for training holds.

    facts = write_prompts(recipe, Path("runs/demo/prepare-1a2b3c4d"), Path("runs/demo/prompts-5e6f7a8b"))

They come after the training sets, so that other prompts to evaluate on never change what is trained. Where the two
overlap, the prompt is left out of the evaluation, which is said and counted. No prompt is in two sets (overlap.py).
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
    """Write eval_harmful, and with evaluate.harmless eval_harmless and validation_harmless, below `folder`.

    prepared: the complete folder of the training sets. Returns the counts for the manifest: samples by set, prompts
    asked for by field, overlapping and duplicate ones. ValueError where a source leaves no prompt.
    """
    evaluate, seed, held = recipe.evaluate, recipe.data.seed, read_held(prepared / HELD)
    claims, asked = Claims(held), {"evaluate.harmful": evaluate.harmful_prompts}
    sets = {"eval_harmful": _take(claims, "evaluate.harmful", evaluate.harmful, seed, evaluate.harmful_prompts)}
    if evaluate.harmless is not None:
        count = asked["evaluate.harmless"] = evaluate.harmless_prompts
        lookalikes = _take(claims, "evaluate.harmless", evaluate.harmless, seed, count, spare=count)
        sets["eval_harmless"] = lookalikes[:count]
        # A choice of settings that did not see over-refusal chose a method that refused half of the test's
        # look-alikes (docs/results.md).
        if lookalikes[count:]:
            sets["validation_harmless"] = lookalikes[count:]
    assert_disjoint(sets, held)
    for name, prompts in sets.items():
        write_set(folder / f"{name}.parquet", prompts)
    return {"samples": {name: len(prompts) for name, prompts in sets.items()}, "asked": asked, **claims.facts()}


def _take(claims: Claims, field: str, source: SourceSection, seed: int, asked: int, spare: int = 0) -> list[Row]:
    """The first `asked` prompts that no set holds, and up to `spare` more. Says what is left out and missing."""
    taken = claims.take(field, ordered_rows(field, source, seed), asked + spare, by_prompt=True)
    prefix, name = f"{field} / ", redact(source.source)
    others = {pools.removeprefix(prefix): count for pools, count in claims.overlaps.items() if pools.startswith(prefix)}
    by_pool, total = ", ".join(f"{pool} {count}" for pool, count in others.items()), sum(others.values())
    if not taken:
        raise ValueError(
            f"{field}: every prompt of {name} is held by another set already ({by_pool}): "
            f"name a {field}.source of which something is left, or take fewer of its prompts elsewhere"
        )
    if total:
        are = f"{total} prompts of {name} are" if total > 1 else f"1 prompt of {name} is"
        _say(f"{field}: {are} in other sets already ({by_pool}): left out of the evaluation; nothing is trained again")
    if len(taken) < asked:
        _say(
            f"{field}: {len(taken)} prompts instead of the {asked} that {field}_prompts asks for: "
            f"{name} has no more that no other set holds"
        )
    return prompt_rows(field, source, taken)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
