"""What a subject is asked: the prepared prompts of the recipe's split, and the same under its attacks.

sets = evaluation_sets(recipe.evaluate, Path("runs/demo/prepare-1a2b3c4d"), Path("runs/demo/prompts-5e6f7a8b"))
"""

from __future__ import annotations

from itertools import chain, zip_longest
from pathlib import Path

from pipeline.attacks.attacks import attacked
from pipeline.data.sets import Row, read_rows
from pipeline.recipe.sections import EvaluateSection


def evaluation_sets(
    section: EvaluateSection, prepared: Path, prompts: Path
) -> dict[str, list[Row]]:
    """Rows by set: harmful, harmless (look-alikes), ordinary, task, and for every attack ATTACK/harmful and
    ATTACK/harmless.

    Of the split that evaluate.split names: settings are chosen on `validation`, never on `test`. A set that no
    source is
    named for is empty. An attack's harmless prompts are look-alikes and ordinary instructions in turn.
    """
    test = section.split == "test"

    def read(name: str, count: int) -> list[Row]:
        return read_rows(prompts, name)[:count] if (prompts / f"{name}.parquet").is_file() else []

    kind = "eval" if test else "validation"
    sets = {
        "harmful": (
            read_rows(prompts, "eval_harmful")
            if test
            else read_rows(prepared, "validation_prompts")
        )[: section.harmful_prompts],
        "harmless": read(f"{kind}_harmless", section.harmless_prompts),
        "ordinary": read(f"{kind}_ordinary", section.ordinary_prompts),
        "task": read_rows(prepared, "task_test" if test else "task_validation")[
            : section.task_prompts
        ],
    }
    mixed = [
        row
        for row in chain.from_iterable(
            zip_longest(*(_by_pairs(sets[name]) for name in ("harmless", "ordinary")))
        )
        if row
    ]
    control = list(chain.from_iterable(mixed))
    for attack in section.attacks:
        sets[f"{attack}/harmful"] = attacked(sets["harmful"][: section.attack_prompts], attack)
        sets[f"{attack}/harmless"] = attacked(control[: section.attack_prompts], attack)
    return sets


def _by_pairs(rows: list[Row]) -> list[list[Row]]:
    """A question and an imperative together, as the sets are ordered: taken in turn from two sets, both forms come
    from both.
    """
    return [rows[start : start + 2] for start in range(0, len(rows), 2)]
