"""Frozen weights of decoder layers, cut over the ranks: most of what a LoRA run holds, and nothing that it writes.

    frozen = FrozenLayers(model, decoder_layers(model), sources, device)      # before the engine takes what is left

ZeRO-3 and FSDP2 fetch and free tensor by tensor. A layer of an adapted Llama has nine frozen ones, and what Python does
for each of them takes longer than the arithmetic of a small layer. Here a layer is one buffer: each rank keeps an even
part of its bytes, one collective puts the parts end to end, and the layer's weights are views of the buffer, the same
objects for good. Nothing is done for a single tensor, and nothing is copied in or out. A buffer is freed as FSDP1 freed
its own: its storage shrinks to nothing, and grows again, under whatever autograd has saved, before that is needed.

Nobody edits a frozen weight, so a gathered copy is never out of date; it is freed for its memory alone. At most two
layers are whole at a time: the one at work, and the next on its way (in a backward pass the one below). Beside them
those that are kept, once they were gathered. What is trained, and what stands in no layer, is the engine's. One rank
holds all layers as they are, and fetches nothing.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.model.weights import Source, Sources, read, tensor_source

_ALIGNED = 64  # bytes: where a weight begins, and what a rank's part is a multiple of


class FrozenLayers:
    """Takes over the frozen parameters of `blocks`: they become plain tensors there, which no engine sees.

    A parameter that also stands outside of its block stays what it is. Hooks of the blocks fetch their weights, which
    is a collective call: all ranks must call the same blocks in the same order, which may be any order.
    """

    def __init__(
        self, module: nn.Module, blocks: Sequence[nn.Module], sources: Sources, device: torch.device, kept: int = 0
    ):  # fmt: skip
        """sources: values of placeholders (pipeline/model/weights.py). Those of what is taken over are taken out, and
        read: each rank reads its part. What is in memory already is copied from there. kept: layers, from the first on,
        that stay whole once they were gathered: the same on all ranks.
        """
        self.layers: list[_Layer] = []
        self.kept = kept
        self._at: int | None = None  # the layer whose turn it was last
        waiting: dict[nn.Parameter, tuple[_Layer, int]] = {}
        # By id: what is copied from memory is freed block by block, and not held here.
        names = {id(parameter): full for full, parameter in module.named_parameters()}
        uses = Counter(id(parameter) for parameter, _, _ in _places(module))
        for block in blocks:
            inside = Counter(parameter for parameter, _, _ in _places(block))
            taken = [
                p
                for p, n in inside.items()
                if not p.requires_grad and n == uses[id(p)] and p.numel()
            ]
            layer = _Layer([names[id(p)] for p in taken], taken, device)
            self.layers.append(layer)
            numbers = {parameter: number for number, parameter in enumerate(taken)}
            for parameter, number in numbers.items():
                if parameter in sources:
                    waiting[parameter] = layer, number
                else:
                    layer.read(number, tensor_source(parameter.detach()))
            for parameter, owner, name in _places(block):
                if parameter in numbers:
                    delattr(owner, name)
                    setattr(owner, name, layer.weights[numbers[parameter]])
        for parameter in [p for p in sources if p in waiting]:  # in the order of the files
            layer, number = waiting[parameter]
            layer.read(number, sources.pop(parameter))
        if dist.get_world_size() > 1 and any(layer.weights for layer in self.layers):
            for number, (block, layer) in enumerate(zip(blocks, self.layers, strict=True)):
                layer.free()
                block.register_forward_pre_hook(functools.partial(self._before_forward, number))
                block.register_forward_hook(functools.partial(self._after_forward, number))

    def gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight with the name that its parameter had, whole until the next layer's turn.

        A collective call: every rank must exhaust it.
        """
        for number, layer in enumerate(self.layers):
            self._fetch(number, number + 1)
            yield from zip(layer.names, layer.weights, strict=True)

    def _before_forward(self, number: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        # A layer that is computed again for its backward pass is there, and the one below it on its way. Below the
        # lowest is none: what comes after it is the next pass.
        if number == self._at and number > 0:
            return
        last = len(self.layers) - 1
        turns = last - 1 if torch.is_grad_enabled() else 0
        self._fetch(number, number + 1 if number < last else turns)

    def _after_forward(
        self, number: int, module: nn.Module, arguments: tuple[Any, ...], output: Any
    ) -> None:
        if not torch.is_grad_enabled():
            return
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(functools.partial(self._before_backward, number))

    def _before_backward(self, number: int, gradient: torch.Tensor) -> None:
        self._fetch(number, number - 1 if number else 1)

    def _fetch(self, number: int, ahead: int) -> None:
        """Have layer `number` whole, layer `ahead` (where there is one) on its way, and the others given back, unless
        they are kept.
        """
        self._at = number
        for other in range(self.kept, len(self.layers)):
            if other not in (number, ahead):
                self.layers[other].free()
        self.layers[number].gather()
        self.layers[number].wait()
        if 0 <= ahead < len(self.layers):
            self.layers[ahead].gather()


class _Layer:
    """The frozen weights of one layer.

    weights: tensors like the parameters, which have memory from `gather` to `free`. part: uint8, this rank's bytes.
    """

    def __init__(self, names: list[str], like: Sequence[torch.Tensor], device: torch.device):
        self.names, ranks = names, dist.get_world_size()
        self._starts, size = [], 0
        for tensor in like:
            self._starts.append(size)
            size = _aligned(size + tensor.numel() * tensor.element_size())
        held = _aligned(-(-size // ranks))
        self.nbytes, self._first = held * ranks, dist.get_rank() * held
        self._work: dist.Work | None = None
        self.part = torch.empty(held, dtype=torch.uint8, device=device)
        self._whole = self.part
        if ranks > 1:
            self._whole = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        # Made of the storage, and no views of a tensor: to autograd a gather is no edit of what it has saved.
        self.weights = [
            torch.empty(0, dtype=tensor.dtype, device=device).set_(
                self._whole.untyped_storage(),
                start // tensor.element_size(),
                tensor.shape,
                torch.empty(tensor.shape, device="meta").stride(),
            )
            for tensor, start in zip(like, self._starts, strict=True)
        ]

    @property
    def is_whole(self) -> bool:
        """Whether the weights have memory, filled or about to be."""
        return self._whole.untyped_storage().nbytes() > 0

    def read(self, number: int, source: Source) -> None:
        """Fill what this rank keeps of a weight."""
        weight = self.weights[number]
        width, start = weight.element_size(), self._starts[number]
        low = max(self._first, start)
        high = min(self._first + self.part.numel(), start + weight.numel() * width)
        if low < high:
            held = self.part[low - self._first : high - self._first].view(weight.dtype)
            read(source, (low - start) // width, held, weight.dtype)

    def gather(self) -> None:
        """Begin to put the ranks' parts together, unless that was done: `wait` before the weights are used."""
        if self.weights and not self.is_whole:
            self._whole.untyped_storage().resize_(self.nbytes)
            # By the name it had before torch 2.13 where that is the one there is.
            all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            self._work = all_gather(self._whole, self.part, async_op=True)

    def wait(self) -> None:
        """What comes after this, on the device, sees the weights."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def free(self) -> None:
        """Give the memory back. A gather that nobody waited for ends first: it would write into what is given back."""
        if self._whole is not self.part and self.is_whole:
            self.wait()
            self._whole.untyped_storage().resize_(0)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _places(module: nn.Module) -> list[tuple[nn.Parameter, nn.Module, str]]:
    """Every place of a parameter in the module: owner, and its name there. Tied ones come more than once."""
    return [
        (parameter, owner, name)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
    ]
