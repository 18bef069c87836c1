"""Which samples share a row: told to transformers, which would ask the device in every pass.

    with rows_hold(batch.packed):
        model(input_ids=batch.input_ids, **row_arguments(model, batch.input_ids, batch.packed))

It builds its masks from positions that begin anew: a token sees what is before it in its own sample, and in sliding
windows and chunks counts from there. For which models that is the same as a row for each sample: pipeline/model/packable.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, masking_utils

from pipeline.objectives.batches import Packed

# What masking_utils asks: position ids (B, T) -> number of each token's sample in its row (B, T), or None for one each.
_QUESTION = "find_packed_sequence_indices"


@contextlib.contextmanager
def rows_hold(packed: Packed | None) -> Iterator[None]:
    """Inside the block transformers builds its masks for a row that holds these samples; None: one in every row.

    It would look at the position ids, and the host would wait for a GPU at every pass. ValueError for packed rows where
    this version of transformers has no such question; without them it is left alone.
    """
    asked = getattr(masking_utils, _QUESTION, None)
    if asked is None:
        if packed is not None:
            raise ValueError(
                f"transformers {version('transformers')} has no masking_utils.{_QUESTION}, so that packed samples "
                "might see each other: install transformers 5.23, or set train.packing to false"
            )
        yield
        return
    samples = packed and packed.samples
    setattr(masking_utils, _QUESTION, lambda position_ids: samples)
    try:
        yield
    finally:
        setattr(masking_utils, _QUESTION, asked)


def row_arguments(model: nn.Module, input_ids: torch.Tensor, packed: Packed | None) -> dict[str, Any]:
    """What a model is given beside tokens (B, T): positions of a packed row, and FlashAttention's borders.

    FlashAttention takes no mask: its form for samples of any length is told where each begins. Where there is one row,
    transformers would otherwise look for that in the positions, in every layer, and the host wait each time.
    """
    found: dict[str, Any] = {} if packed is None else {"position_ids": packed.positions}
    if len(input_ids) == 1 and _flash(model):
        length = input_ids.shape[1]
        whole = torch.arange(2, dtype=torch.int32, device=input_ids.device) * length
        borders, longest = (whole, length) if packed is None else (packed.borders, packed.longest)
        found |= {f"cu_seq_lens_{side}": borders for side in "qk"} | {f"max_length_{side}": longest for side in "qk"}
    return found


def _flash(model: nn.Module) -> bool:
    modules = model.modules() if isinstance(model, nn.Module) else ()  # it may be a function around a model
    inner = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    return inner is not None and "flash" in str(inner.config.get_text_config()._attn_implementation)
