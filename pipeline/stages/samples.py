"""How many samples a recipe has, as far as that is known before anything runs, and the steps that come of them.

samples = samples_of(layout, rows=300)       # rows: usable ones of data.task, None where nobody counted
samples.line()                               # "300 rows: 100 held out to test and 64 to validate, about 136 ..."
samples.steps(cell.recipe.train)             # "about 51"

Needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import artifacts
from pipeline.recipe.recipe import Cell
from pipeline.recipe.sections import DataSection, TrainSection
from pipeline.stages.layout import Layout


@dataclass(frozen=True)
class Samples:
    """What is trained on, validated on and tested on, and the safety pairs; None where it is not known.

    rows: usable ones of the task. exact: whether the numbers are those of the prepared sets. Else rows that other sets
    hold, that repeat each other, or that are too long, may make them a little smaller.
    """

    rows: int | None
    test: int
    validation: int
    train: int | None
    pairs: int
    exact: bool

    def line(self) -> str:
        """What is held out and what is left, for people."""
        held = f"{self.test} held out to test and {self.validation} to validate"
        if self.train is None:
            return f"{held}; how many are left to train on is known once they are prepared"
        rows = "prepared" if self.rows is None else f"{self.rows} rows"
        pairs = f"{self.pairs} safety pairs" if self.exact else f"up to {self.pairs} safety pairs"
        return f"{rows}: {held}, {self._about}{self.train} to train on; {pairs}"

    def steps(self, train: TrainSection) -> str:
        """How many steps a training takes, for people; its epochs where the samples are not known."""
        if train.steps is not None:
            return str(train.steps)
        assert train.epochs is not None, "one of the two is set"
        if self.train is None:
            return f"{train.epochs:g} epochs"
        return f"{self._about}{math.ceil(train.epochs * self.train / train.batch_size)}"

    def notes(self, cells: Sequence[Cell]) -> list[str]:
        """A sentence for every batch that is larger than what it is drawn from, so that samples repeat within it."""
        found = []
        for cell in cells:
            size, pairs = cell.recipe.train.batch_size, cell.recipe.safety_pairs
            if self.train is not None and size > self.train:
                found.append(
                    f"train.batch_size {size} is more than {self._about or 'the '}{self.train} samples to train on, "
                    "so that samples repeat within a step: lower it, or use more data"
                )
            if cell.recipe.draws_pairs and pairs.refresh_every and pairs.batch_size > self.pairs:
                which = "there are" if self.exact else "data.safety_pairs asks for"
                found.append(
                    f"safety_pairs.batch_size {pairs.batch_size} is more than the {self.pairs} pairs that {which}, "
                    "so that pairs repeat within a draw: lower it, or raise data.safety_pairs"
                )
        return list(dict.fromkeys(found))

    @property
    def _about(self) -> str:
        return "" if self.exact else "about "


def samples_of(layout: Layout, rows: int | None) -> Samples:
    """Those of the prepared sets where they are complete, else what the recipe and the rows say."""
    data = layout.base.data
    if artifacts.complete(layout.prepare()):
        try:
            facts = json.loads((layout.prepare() / artifacts.FACTS).read_text())
            counts = facts["samples"]
            names = ("task_test", "task_validation", "task_train", "safety_pairs")
            test, validation, train, pairs = found = [counts[name] for name in names]
            if all(type(number) is int and number >= 0 for number in found):
                return Samples(None, test, validation, train, pairs, True)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass  # who reads the sets says what is broken
    left = None if rows is None else rows - data.test_samples - data.validation_samples
    train = None if left is None else left + _mixed_in(data, left)
    return Samples(
        rows, data.test_samples, data.validation_samples, train, data.safety_pairs, False
    )


def _mixed_in(data: DataSection, samples: int) -> int:
    return round(data.harmful_fraction / (1 - data.harmful_fraction) * samples)
