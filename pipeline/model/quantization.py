"""Frozen weights in 4 bits (bitsandbytes' nf4), in a form that every engine can shard, for LoRA on top of them (QLoRA).

    quantise(model, sources, device)       # every linear layer but the head; sources: see pipeline/model/weights.py

bitsandbytes' own Linear4bit is not used, only its number format and kernels. Four traps of it do not exist here:
- a forward pass in eval mode repacks the weights on CPUs with AVX512_BF16,
  and later backward passes give no gradient to the input;
- it keeps a view of the gathered weight for the backward pass: under ZeRO-3 the whole model would stay gathered;
- its kernel for CPUs (0.50.2) takes wrong scales where rows are of 32 or 96 weights: of every odd multiple of 32;
- its scales (absmax) hang on a Parameter subclass that FSDP2 replaces by plain tensors, and are whole on every rank.
Here codes and scales are two ordinary frozen parameters. Both are cut as any other, and a rank quantises only the
blocks that it keeps: a block of 64 weights knows nothing of its neighbours.

A piece of a weight is read, moved to the device that the process computes on, quantised there, and its codes go where
the shard is. So the codes do not hang on where a shard lives: training with shards in host memory, and evaluation, see
those of the same operator. A GPU's may round a tie otherwise than a CPU's.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.model.weights import Source, Sources, placeholder, tensor_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64  # weights that share a scale; bitsandbytes' default
_ON_CPU = BLOCK * 2**10  # weights quantised at a time on a CPU: a megabyte of temporaries
# elsewhere: 16 MB of bfloat16, so that a kernel's start costs nothing beside its work
_ON_GPU = 2**23


class Nf4Linear(nn.Linear):
    """A linear layer with a frozen weight of (out, in) in 4 bits.

    weight: uint8 (ceil(out * in / 2),), two codes a byte, the first in the high bits. absmax: float32 (ceil(out * in /
    64),). An nn.Linear, so that PEFT adapts it as one.
    """

    weight: nn.Parameter
    absmax: nn.Parameter

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        """linear: the layer it replaces (its bias is kept). dtype: what the weight is multiplied in."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = (
            linear.in_features,
            linear.out_features,
            dtype,
        )
        numel = self.in_features * self.out_features
        self.weight = placeholder([-(-numel // 2)], torch.uint8)
        self.absmax = placeholder([-(-numel // BLOCK)], torch.float32)
        self.bias = linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x W' + b for `input` (..., in_features), with W dequantised for this pass."""
        return _Product.apply(
            input,
            self.weight,
            self.absmax,
            self.bias,
            (self.out_features, self.in_features),
            self.dtype,
        )

    def extra_repr(self) -> str:
        """What `print` shows of the layer beside its class."""
        return f"{super().extra_repr()}, nf4"


class _Product(torch.autograd.Function):
    """x W' + b with W dequantised anew in the backward pass: no float copy of the weight outlives a pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        # The parameters themselves, not views: the engines free and gather them in between.
        ctx.save_for_backward(codes, absmax)
        ctx.shape, ctx.dtype = shape, dtype
        return nn.functional.linear(x, dequantised(codes, absmax, shape, dtype).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, absmax = ctx.saved_tensors
        assert not ctx.needs_input_grad[3], "the bias of a quantised layer is frozen"
        weight = dequantised(codes, absmax, ctx.shape, ctx.dtype).to(gradient.dtype)
        return gradient @ weight if ctx.needs_input_grad[0] else None, None, None, None, None, None


def dequantised(
    codes: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The weight that codes and scales stand for: `shape`, in `dtype`."""
    import bitsandbytes  # noqa: F401  registers the operators

    numel = math.prod(shape)
    assert codes.numel() == -(-numel // 2) and absmax.numel() == -(-numel // BLOCK), (
        "a quantised weight is not whole here: it was not gathered"
    )
    # Flat and of even length: the kernel for CPUs is wrong for some lengths of rows, and takes no odd ones.
    flat = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, absmax, BLOCK, "nf4", [numel + numel % 2], dtype
    )
    return flat.view(-1)[:numel].view(shape)


def quantise(
    model: PreTrainedModel, sources: Sources, device: torch.device | str | None = None
) -> None:
    """Replace every linear layer but the head by an Nf4Linear without memory;
    `sources` then holds what fills them, in the old order.

    Weights that are in memory are quantised from there. device: where the work is done, a piece at a time, and what the
    new sources return is; default: where a weight (or its placeholder) is. See `checks.check_quantisable` for models
    that are not accepted.
    """
    head = model.get_output_embeddings()
    parts: dict[nn.Parameter, dict[nn.Parameter, Source]] = {}
    latest = _Latest()
    for owner in list(model.modules()):
        for name, linear in list(owner.named_children()):
            if not isinstance(linear, nn.Linear) or linear is head:
                continue
            weight = linear.weight
            assert isinstance(weight, nn.Parameter)
            layer = Nf4Linear(linear, weight.dtype)
            source = sources.get(weight) or tensor_source(weight.detach())
            blocks = _Blocks(
                source, weight.dtype, weight.numel(), torch.device(device or weight.device), latest
            )
            parts[weight] = {layer.weight: blocks.codes, layer.absmax: blocks.scales}
            setattr(owner, name, layer)
    old = list(sources.items())
    sources.clear()
    for parameter, source in old:
        sources.update(parts.pop(parameter, {parameter: source}))
    for left in parts.values():
        sources.update(left)


class _Latest:
    """The scales of the weight whose codes were read last, in pieces.

    `quantise` puts a weight's codes and scales next to each other in the sources. So one weight's scales are all that
    is kept (a sixteenth of a byte a weight of this rank's part), and a reader in another order only reads more.
    """

    def __init__(self) -> None:
        self._weight: _Blocks | None = None
        self._pieces: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()

    def keep(self, weight: _Blocks, block: int, scales: torch.Tensor) -> None:
        """Scales from `block` on; those of other weights are forgotten."""
        with self._lock:
            if self._weight is not weight:
                self._weight, self._pieces = weight, {}
            self._pieces[block] = scales

    def of(self, weight: _Blocks) -> list[tuple[int, torch.Tensor]]:
        """First block and scales of what is known of the weight, in order; pieces may overlap."""
        with self._lock:
            return sorted(self._pieces.items()) if self._weight is weight else []


class _Blocks:
    """Two sources, of codes and of scales, over the source of one weight of `numel` elements,
    which are rounded to `dtype` first.

    Only whole blocks are read, each once, though both are asked for: its scale is kept from when its code was made. A
    rank's codes and scales may be cut at different blocks; the few that it lacks then are read for the scales.
    """

    def __init__(
        self, source: Source, dtype: torch.dtype, numel: int, device: torch.device, latest: _Latest
    ):
        self._source, self._dtype, self._numel, self._device, self._latest = (
            source,
            dtype,
            numel,
            device,
            latest,
        )
        self._step = (_ON_CPU if device.type == "cpu" else _ON_GPU) // BLOCK

    def codes(self, start: int, stop: int) -> torch.Tensor:
        """Bytes start..stop of the codes: uint8, two codes each."""
        if stop <= start:
            return torch.empty(0)
        first = 2 * start // BLOCK
        parts = []
        for block, codes, scales in self._quantised(first, -(-2 * stop // BLOCK)):
            self._latest.keep(self, block, scales)
            parts.append(codes)
        return torch.cat(parts)[start - first * BLOCK // 2 : stop - first * BLOCK // 2]

    def scales(self, start: int, stop: int) -> torch.Tensor:
        """The scales of blocks start..stop: float32."""
        parts = [torch.empty(0, device=self._device)]
        for block, known in self._latest.of(self):
            if block >= stop or block + len(known) <= start:
                continue
            parts += [scales for _, _, scales in self._quantised(start, block)]
            parts.append(known[max(start - block, 0) : stop - block])
            start = min(block + len(known), stop)
        return torch.cat(parts + [scales for _, _, scales in self._quantised(start, stop)])

    def _quantised(self, first: int, last: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Blocks first..last, some at a time: the number of the first, codes, scales."""
        for block in range(first, last, self._step):
            bounds = block * BLOCK, min(min(block + self._step, last) * BLOCK, self._numel)
            yield (
                block,
                *_operator(self._source(*bounds).to(self._device).to(self._dtype).contiguous()),
            )


def _operator(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of flat weights, on their device."""
    import bitsandbytes  # noqa: F401  registers the operators

    codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(weights, BLOCK, "nf4", torch.uint8)
    rest = weights.numel() % BLOCK
    if rest:
        # The CPU's operator calls the scale of a last, short block of zeros 1e-38, and that of any other one 0.
        scales[-1] = weights[-rest:].float().abs().amax()
    return codes.view(-1), scales
