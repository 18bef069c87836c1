"""What a filter has decided, and by what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.defences.saft.saft import Choice


@dataclass(frozen=True)
class Decision:
    """scores: (N, 4), one column per k.

    labels: 1 harmful, 0 harmless, -1 not known. subset: numbers of the labelled samples that chose.

    words: keywords found, refusals: whether the response refuses, dropped: what to leave out, all (N,).
    refused: why nothing is dropped.
    """

    scores: np.ndarray
    labels: np.ndarray
    subset: np.ndarray
    words: np.ndarray
    refusals: np.ndarray
    choice: Choice
    dropped: np.ndarray
    refused: str | None
    facts: dict[str, Any]
    warnings: list[str]
