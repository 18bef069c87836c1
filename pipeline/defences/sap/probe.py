"""The probe: one vector v_j per chosen decoder layer, added to its output, `x_j = l_j(x_{j-1}) + v_j`.

    probe = Probe(decoder_layers(model), layers=[10, 11], hidden_size=576)
    with probe.active(probe.zeros()) as v:
        loss = model(**batch).loss
        gradient = torch.autograd.grad(loss, v)

V lives outside the module, so no engine shards it; the hooks die with the `with` block, which must therefore hold the
backward pass too (activation checkpointing runs the hooks a second time there). Source: arXiv 2505.16737, Section 3;
one vector per layer, broadcast over batch and sequence, as in the reference code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.model.models import decoder_layers, hidden_size
from pipeline.recipe.layer_choice import probed_layers


def probe_of(module: nn.Module, layers: str | list[int] | list[float]) -> Probe:
    """The probe of a model. layers: sap.layers. ValueError where the model has none such."""
    of_model = decoder_layers(module)
    return Probe(of_model, probed_layers(layers, len(of_model)), hidden_size(module))


class _AddProbe(torch.autograd.Function):
    """hidden_states (B, T, D) + v (D,).

    Backward: the gradient of v is summed over B and T in v's dtype (float32), not in bf16.
    """

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.dtype = v.dtype
        return hidden_states + v.to(hidden_states.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        grad_v = grad_output.sum(dim=(0, 1), dtype=ctx.dtype) if ctx.needs_input_grad[1] else None
        return grad_output, grad_v


class Probe:
    """Hooks on the probed layers; holds no V of its own."""

    def __init__(
        self,
        decoder_layers: Sequence[nn.Module],
        layers: Sequence[int],
        hidden_size: int,
        dtype: torch.dtype = torch.float32,
    ):
        self.modules = [decoder_layers[index] for index in layers]
        self.layers = list(layers)
        self.shape = (len(self.layers), hidden_size)
        self.dtype = dtype

    def zeros(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """V = 0: (probed layers, hidden size), float32."""
        return torch.zeros(self.shape, dtype=self.dtype, device=device)

    @contextlib.contextmanager
    def active(self, v: torch.Tensor, requires_grad: bool = True) -> Iterator[list[torch.Tensor]]:
        """Add v (probed layers, hidden size) inside the block; yields its rows, leaves that take gradients."""
        rows = [row.detach().clone().requires_grad_(requires_grad) for row in v]
        handles = [
            module.register_forward_hook(_adder(row))
            for module, row in zip(self.modules, rows, strict=True)
        ]
        try:
            yield rows
        finally:
            for handle in handles:
                handle.remove()


def _adder(row: torch.Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (_AddProbe.apply(output[0], row), *output[1:])
        return _AddProbe.apply(output, row)

    return hook
