"""The figures, drawn from logged runs only; each returns None where there is nothing to draw.

draw_all(collected, Path("report/figures"))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.collect import Collected, Method

_COLOURS = ("#3b6ea5", "#c8553d", "#588157", "#8d5a97", "#b08900", "#4f5d75", "#2a9d8f")
_MARKS = "os^DvPX"
# rate above which a mark is hollow: such a model is safe in part because it refuses what is harmless
_OVER_REFUSING = 0.1

Draw = Callable[[Collected], Figure | None]
# name -> (caption, what draws it)
FIGURES: dict[str, tuple[str, Draw]] = {}


def _figure(name: str, caption: str) -> Callable[[Draw], Draw]:
    def register(draw: Draw) -> Draw:
        FIGURES[name] = (caption, draw)
        return draw

    return register


def draw_all(collected: Collected, folder: Path) -> list[tuple[Path, str]]:
    """Save every figure that has data as PNG; returns (path, caption) in order."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (caption, draw) in FIGURES.items():
        figure = draw(collected)
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
            drawn.append((path, caption))
            plt.close(figure)
    return drawn


@_figure(
    "safety_usefulness",
    "Safety against usefulness. Left: up and left is better, where the task is learned and "
    "harmful prompts are still refused. Right: down and left is better, where harmful prompts "
    "are refused and harmless ones are answered. Bars: 95% intervals. Hollow: more than "
    f"{_OVER_REFUSING:.0%} of the ordinary instructions, or of the look-alikes, are refused, too.",
)
def _safety_usefulness(collected: Collected) -> Figure:
    figure, pair = plt.subplots(1, 2, figsize=(11, 4.2))
    harmless = (
        "ordinary"
        if any(
            method.measures["ordinary_refusal_rate"]["value"] is not None
            for method in collected.methods
        )
        else "over"
    )
    what = {"ordinary": "ordinary instructions refused", "over": "look-alikes refused"}[harmless]
    of_axes = {
        "exact_match": "task exact match (higher is better)",
        f"{harmless}_refusal_rate": f"{what} (lower is better)",
    }
    for axes, (key, label) in zip(pair, of_axes.items(), strict=True):
        _style(axes, "harmful prompts answered (lower is safer)", label)
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
        marks = [
            _mark(axes, number, method, key) for number, method in enumerate(collected.methods)
        ]
    names = [method.name for method in collected.methods]
    figure.legend(
        marks,
        names,
        frameon=False,
        fontsize=9,
        loc="center left",
        bbox_to_anchor=(0.91, 0.5),
        ncols=-(-len(names) // 16),
    )
    return figure


def _mark(axes: Axes, number: int, method: Method, key: str) -> Any:
    """A method's place, with its intervals; what the legend shows of it."""
    # shifted from round to round: no two methods look alike
    mark = _MARKS[(number + number // len(_COLOURS)) % len(_MARKS)]
    x, y = method.measures["non_refusal_rate"], method.measures[key]
    hollow = (
        max(
            method.measures[refused]["value"] or 0
            for refused in ("over_refusal_rate", "ordinary_refusal_rate")
        )
        > _OVER_REFUSING
    )
    # a recipe may have no harmless prompts
    across, up = (math.nan if measure["value"] is None else measure["value"] for measure in (x, y))
    bars = axes.errorbar(
        across, up, xerr=_error(x), yerr=_error(y), fmt=mark, color=_COLOURS[number % len(_COLOURS)],
        markersize=8, capsize=3, elinewidth=1, markerfacecolor="white" if hollow else None,
    )  # fmt: skip
    return bars.lines[0]


@_figure(
    "losses",
    "Validation losses during training. Left: the task. Right: affirmative openings to held-out "
    "harmful prompts; falling means the model comes to like them.",
)
def _losses(collected: Collected) -> Figure | None:
    keys = {
        "validation/task_loss": "task validation loss",
        "validation/harmful_loss": "loss of harmful openings",
    }
    if not any(
        key in line for m in collected.methods for log in m.logs for line in log for key in keys
    ):
        return None
    figure, pair = plt.subplots(1, 2, figsize=(9, 3.4))
    for axes, (key, label) in zip(pair, keys.items(), strict=True):
        _style(axes, "step", label)
        for method, colour in _trained(collected):
            _lines(axes, method, key, colour)
    _legend(pair[0])
    return figure


@_figure(
    "cumulated_l_su",
    "Cumulated L_su = L_useful(W + dW, V) - L_useful(W, V) over the steps, V being the one the "
    "step's probe passes used. Rising: the harmful direction hurts the task.",
)
def _cumulated(collected: Collected) -> Figure | None:
    methods = [
        (m, c)
        for m, c in _trained(collected)
        if any("sap/delta_loss" in line for log in m.logs for line in log)
    ]
    if not methods:
        return None
    figure, axes = _axes("step", "cumulated L_su")
    for method, colour in methods:
        for seed, log in zip(method.seeds, method.logs, strict=True):
            points = [
                (line["step"], line["sap/delta_loss"]) for line in log if "sap/delta_loss" in line
            ]
            axes.plot(
                [s for s, _ in points],
                list(accumulate(v for _, v in points)),
                color=colour,
                label=method.name if seed == method.seeds[0] else None,
            )
    _legend(axes)
    return figure


@_figure(
    "signal_noise",
    "What the probe sees: the relative change of its gradient under the perturbation (line) and "
    "the part of it that is rounding or curvature (dots). Dots above the line: V means nothing.",
)
def _signal_noise(collected: Collected) -> Figure | None:
    return _over_steps(
        collected,
        "relative to the probe gradient",
        {"sap/probe_signal": "-", "sap/probe_noise": "o"},
        log=True,
    )


@_figure("correction", "How far V turns the task's gradient: |g(V) - g(0)| / |g(0)|.")
def _correction(collected: Collected) -> Figure | None:
    return _over_steps(collected, "correction", {"sap/correction": "o-"})


@_figure(
    "direction",
    "The safety direction layer by layer: its norm, and its cosine with the task's gradient (arXiv "
    "2505.16737, Fig. 3, at the start of training).",
)
def _direction(collected: Collected) -> Figure | None:
    if collected.direction is None or not collected.direction["layers"]:
        return None
    layers = collected.direction["layers"]
    figure, pair = plt.subplots(1, 2, figsize=(9, 3.2))
    for axes, key, label in zip(
        pair,
        ("safety_norm", "useful_cosine"),
        ("norm of the safety gradient", "cosine with the task gradient"),
        strict=True,
    ):
        _style(axes, "decoder layer", label)
        axes.bar([row["layer"] for row in layers], [row[key] for row in layers], color=_COLOURS[0])
    return figure


def _over_steps(
    collected: Collected, label: str, keys: dict[str, str], log: bool = False
) -> Figure | None:
    methods = [
        (m, c)
        for m, c in _trained(collected)
        if any(key in line for entries in m.logs for line in entries for key in keys)
    ]
    if not methods:
        return None
    figure, axes = _axes("step", label)
    if log:
        axes.set_yscale("log")
    for method, colour in methods:
        for key, mark in keys.items():
            _lines(
                axes,
                method,
                key,
                colour,
                mark,
                f"{method.name}, {key.removeprefix('sap/').replace('_', ' ')}",
            )
    _legend(axes)
    return figure


def _lines(
    axes: Axes, method: Method, key: str, colour: str, mark: str = "-", label: str | None = None
) -> None:
    for number, log in enumerate(method.logs):
        points = [(line["step"], line[key]) for line in log if key in line]
        axes.plot(
            [s for s, _ in points],
            [v for _, v in points],
            mark,
            color=colour,
            markersize=4,
            label=(label or method.name) if number == 0 else None,
        )


def _trained(collected: Collected) -> list[tuple[Method, str]]:
    """Methods with logs, each in the colour it has in every figure."""
    return [(m, _COLOURS[i % len(_COLOURS)]) for i, m in enumerate(collected.methods) if m.logs]


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(5.6, 3.8))
    _style(axes, x, y)
    return figure, axes


def _style(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def _error(measure: dict) -> list[list[float]] | None:
    if measure["low"] is None:
        return None
    return [
        [max(0.0, measure["value"] - measure["low"])],
        [max(0.0, measure["high"] - measure["value"])],
    ]
