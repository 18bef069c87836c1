"""Which samples share a row: what transformers asks the device in every pass, told from what the batch knows.

    with rows_hold(batch.samples):
        model(input_ids=batch.input_ids)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers import masking_utils

# What masking_utils asks: position ids (B, T) -> number of each token's sample in its row (B, T), or None for one each.
_QUESTION = "find_packed_sequence_indices"


@contextlib.contextmanager
def rows_hold(samples: torch.Tensor | None) -> Iterator[None]:
    """Inside the block transformers builds its masks for rows that hold these samples: int64 (B, T), or None for one each.

    It would look at the position ids, and the host would wait for a GPU at every pass. A transformers that has no such
    question, or asks it elsewhere, asks as ever.
    """
    asked = getattr(masking_utils, _QUESTION, None)
    if asked is None:
        yield
        return
    setattr(masking_utils, _QUESTION, lambda position_ids: samples)
    try:
        yield
    finally:
        setattr(masking_utils, _QUESTION, asked)
