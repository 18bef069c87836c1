"""Token losses without all of their logits: the language-model head and the cross entropy, some tokens at a time.

    losses = head_losses(model, lambda: model(input_ids=ids, logits_to_keep=columns).logits, targets)

Logits are the largest tensor of a pass: tokens x vocabulary, three times in float32. A token's loss and its gradient
know nothing of other tokens, so a chunk's logits can go before the next one's come. While the model's own forward pass
runs, its head returns losses in place of logits: hooks that gather weights (ZeRO-3, FSDP2) fire as always.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.objectives.batches import Targets
from pipeline.objectives.logits import MOST_LOGITS, touches_logits

_CAPPING = re.compile(
    r"if self\.config\.final_logit_softcapping is not None:\n(?:\s+logits = .*\n)+"
)
_heads: weakref.WeakKeyDictionary[nn.Module, nn.Linear | None] = weakref.WeakKeyDictionary()


def head_losses(
    model: nn.Module, logits: Callable[[], torch.Tensor], targets: Targets
) -> torch.Tensor | None:
    """Cross entropy (N,) of a batch's supervised tokens, in float32 (float64 for float64 models);
    None where all logits may be computed at once.

    logits: calls the model for those of `targets.columns`. None too where the model does something to its logits after
    the head, or the head is adapted.
    """
    if model not in _heads:
        _heads[model] = _plain_head(model)
    head = _heads[model]
    if head is None or len(targets.places) * head.out_features <= MOST_LOGITS:
        return None
    with _answering(head, targets):
        return logits()


def _plain_head(model: nn.Module) -> nn.Linear | None:
    """The head, where losses can stand in for what it returns."""
    # it may be a function around a model
    modules = model.modules() if isinstance(model, nn.Module) else ()
    inner = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    head = None if inner is None else inner.get_output_embeddings()
    if (
        inner is None
        or type(head) is not nn.Linear
        or "bias" in dict(head.named_parameters())
        or touches_logits(inner.config.get_text_config().to_dict())
    ):
        return None
    try:
        source = inspect.getsource(type(inner).forward)
    except (OSError, TypeError):
        return None
    # One assignment is the head's own: whatever else is done to logits would be done to losses.
    # Capping is not done here.
    source = _CAPPING.sub("", source).replace("logits=logits", "")
    return head if len(re.findall(r"\blogits\s*[-+*/]?=(?!=)", source)) == 1 else None


@contextlib.contextmanager
def _answering(head: nn.Linear, targets: Targets) -> Iterator[None]:
    """Inside the block the head answers with losses; its weights and hooks are its own."""

    def losses(hidden: torch.Tensor) -> torch.Tensor:
        # a model that takes no notice of logits_to_keep
        if hidden.shape[1] != len(targets.columns):
            hidden = hidden[:, targets.columns]
        hidden = hidden.flatten(0, 1)
        if len(targets.places) < len(hidden):
            hidden = hidden[targets.places]
        return _TokenLosses.apply(
            hidden, head.weight, targets.tokens, max(1, MOST_LOGITS // head.out_features)
        )

    assert "forward" not in vars(head), "the head is asked for losses already"
    vars(head)["forward"] = losses
    try:
        yield
    finally:
        del vars(head)["forward"]


class _TokenLosses(torch.autograd.Function):
    """hidden (N, H), weight (V, H), tokens (N,) -> losses (N,).

    The hidden state's gradient is made beside the loss, while logits are there; the weight's, where it is trained, from
    logits computed again, since it is a sum over tokens and their weights come with the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        losses = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _parts(len(hidden), chunk):
            logits = (hidden[part] @ weight.T).to(dtype)
            total = logits.logsumexp(dim=1)
            losses[part] = total - logits.gather(1, tokens[part, None]).squeeze(1)
            if gradient is not None:
                gradient[part] = _error(logits, total, tokens[part]).to(hidden.dtype) @ weight
        # The weight itself, not a view: the engines free and gather it in between.
        ctx.save_for_backward(
            gradient, *((hidden, weight, tokens) if ctx.needs_input_grad[1] else ())
        )
        ctx.chunk = chunk
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, *rest = ctx.saved_tensors  # rest: hidden, weight and tokens, or nothing
        of_hidden = (
            None
            if gradient is None
            else (gradient.to(upstream.dtype) * upstream[:, None]).to(gradient.dtype)
        )
        of_weight = None
        if rest:
            hidden, weight, tokens = rest
            of_weight = _weight_gradient(hidden, weight, tokens, upstream, ctx.chunk)
        return of_hidden, of_weight, None, None


def _weight_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    upstream: torch.Tensor,
    chunk: int,
) -> torch.Tensor:
    # In float32: a running sum in bfloat16 is rounded once a chunk, and one product of all tokens once.
    found = torch.zeros_like(weight, dtype=upstream.dtype)
    for part in _parts(len(hidden), chunk):
        logits = (hidden[part] @ weight.T).to(upstream.dtype)
        error = _error(logits, logits.logsumexp(dim=1), tokens[part]) * upstream[part, None]
        found += error.to(weight.dtype).T @ hidden[part]
    return found.to(weight.dtype)


def _error(logits: torch.Tensor, total: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """softmax - one hot, in the logits' place."""
    error = logits.sub_(total[:, None]).exp_()
    return error.scatter_add_(1, tokens[:, None], error.new_full((len(tokens), 1), -1.0))


def _parts(count: int, chunk: int) -> list[slice]:
    return [slice(low, low + chunk) for low in range(0, count, chunk)]
