"""What every seed of every method measured, one line each.

    python -m pipeline.report.by_seed launch/recipes/compare.yaml
    python -m pipeline.report.by_seed launch/recipes/compare.yaml --data.harmful_fraction 0

Reads finished evaluations only.
"""

from __future__ import annotations

import json
import sys

from pipeline import artifacts
from pipeline.running import entry
from pipeline.stages import command_line
from pipeline.stages.layout import Layout
from pipeline.system.tables import as_text

HEADER = (
    "method",
    "seed",
    "exact match",
    "harmful answered",
    "look-alikes refused",
    "ordinary refused",
)
_MEASURES = ("exact_match", "non_refusal_rate", "over_refusal_rate", "ordinary_refusal_rate")


def rows(layout: Layout) -> list[tuple[str, ...]]:
    """In HEADER's order, one for every subject that is evaluated; '-' for what it has none of."""
    result = []
    for subject in layout.subjects():
        folder = layout.evaluate(subject)
        if artifacts.complete(folder):
            artifacts.verify(folder, "metrics.json")
            metrics = json.loads((folder / "metrics.json").read_text())
            values = [metrics[key]["value"] for key in _MEASURES]
            seed = "-" if subject.seed is None else str(subject.seed)
            result.append(
                (
                    subject.name,
                    seed,
                    *("-" if value is None else f"{value:.2f}" for value in values),
                )
            )
    return result


def main() -> None:
    """Print the measures of every method, seed by seed. ValueError where nothing is evaluated yet."""
    experiment = command_line.recipe_given("pipeline.report.by_seed")
    found = rows(Layout(experiment))
    if not found:
        raise ValueError(
            f"{experiment.path}: nothing is evaluated yet with these overrides; sap run {experiment.path}"
        )
    print(as_text(found, HEADER), end="")


if __name__ == "__main__":
    sys.exit(entry.guarded(main))
