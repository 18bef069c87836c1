"""SAFT's scores and how their threshold is chosen (arXiv 2410.10014); what is not of a model, in float64.

    scores = saft_scores(embeddings)                       # (N, 4): s_i for k = 1 to 4
    choice = choose(scores, subset, labels, None)          # k and threshold with the best F1 on labelled samples

`s_i = 1/k * sum_{j<=k} <e_i, v_j>^2` with e the centred embeddings and v_j their first right singular vectors; a sample
is dropped where s_i > threshold. The published protocol chooses k from 1 to 4 and the threshold from 100 even steps
between the scores' ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MAX_COMPONENTS = 4
_CANDIDATES = 100
_RESAMPLES = 1000


@dataclass(frozen=True)
class Choice:
    """components: k. threshold: drop above it. how: labels, or contamination."""

    components: int
    threshold: float
    how: str


def saft_scores(embeddings: torch.Tensor) -> np.ndarray:
    """Scores (N, MAX_COMPONENTS), float64; column k-1 is of k singular vectors. embeddings: (N, D)."""
    centred = embeddings.double() - embeddings.double().mean(dim=0)
    # Right singular vectors as eigenvectors of D x D: N may be far larger than D. eigh sorts ascending.
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :MAX_COMPONENTS]
    squares = (centred @ vectors).square().numpy()
    return np.cumsum(squares, axis=1) / np.arange(1, squares.shape[1] + 1)


def choose(
    scores: np.ndarray, subset: np.ndarray, labels: np.ndarray, components: int | None
) -> Choice:
    """k (unless given) and threshold with the best F1 on the labelled samples; the lowest k and threshold of equals.

    scores: (N, K) of all samples, between whose ends the candidates lie; subset: numbers of the labelled ones;
    labels: bool, True is harmful.
    """
    best = (-1.0, 0, 0.0)
    for k in [components] if components else range(1, scores.shape[1] + 1):
        column = scores[:, k - 1]
        for threshold in np.linspace(column.min(), column.max(), _CANDIDATES):
            value = f1(column[subset] > threshold, labels)
            if value > best[0]:
                best = (value, k, float(threshold))
    return Choice(best[1], best[2], "labels")


def choose_by_share(scores: np.ndarray, contamination: float, components: int | None) -> Choice:
    """Without labels: the threshold above which a share of `contamination` lies, for k given, or 1."""
    k = components or 1
    return Choice(k, float(np.quantile(scores[:, k - 1], 1 - contamination)), "contamination")


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a harmful sample scores above a harmless one, ties counting half; nan without both kinds."""
    from scipy.stats import rankdata

    positive, negative = int(labels.sum()), int((~labels).sum())
    if not positive or not negative:
        return float("nan")
    return float(
        (rankdata(scores)[labels].sum() - positive * (positive + 1) / 2) / (positive * negative)
    )


def f1(flagged: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of the harmful; 0 where nothing right is flagged."""
    right = float((flagged & labels).sum())
    return 2 * right / float(flagged.sum() + labels.sum()) if right else 0.0


def with_interval(
    measure: Callable[[np.ndarray, np.ndarray], float],
    values: np.ndarray,
    labels: np.ndarray,
    seed: int = 0,
) -> dict[str, Any]:
    """The measure with its 95% bootstrap interval over samples (percentiles of 1000 resamples that
    hold both kinds), and n.
    """
    rng = np.random.default_rng(seed)
    found: list[float] = []
    while len(found) < _RESAMPLES and labels.any() and not labels.all():
        drawn = rng.integers(len(labels), size=len(labels))
        if labels[drawn].any() and not labels[drawn].all():
            found.append(measure(values[drawn], labels[drawn]))
    low, high = np.percentile(found, [2.5, 97.5]).tolist() if found else (None, None)
    return {
        "value": measure(values, labels) if found else None,
        "low": low,
        "high": high,
        "n": len(labels),
    }
