"""The losses, as shares of the global batch: summed over micro-batches and ranks they are the loss.

Useful loss: summed over supervised tokens / supervised tokens of the global batch. Safety loss (Definition 3.1 of arXiv
2505.16737): token mean per response, mean over the global pairs. Both with the causal shift. No engine has to weigh
anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.objectives.batches import MicroBatch, PairBatch
from pipeline.objectives.head import head_losses
from pipeline.objectives.packed import row_arguments, rows_hold


def useful_loss(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Cross entropy of this micro-batch's supervised tokens over the global count: a scalar share, float32."""
    with dropout_seed(batch.seed):
        token_losses = _token_losses(model, batch)
    return token_losses.sum() / batch.global_tokens


def safety_loss(contrastive: str) -> Callable[[nn.Module, PairBatch], torch.Tensor]:
    """The contrastive loss function: `difference` (Definition 3.1) or `logsigmoid` (reference
    code's form, token means).
    """

    def loss(model: nn.Module, batch: PairBatch) -> torch.Tensor:
        with dropout_seed(batch.seed):
            token_losses = _token_losses(model, batch)
        pairs = batch.input_ids.shape[0] // 2  # rows 0..pairs-1 are chosen, the rest rejected
        rows, zeros = batch.targets.rows, token_losses.new_zeros(2 * pairs)
        sums = zeros.index_add(0, rows, token_losses)
        counts = zeros.index_add(0, rows, torch.ones_like(token_losses)).clamp(min=1)
        chosen, rejected = (sums / counts).split(pairs)
        values = (
            chosen - rejected if contrastive == "difference" else -F.logsigmoid(rejected - chosen)
        )
        return (values * batch.weights).sum() / batch.global_pairs

    return loss


def _token_losses(model: nn.Module, batch: MicroBatch | PairBatch) -> torch.Tensor:
    """Cross entropy of every supervised token (N,), in float32 (float64 for float64 models).

    Logits are computed only at positions whose next token is supervised (the language-model head is a fifth of a small
    model), and of many tokens not all at a time (head.py).
    """
    targets, packed = batch.targets, batch.packed if isinstance(batch, MicroBatch) else None

    def computed() -> torch.Tensor:
        with rows_hold(packed):
            given = row_arguments(model, batch.input_ids, packed)
            return model(
                input_ids=batch.input_ids, logits_to_keep=targets.columns, use_cache=False, **given
            ).logits

    losses = head_losses(model, computed, targets)
    if losses is not None:
        return losses
    logits = computed()
    if logits.shape[1] != len(targets.columns):  # a model that takes no notice of logits_to_keep
        logits = logits[:, targets.columns]
    logits = logits.flatten(0, 1)
    if len(targets.places) < len(logits):
        logits = logits[targets.places]
    dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
    return F.cross_entropy(logits.to(dtype), targets.tokens, reduction="none")


@contextlib.contextmanager
def dropout_seed(seed: int) -> Iterator[None]:
    """Fix the dropout masks of a forward pass to `seed` and leave the generators as they were.

    All passes of one step over one micro-batch see the same masks: different ones would swamp grad_V L_su (methods.md,
    SAP). A recomputing backward pass gets them too, because checkpointing keeps the generator's state of the forward
    pass.
    """
    # Not torch.manual_seed: it has a stack trace written for every kind of accelerator that is not there, at each call.
    generators = [
        torch.default_generator,
        *(
            [torch.cuda.default_generators[torch.cuda.current_device()]]
            if torch.cuda.is_initialized()
            else []
        ),
    ]
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
