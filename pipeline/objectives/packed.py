"""Which samples share a row: told to transformers, which would ask the device in every pass.

    with rows_hold(batch.packed):
        model(input_ids=batch.input_ids, **row_arguments(model, batch.input_ids, batch.packed))

It builds its masks from positions that begin anew: a token sees what is before it in its own sample, and in sliding
windows and chunks counts from there. For which models that is the same as a row for each sample:
pipeline/model/packable.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.libraries.transformers_private import attention_of, samples_in_rows
from pipeline.objectives.batches import Packed


def rows_hold(packed: Packed | None) -> AbstractContextManager[None]:
    """Inside the block transformers builds its masks for a row that holds these samples; None: one in every row.

    It would look at the position ids, and the host would wait for a GPU at every pass. ValueError for packed rows where
    this version of transformers has no such question; without them it is left alone.
    """
    samples = None if packed is None else packed.samples
    return samples_in_rows(samples, packed is not None)


def row_arguments(
    model: nn.Module, input_ids: torch.Tensor, packed: Packed | None
) -> dict[str, Any]:
    """What a model is given beside tokens (B, T): positions of a packed row, and FlashAttention's borders.

    FlashAttention takes no mask: its form for samples of any length is told where each begins. Where there is one row,
    transformers would otherwise look for that in the positions, in every layer, and the host wait each time.
    """
    found: dict[str, Any] = {} if packed is None else {"position_ids": packed.positions}
    if len(input_ids) == 1 and _flash(model):
        length = input_ids.shape[1]
        whole = torch.arange(2, dtype=torch.int32, device=input_ids.device) * length
        borders, longest = (whole, length) if packed is None else (packed.borders, packed.longest)
        found |= {f"cu_seq_lens_{side}": borders for side in "qk"} | {
            f"max_length_{side}": longest for side in "qk"
        }
    return found


def _flash(model: nn.Module) -> bool:
    # it may be a function around a model
    modules = model.modules() if isinstance(model, nn.Module) else ()
    inner = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    return inner is not None and "flash" in attention_of(inner.config)
