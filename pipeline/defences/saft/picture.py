"""The picture of a filter: how its scores lie, where the threshold is,
and how well the scores and the keywords tell the labelled apart.

draw_scores(decision, Path("scores.png"))
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from pipeline.defences.saft.decision import Decision

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_KINDS = ((1, "harmful", "#c8553d"), (0, "harmless", "#3b6ea5"), (-1, "label not known", "#8894a3"))


def draw_scores(decision: Decision, path: Path) -> None:
    """Histograms of the scores by label, on a logarithmic axis, with the threshold."""
    score, choice = decision.scores[:, decision.choice.components - 1], decision.choice
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    positive = score[score > 0]
    bins = (
        np.geomspace(positive.min(), positive.max() * 1.0001, 40).tolist()
        if len(positive) and positive.max() > positive.min()
        else 40
    )
    for value, name, colour in _KINDS:
        chosen = score[decision.labels == value]
        if len(chosen):
            axes.hist(chosen, bins=bins, color=colour, alpha=0.6, label=f"{name} ({len(chosen)})")
    if not isinstance(bins, int):
        axes.set_xscale("log")
    axes.axvline(
        choice.threshold, color="#1c2430", linewidth=1, label=f"threshold, from {choice.how}"
    )
    axes.set_xlabel(
        f"score, k = {choice.components} ({decision.facts['position']}, layer {decision.facts['layer']})"
    )
    axes.set_ylabel("training samples")
    found = (
        decision.facts["saft"]["labelled"]["auroc"]["value"],
        decision.facts["keywords"]["labelled"]["auroc"]["value"],
    )
    if None not in found:
        axes.set_title(
            f"AUROC on {len(decision.subset)} labelled samples: {found[0]:.2f}; keywords alone: {found[1]:.2f}",
            fontsize=10,
        )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
