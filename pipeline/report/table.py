"""The rows of the report's tables, which system/tables.py renders.

rows = table_rows(collected); print(as_text(rows, HEADER))
"""

from __future__ import annotations

from typing import Any

from pipeline.attacks.attacks import ATTACKS
from pipeline.report.collect import Collected, Method

HEADER = (
    "method",
    "harmful answered",
    "look-alikes refused",
    "ordinary refused",
    "task exact match",
    "task test loss",
    "time per step",
)
BY_FORM = (
    "method",
    *(
        f"{what}: {form}"
        for what in ("harmful answered", "look-alikes refused", "ordinary refused")
        for form in ("questions", "imperatives")
    ),
)
_FORM_KEYS = tuple(
    f"{key}/{form}"
    for key in ("non_refusal_rate", "over_refusal_rate", "ordinary_refusal_rate")
    for form in ("question", "imperative")
)
UNDER_ATTACK = ("method", "attack", "harmful answered", "harmless answered", "told apart")


def table_rows(collected: Collected) -> list[tuple[str, ...]]:
    """Rows in HEADER's order; the time per step is relative to the plain method's median."""
    reference = next(
        (m.seconds_per_step for m in collected.methods if m.name == collected.plain), None
    )
    rows: list[tuple[str, ...]] = []
    for method in collected.methods:
        name = _name(method)
        seconds = method.seconds_per_step
        rows.append(
            (
                name,
                _number(method.measures["non_refusal_rate"]),
                _number(method.measures["over_refusal_rate"]),
                _number(method.measures["ordinary_refusal_rate"]),
                _number(method.measures["exact_match"]),
                _number(method.measures["test_loss"], digits=3),
                f"{seconds / reference:.2f}x" if seconds and reference else "",
            )
        )
    return rows


def form_rows(collected: Collected) -> list[tuple[str, ...]]:
    """Rows in BY_FORM's order: every rate of refusing by the form of the prompt."""
    missing = {"value": None}
    return [
        (_name(method), *(_number(method.measures.get(key, missing)) for key in _FORM_KEYS))
        for method in collected.methods
    ]


def attack_rows(collected: Collected) -> list[tuple[str, ...]]:
    """Rows in UNDER_ATTACK's order, one for every method and attack; none without attacks."""
    rows = []
    for attack in ATTACKS:
        keys = [
            f"{attack}/{name}" for name in ("harmful_answered", "harmless_answered", "told_apart")
        ]
        rows += [
            (_name(method), attack, *(_number(method.measures[key]) for key in keys))
            for method in collected.methods
            if keys[0] in method.measures
        ]
    return rows


def _name(method: Method) -> str:
    return method.name if len(method.seeds) < 2 else f"{method.name} ({len(method.seeds)} seeds)"


def _number(measure: dict[str, Any], digits: int = 2) -> str:
    if measure["value"] is None:
        return ""
    text = f"{measure['value']:.{digits}f}"
    return (
        text
        if measure["low"] is None
        else f"{text} [{measure['low']:.{digits}f}, {measure['high']:.{digits}f}]"
    )
