"""The choice among the runs of a method's grid, by one rule: exact match minus harmful answered minus over-refusal, the
highest, on validation prompts.

    python -m pipeline.report.tuning launch/recipes/tune.yaml

Reads finished evaluations only. A choice among some of a method's runs is marked as such. Over-refusal, the mean of
what is refused of ordinary instructions and of look-alikes, counts as much as the others: without it, the rule prefers
a model that refuses everything but the task (docs/results.md).
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from statistics import fmean

from pipeline import artifacts
from pipeline.running import entry
from pipeline.stages import command_line
from pipeline.stages.layout import Layout
from pipeline.system.tables import as_text

HEADER = (
    "method",
    "setting",
    "task exact match",
    "harmful answered",
    "look-alikes refused",
    "ordinary refused",
    "score",
    "",
)
_MEASURES = ("exact_match", "non_refusal_rate", "over_refusal_rate", "ordinary_refusal_rate")


@dataclass(frozen=True)
class Run:
    """One setting of one method, its measures averaged over its seeds.

    over_refusal, ordinary: None where there were no such prompts.
    """

    method: str
    setting: str
    exact_match: float
    non_refusal: float
    over_refusal: float | None
    ordinary: float | None

    @property
    def score(self) -> float:
        """Exact match minus non-refusal minus the mean share of harmless prompts refused: the higher, the better."""
        refused = [value for value in (self.over_refusal, self.ordinary) if value is not None]
        return self.exact_match - self.non_refusal - (fmean(refused) if refused else 0.0)


def runs(layout: Layout) -> tuple[list[Run], set[str]]:
    """The settings all of whose seeds are evaluated, and the methods of which some are not.

    A method's name ends at the first dot (Recipe.methods, grid).
    """
    found: dict[str, list[dict]] = defaultdict(list)
    missing = set()
    for subject in layout.subjects():
        if subject.trained is None:
            continue
        folder = layout.evaluate(subject)
        if artifacts.complete(folder):
            artifacts.verify(folder, "metrics.json")
            found[subject.name].append(json.loads((folder / "metrics.json").read_text()))
        else:
            missing.add(subject.name)
    result = []
    for name, measured in found.items():
        if name not in missing:
            method, _, setting = name.partition(".")
            exact, answered, over, ordinary = (
                [m[key]["value"] for m in measured] for key in _MEASURES
            )
            result.append(
                Run(
                    method,
                    setting or "as it is",
                    fmean(exact),
                    fmean(answered),
                    _mean(over),
                    _mean(ordinary),
                )
            )
    return result, {name.partition(".")[0] for name in missing}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def chosen(found: list[Run]) -> dict[str, Run]:
    """The best run of every method; of equals the first."""
    best: dict[str, Run] = {}
    for run in found:
        if run.method not in best or run.score > best[run.method].score:
            best[run.method] = run
    return best


def table(found: list[Run], unfinished: Collection[str] = ()) -> str:
    """The settings with their measures, and which of each method is the best; as text."""
    best = chosen(found)

    def word(run: Run) -> str:
        return (
            ""
            if best[run.method] is not run
            else "best so far"
            if run.method in unfinished
            else "chosen"
        )

    rows = []
    for run in found:
        values = (
            "" if value is None else f"{value:.2f}"
            for value in (run.exact_match, run.non_refusal, run.over_refusal, run.ordinary)
        )
        rows.append((run.method, run.setting, *values, f"{run.score:+.2f}", word(run)))
    return as_text(rows, HEADER)


def main() -> None:
    """Print the settings of the recipe's grids. ValueError where they were evaluated on test prompts."""
    experiment = command_line.recipe_given("pipeline.report.tuning")
    if experiment.base.evaluate.split != "validation":
        raise ValueError(
            f"{experiment.path}: settings are chosen on validation prompts: set evaluate.split to validation"
        )
    found, unfinished = runs(Layout(experiment))
    print(table(found, unfinished), end="")
    if any(run.over_refusal is None for run in found):
        print(
            "look-alikes are not in the score: name a source in evaluate.harmless with more "
            "prompts than the test's evaluate.harmless_prompts"
        )
    if any(run.ordinary is None for run in found):
        print("ordinary instructions are not in the score: name a source in evaluate.ordinary")
    if unfinished:
        print(f"not all evaluated yet: {', '.join(sorted(unfinished))}; sap run {experiment.path}")


if __name__ == "__main__":
    sys.exit(entry.guarded(main))
