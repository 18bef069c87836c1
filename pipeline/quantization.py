"""Frozen weights in 4 bits (bitsandbytes' nf4), in a form that every engine can shard, for LoRA on top of them (QLoRA).

    quantise(model, sources)       # every linear layer but the head; sources: see pipeline/weights.py

bitsandbytes' own Linear4bit is not used, only its number format and kernels. Four traps of it do not exist here:
- a forward pass in eval mode repacks the weights on CPUs with AVX512_BF16, and later backward passes give no gradient to the input;
- it keeps a view of the gathered weight for the backward pass: under ZeRO-3 the whole model would stay gathered;
- its kernel for CPUs (0.50.2) takes wrong scales where rows are of 32 or 96 weights: of every odd multiple of 32;
- its scales (absmax) hang on a Parameter subclass that FSDP2 replaces by plain tensors, and are whole on every rank.
Here codes and scales are two ordinary frozen parameters. Both are cut as any other, and a rank quantises only the blocks that it keeps:
a block of 64 weights knows nothing of its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from pipeline.weights import Source, Sources, placeholder, tensor_source

BLOCK = 64  # weights that share a scale; bitsandbytes' default
_CHUNK = BLOCK * 2**10  # weights quantised at a time: a megabyte of temporaries


class Nf4Linear(nn.Linear):
    """A linear layer with a frozen weight of (out, in) in 4 bits.

    weight: uint8 (ceil(out * in / 2),), two codes a byte, the first in the high bits. absmax: float32 (ceil(out * in / 64),).
    An nn.Linear, so that PEFT adapts it as one.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        """linear: the layer it replaces (its bias is kept). dtype: what the weight is multiplied in."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, dtype
        numel = self.in_features * self.out_features
        self.weight = placeholder([-(-numel // 2)], torch.uint8)
        self.absmax = placeholder([-(-numel // BLOCK)], torch.float32)
        self.bias = linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _Product.apply(input, self.weight, self.absmax, self.bias, (self.out_features, self.in_features), self.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nf4"


class _Product(torch.autograd.Function):
    """x W' + b with W dequantised anew in the backward pass: no float copy of the weight outlives a pass."""

    @staticmethod
    def forward(ctx, x, codes, absmax, bias, shape, dtype):
        # The parameters themselves, not views: the engines free and gather them in between.
        ctx.save_for_backward(codes, absmax)
        ctx.shape, ctx.dtype = shape, dtype
        return nn.functional.linear(x, dequantised(codes, absmax, shape, dtype).to(x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient):
        codes, absmax = ctx.saved_tensors
        assert not ctx.needs_input_grad[3], "the bias of a quantised layer is frozen"
        weight = dequantised(codes, absmax, ctx.shape, ctx.dtype).to(gradient.dtype)
        return gradient @ weight if ctx.needs_input_grad[0] else None, None, None, None, None, None


def dequantised(codes: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The weight that codes and scales stand for: `shape`, in `dtype`."""
    import bitsandbytes  # noqa: F401  registers the operators

    numel = math.prod(shape)
    assert codes.numel() == -(-numel // 2) and absmax.numel() == -(-numel // BLOCK), "a quantised weight is not whole here: it was not gathered"
    # Flat and of even length: the kernel for CPUs is wrong for some lengths of rows, and takes no odd ones.
    flat = torch.ops.bitsandbytes.dequantize_4bit.default(codes, absmax, BLOCK, "nf4", [numel + numel % 2], dtype)
    return flat.view(-1)[:numel].view(shape)


def quantise(model: nn.Module, sources: Sources) -> None:
    """Replace every linear layer but the head by an Nf4Linear without memory; `sources` then holds what fills them, in the old order.

    Weights that are in memory are quantised from there. See `checks.check_quantisable` for models that are not accepted.
    """
    head = model.get_output_embeddings()
    parts: dict[nn.Parameter, Sources] = {}
    for owner in list(model.modules()):
        for name, linear in list(owner.named_children()):
            if not isinstance(linear, nn.Linear) or linear is head:
                continue
            layer = Nf4Linear(linear, linear.weight.dtype)
            source = sources.get(linear.weight) or tensor_source(linear.weight.detach())
            blocks = partial(_blockwise, source, linear.weight.dtype, linear.weight.numel())
            parts[linear.weight] = {layer.weight: partial(blocks, 2, _codes), layer.absmax: partial(blocks, BLOCK, _scales)}
            setattr(owner, name, layer)
    old = list(sources.items())
    sources.clear()
    for parameter, source in old:
        sources.update(parts.pop(parameter, {parameter: source}))
    for left in parts.values():
        sources.update(left)


def _blockwise(
    source: Source, dtype: torch.dtype, numel: int, per: int, values: Callable[[torch.Tensor], torch.Tensor], start: int, stop: int
) -> torch.Tensor:
    """Elements start..stop of what `values` makes of whole blocks of `numel` weights, rounded to `dtype`; `per` weights an element."""
    if stop <= start:
        return torch.empty(0)
    first, last = start * per // BLOCK * BLOCK, min(-(-stop * per // BLOCK) * BLOCK, numel)
    parts = [values(source(low, min(low + _CHUNK, last)).to(dtype)) for low in range(first, last, _CHUNK)]
    return torch.cat(parts)[start - first // per : stop - first // per]


def _codes(weights: torch.Tensor) -> torch.Tensor:
    import bitsandbytes  # noqa: F401  registers the operators

    return torch.ops.bitsandbytes.quantize_4bit.default(weights.contiguous(), BLOCK, "nf4", torch.uint8)[0].view(-1)


def _scales(weights: torch.Tensor) -> torch.Tensor:
    """The scales alone, as the operator computes them beside the codes, in a tenth of its time."""
    return nn.functional.pad(weights.float().abs(), (0, -weights.numel() % BLOCK)).view(-1, BLOCK).amax(dim=1)
