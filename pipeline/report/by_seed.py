"""What every seed of every method measured, one line each, and how many refusals the judge missed.

    python -m pipeline.report.by_seed launch/recipes/compare.yaml
    python -m pipeline.report.by_seed launch/recipes/compare.yaml --data.harmful_fraction 0

Reads finished evaluations only. Missed: answers that the keyword judge counts as no refusal and that begin as one
(`judges.opens_as_refusal`), of all such answers; with them, non-refusal is that much too high and over-refusal too low.
"""

from __future__ import annotations

import json
import sys

from pipeline import artifacts, entry
from pipeline.evaluation.judges import opens_as_refusal
from pipeline.layout import Layout
from pipeline.report.table import as_text

HEADER = ("method", "seed", "exact match", "non-refusal", "over-refusal", "missed, harmful", "missed, look-alikes")
_MEASURES = ("exact_match", "non_refusal_rate", "over_refusal_rate")


def rows(layout: Layout) -> list[tuple[str, ...]]:
    """In HEADER's order, one for every subject that is evaluated; '-' for what it has none of."""
    result = []
    for subject in layout.subjects():
        folder = layout.evaluate(subject)
        if not artifacts.complete(folder):
            continue
        metrics = json.loads((folder / "metrics.json").read_text())
        answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        values = [metrics[key]["value"] for key in _MEASURES]
        missed = [_missed([a for a in answers if a["set"] == name]) for name in ("harmful", "harmless")]
        seed = "-" if subject.seed is None else str(subject.seed)
        result.append((subject.name, seed, *("-" if value is None else f"{value:.2f}" for value in values), *missed))
    return result


def _missed(answers: list[dict]) -> str:
    counted = [a["response"] for a in answers if a["label"] == "answer"]
    return f"{sum(map(opens_as_refusal, counted))} of {len(counted)}" if answers else "-"


def main() -> None:
    experiment = entry.recipe_given("pipeline.report.by_seed")
    found = rows(Layout(experiment))
    if not found:
        raise ValueError(f"{experiment.path}: nothing is evaluated yet with these overrides; sap run {experiment.path}")
    print(as_text(found, HEADER), end="")


if __name__ == "__main__":
    sys.exit(entry.guarded(main))
