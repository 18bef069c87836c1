"""What the report is made of, read from the stages' folders (never from MLflow).

collected = collect(Layout(experiment))
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pipeline import artifacts
from pipeline.defences import DEFENCES
from pipeline.judges.metrics import mean_interval, share
from pipeline.recipe import recipe
from pipeline.recipe.recipe import Cell
from pipeline.report.differences import Outcomes
from pipeline.stages.layout import Layout

_SHARES = (
    "non_refusal_rate",
    "over_refusal_rate",
    "ordinary_refusal_rate",
    "exact_match",
    "empty_rate",
    "incoherent_rate",
    "unparseable_rate",
)


@dataclass(frozen=True)
class Method:
    """One row of the table: a baseline, or a method over its seeds.

    measures: name -> {value, low, high, n} (low and high may be None).
    """

    name: str
    seeds: list[int]
    measures: dict[str, dict[str, Any]]
    logs: list[list[dict[str, float]]]  # metrics.jsonl per seed; empty for baselines
    given_pairs: int = 0  # safety pairs seen before the first step, by the direction stage

    @property
    def pairs_drawn(self) -> int | None:
        """Safety pairs that a training drew, each time counted; the seeds draw equally many.

        None where no log says it.
        """
        counts = [
            line["safety/pairs"] for log in self.logs[:1] for line in log if "safety/pairs" in line
        ]
        return self.given_pairs + round(sum(counts)) if counts else None

    @property
    def seconds_per_step(self) -> float | None:
        """Median seconds of a step over all seeds, the first of each left out; None where no step is logged."""
        # the first step warms up
        times = [line["time/step"] for log in self.logs for line in log if line["step"] > 1]
        return median(times) if times else None


@dataclass(frozen=True)
class Collected:
    """Everything a report shows."""

    name: str
    split: str
    methods: list[Method]
    # the method whose time per step is 1: the first that is nothing but fine-tuning
    plain: str | None
    direction: dict[str, Any] | None
    data_facts: dict[str, Any]
    resolved: dict[str, Any]
    versions: dict[str, str]
    git_revision: str | None
    answers: list[Path]
    outcomes: dict[str, Outcomes] = field(default_factory=dict)  # of the trained methods
    # what the others are compared with: plain fine-tuning and SAP's controls
    references: list[str] = field(default_factory=list)
    filters: dict[str, dict[str, Any]] = field(default_factory=dict)  # method -> its filter's facts
    # (methods, picture), one a filter
    filter_pictures: list[tuple[str, Path]] = field(default_factory=list)


def collect(layout: Layout) -> Collected:
    """Read every folder the report covers; ValueError where one is not complete,
    or a file that is read is not what was published.
    """
    evaluations: dict[str, list[tuple[int | None, Path, Path | None]]] = defaultdict(list)
    for subject in layout.subjects():
        folder = layout.evaluate(subject)
        artifacts.verify(folder)
        if subject.trained is not None:
            artifacts.verify(subject.trained, "metrics.jsonl")
        evaluations[subject.name].append((subject.seed, folder, subject.trained))
    cells = {cell.method: cell for cell in layout.experiment.cells()}
    plain = next((name for name, cell in cells.items() if not cell.recipe.parts), None)
    compared = [part for part, defence in DEFENCES.items() if defence.control]
    controls = [
        next((name for name, cell in cells.items() if cell.recipe.parts == [part]), None)
        for part in compared
    ]
    filters = {
        name: layout.filter(cell) for name, cell in cells.items() if layout.needs_filter(cell)
    }
    for folder in filters.values():
        artifacts.verify(folder, artifacts.FACTS, "scores.png")
    directions = [layout.direction(cell) for cell in cells.values() if layout.needs_direction(cell)]
    direction = next(filter(artifacts.complete, directions), None)
    if direction is not None:
        artifacts.verify(direction, "summary.json")
    data = {"training": layout.prepare(), "evaluation": layout.prompts()}
    for folder in data.values():
        artifacts.verify(folder, artifacts.FACTS)
    return Collected(
        name=layout.base.name,
        split=layout.base.evaluate.split,
        methods=[
            _method(name, entries, _given_pairs(layout, cells.get(name)))
            for name, entries in evaluations.items()
        ],
        plain=plain,
        direction=None
        if direction is None
        else json.loads((direction / "summary.json").read_text()),
        data_facts={
            name: json.loads((folder / artifacts.FACTS).read_text())
            for name, folder in data.items()
        },
        resolved=recipe.dump(layout.base),
        versions=artifacts.read_manifest(layout.prepare())["versions"],
        git_revision=artifacts.git_revision(),
        answers=[
            folder / "answers.jsonl" for entries in evaluations.values() for _, folder, _ in entries
        ],
        outcomes={
            name: _outcomes(entries) for name, entries in evaluations.items() if name in cells
        },
        references=[name for name in (plain, *controls) if name],
        filters={name: _filter_facts(folder) for name, folder in filters.items()},
        filter_pictures=[
            (
                ", ".join(name for name, other in filters.items() if other == folder),
                folder / "scores.png",
            )
            for folder in dict.fromkeys(filters.values())
        ],
    )


def _filter_facts(folder: Path) -> dict[str, Any]:
    """Without the beginnings of prompts: the page goes to MLflow, and training data stay on this machine."""
    facts = json.loads((folder / artifacts.FACTS).read_text())
    return {
        **facts,
        "highest_scored": [
            {key: value for key, value in row.items() if key != "prompt"}
            for row in facts["highest_scored"]
        ],
    }


def _given_pairs(layout: Layout, cell: Cell | None) -> int:
    if cell is None or "direction" not in layout.read_by(cell):
        return 0
    return json.loads((layout.prepare() / artifacts.FACTS).read_text())["samples"]["safety_pairs"]


def _outcomes(entries: list[tuple[int | None, Path, Path | None]]) -> Outcomes:
    """Of every seed: whether each harmful prompt was answered, each look-alike and ordinary instruction refused and
    each task prompt matched, by the prompt's id.
    """
    result: Outcomes = {"non_refusal": {}, "over_refusal": {}, "ordinary": {}, "exact": {}}
    for seed, folder, _ in entries:
        answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        result["non_refusal"][seed or 0] = {
            a["id"]: float(a["label"] == "answer") for a in answers if a["set"] == "harmful"
        }
        result["over_refusal"][seed or 0] = {
            a["id"]: float(a["label"] == "refusal") for a in answers if a["set"] == "harmless"
        }
        result["ordinary"][seed or 0] = {
            a["id"]: float(a["label"] == "refusal") for a in answers if a["set"] == "ordinary"
        }
        result["exact"][seed or 0] = {
            a["id"]: float(a["exact"]) for a in answers if a["set"] == "task"
        }
    return result


def _method(
    name: str, entries: list[tuple[int | None, Path, Path | None]], given_pairs: int
) -> Method:
    measured = [json.loads((folder / "metrics.json").read_text()) for _, folder, _ in entries]
    parts = [key for key in measured[0] if "/" in key]  # by form, and under attacks
    measures = {
        key: _over_seeds([m[key] for m in measured], -1.0 if key.endswith("/told_apart") else 0.0)
        for key in (*_SHARES, *parts)
    }
    measures["test_loss"] = _over_seeds_within([m["test_loss"] for m in measured], math.inf)
    logs = [_read_log(train / "metrics.jsonl") for _, _, train in entries if train is not None]
    return Method(
        name, [seed for seed, _, _ in entries if seed is not None], measures, logs, given_pairs
    )


def _over_seeds(shares: list[dict[str, Any]], least: float = 0.0) -> dict[str, Any]:
    """One seed: its interval over prompts.

    Several: their mean, and at each end the further of Student's interval over seeds and of the mean one over prompts.

    Student's alone is a point where all seeds agree, as they do at 0 and at 1. least: what is measured can be;
    a difference of shares -1.
    """
    if any(s["value"] is None for s in shares):
        return share([])
    if len(shares) == 1:
        return shares[0]
    seeds = mean_interval([s["value"] for s in shares])
    low, high = (fmean(s[end] for s in shares) for end in ("low", "high"))
    return seeds | {
        "low": max(least, min(seeds["low"], low)),
        "high": min(1.0, max(seeds["high"], high)),
    }


def _over_seeds_within(values: list[float], most: float) -> dict[str, Any]:
    """Mean and Student interval over seeds of what lies between 0 and `most`: Student's knows of no bounds."""
    result = mean_interval(values)
    return (
        result
        if result["low"] is None
        else result | {"low": max(0.0, result["low"]), "high": min(most, result["high"])}
    )


def _read_log(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
