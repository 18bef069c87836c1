"""Differences between methods, paired by prompt and seed, with bootstrap intervals over seeds and prompts.

    rows = difference_rows(collected.outcomes, ["sft", "safe_mix"])

Every seed answers the same prompts, so the two are crossed, not nested: a resample draws seeds with replacement and
prompts with replacement, the same prompts for all drawn seeds. (Prompts drawn anew within every seed would count three
seeds' answers to one prompt as three prompts, and give intervals that are too narrow.) Both methods see the same draw:
what they share, a seed's data order and adapter and a prompt's difficulty, cancels. With three seeds such an interval
is still rather too narrow than too wide.

A bootstrap knows nothing of what it has not seen: where 12 of 12 prompts come out alike, its interval is a point. So
each end is the further of the bootstrap's and of a score interval for paired shares (metrics.paired_interval), which
counts every prompt once, whatever the number of seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.judges.metrics import paired_interval

_RESAMPLES = 2000
# measure -> seed -> prompt's id -> 0 or 1
Outcomes = dict[str, dict[int, dict[str, float]]]
MEASURES = {
    "non_refusal": "non-refusal",
    "over_refusal": "look-alikes refused",
    "ordinary": "ordinary refused",
    "exact": "task exact match",
}
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


def difference(
    method: dict[int, dict[str, float]], reference: dict[int, dict[str, float]], seed: int = 0
) -> Difference | None:
    """None where no seed, or no prompt of all its seeds, is common to both. Both map seed -> prompt's id -> outcome."""
    seeds = sorted(method.keys() & reference.keys())
    prompts = (
        sorted(set.intersection(*(method[s].keys() & reference[s].keys() for s in seeds)))
        if seeds
        else []
    )
    if not prompts:
        return None
    gaps = np.array([[method[s][p] - reference[s][p] for p in prompts] for s in seeds])
    rng = np.random.default_rng(seed)
    rows, columns = (rng.integers(size, size=(_RESAMPLES, size)) for size in gaps.shape)
    found = [gaps[np.ix_(row, column)].mean() for row, column in zip(rows, columns, strict=True)]
    low, high = np.percentile(found, [2.5, 97.5])
    score_low, score_high = paired_interval(
        (gaps > 0).sum() / len(seeds), (gaps < 0).sum() / len(seeds), len(prompts)
    )
    return Difference(float(gaps.mean()), float(min(low, score_low)), float(max(high, score_high)))


def difference_rows(outcomes: dict[str, Outcomes], references: list[str]) -> list[tuple[str, ...]]:
    """Rows in HEADER's order: every method minus every reference that is not itself.

    outcomes: method -> measure -> seed -> id -> outcome.
    """
    rows = []
    for reference in references:
        for method, own in outcomes.items():
            if method != reference:
                cells = [difference(own[key], outcomes[reference][key]) for key in MEASURES]
                rows.append(
                    (method, reference, *("" if cell is None else str(cell) for cell in cells))
                )
    return rows
