"""Differences between methods, paired by prompt and seed, with bootstrap intervals over prompts nested in seeds.

    rows = differences(collected.outcomes, reference="sft")

A resample draws seeds with replacement, and within each drawn seed prompts with replacement, the same for both methods: what the two share
(the seed's data order and adapter, a prompt's difficulty) cancels. With three seeds such an interval is rather too narrow than too wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000
# measure -> seed -> prompt's id -> 0 or 1
Outcomes = dict[str, dict[int, dict[str, float]]]
MEASURES = {"non_refusal": "non-refusal", "exact": "task exact match"}
HEADER = ("method", "minus", *MEASURES.values())


@dataclass(frozen=True)
class Difference:
    """method minus reference: mean over seeds and prompts, and its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]{' *' if self.clear else ''}"


def difference(method: dict[int, dict[str, float]], reference: dict[int, dict[str, float]], seed: int = 0) -> Difference | None:
    """None where no seed and prompt is common to both. Both map seed -> prompt's id -> outcome."""
    gaps = []
    for common in sorted(method.keys() & reference.keys()):
        prompts = sorted(method[common].keys() & reference[common].keys())
        if prompts:
            gaps.append(np.array([method[common][p] - reference[common][p] for p in prompts]))
    if not gaps:
        return None
    rng, found = np.random.default_rng(seed), []
    for _ in range(_RESAMPLES):
        drawn = [gaps[i] for i in rng.integers(len(gaps), size=len(gaps))]
        found.append(np.mean([rng.choice(gap, size=len(gap)).mean() for gap in drawn]))
    low, high = np.percentile(found, [2.5, 97.5])
    return Difference(float(np.mean([gap.mean() for gap in gaps])), float(low), float(high))


def difference_rows(outcomes: dict[str, Outcomes], references: list[str]) -> list[tuple[str, ...]]:
    """Rows in HEADER's order: every method minus every reference that is not itself. outcomes: method -> measure -> seed -> id -> outcome."""
    rows = []
    for reference in references:
        for method, own in outcomes.items():
            if method != reference:
                cells = [difference(own[key], outcomes[reference][key]) for key in MEASURES]
                rows.append((method, reference, *("" if cell is None else str(cell) for cell in cells)))
    return rows
