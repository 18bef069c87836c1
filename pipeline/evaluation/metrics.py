"""Numbers with their uncertainty.

share([True, False, True])      # {"value": 0.667, "low": 0.208, "high": 0.939, "n": 3}, Wilson 95%
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

_Z = NormalDist().inv_cdf(0.975)
# Student's t, 97.5%, for 1..9 degrees of freedom; the normal's beyond would be close enough from 30 on, the last value is kept until then.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def share(flags: Sequence[bool]) -> dict[str, Any]:
    """Share of true flags with its Wilson 95% interval; value None for no flags."""
    n = len(flags)
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    p = sum(flags) / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return {"value": p, "low": max(0.0, centre - half), "high": min(1.0, centre + half), "n": n}


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with its Student 95% interval; no interval for one value."""
    mean = fmean(values)
    if len(values) < 2:
        return {"value": mean, "low": None, "high": None, "n": len(values)}
    half = _T[min(len(values) - 2, len(_T) - 1)] * stdev(values) / math.sqrt(len(values))
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def exact_match(response: str, expected: str) -> bool:
    """Equal after folding white space and a trailing semicolon; case counts."""

    def fold(text: str) -> str:
        return " ".join(text.split()).rstrip(";").rstrip()

    return fold(response) == fold(expected)
