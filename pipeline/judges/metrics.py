"""Numbers with their uncertainty.

share([True, False, True])      # {"value": 0.667, "low": 0.208, "high": 0.939, "n": 3}, Wilson 95%
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

_Z = NormalDist().inv_cdf(0.975)
# Student's t, 97.5%, for 1..9 degrees of freedom; the normal's beyond would be close enough from 30 on,
# the last value is kept until then.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def share(flags: Sequence[bool]) -> dict[str, Any]:
    """Share of true flags with its Wilson 95% interval; value None for no flags."""
    n = len(flags)
    return (
        {"value": None, "low": None, "high": None, "n": 0} if n == 0 else wilson(sum(flags) / n, n)
    )


def wilson(p: float, n: int) -> dict[str, Any]:
    """A share p of n with its Wilson 95% interval."""
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


def difference_of_shares(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """one minus other, of different prompts, with Newcombe's 95% interval (his method 10,
    from the two Wilson intervals); n is the smaller.
    """
    if None in (one["value"], other["value"]):
        return {"value": None, "low": None, "high": None, "n": 0}
    value = one["value"] - other["value"]
    below = math.hypot(one["value"] - one["low"], other["high"] - other["value"])
    above = math.hypot(one["high"] - one["value"], other["value"] - other["low"])
    return {
        "value": value,
        "low": value - below,
        "high": value + above,
        "n": min(one["n"], other["n"]),
    }


def paired_interval(first_only: float, second_only: float, n: int) -> tuple[float, float]:
    """Tango's 95% score interval for the difference of two shares of the same n prompts
    (Statistics in Medicine 17:891, 1998).

    first_only, second_only: prompts on which only the first, or only the second, was true; means over seeds need not be
    whole numbers. It does not collapse where there is none: 12 of 12 equal gives [-0.24, 0.24].
    """

    def score(delta: float) -> float:
        a = 2 * n
        b = -first_only - second_only + (2 * n - first_only + second_only) * delta
        c = -second_only * delta * (1 - delta)
        q = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = n * (2 * q + delta * (1 - delta))
        gap = first_only - second_only - n * delta
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap)

    value = (first_only - second_only) / n
    return _root(score, -1.0, value, _Z), _root(score, value, 1.0, -_Z)


def _root(falling: Callable[[float], float], low: float, high: float, wanted: float) -> float:
    """Where a falling function takes a value, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > wanted else (low, middle)
    return (low + high) / 2


def exact_match(response: str, expected: str) -> bool:
    """Equal after folding white space and a trailing semicolon; case counts."""

    def fold(text: str) -> str:
        return " ".join(text.split()).rstrip(";").rstrip()

    return fold(response) == fold(expected)
