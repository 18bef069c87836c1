"""DeepSpeed ZeRO-3: the same verbs on partitioned weights.

    engine = Zero3Engine(model, optimizer, ds_config, decoder_layers(model))       # after deepspeed.init_distributed()

Three flat rank-local views, all in the order of DeepSpeed's sub-groups, are everything this module touches: the
compute copy (`lp`), the optimizer's float32 master, and the averaged gradient (deepspeed_private.Partitions). What
DeepSpeed cuts is fetched, and released, by decoder layer: its hooks on every submodule cost more time than the
arithmetic of a small layer. Under LoRA the frozen weights of layers are frozen.py's, unless DeepSpeed's file keeps
them in its own way, and a small adapter is fetched at once. What goes wrong silently without care, and is handled here:
- a gathered copy of a weight may outlive the pass that used it, and an edit of the shard is then invisible: all
  gathered copies are dropped before the shard is edited and again before it is restored (DeepSpeed #5667 is what
  happens otherwise);
- `optimizer.zero_grad()` resets the accumulation counter but not the buffer: a parameter used only in a discarded pass
  would move at the next step, so the buffer is zeroed too;
- `torch.autograd.grad` after `engine(...)` fires DeepSpeed's epilogue:
  probe passes call the bare module and reduce themselves;
- the padding of the last shard is uninitialised memory: it is masked in every ShardedVector;
- DeepSpeed averages gradients over ranks while our losses are shares that add up: losses are scaled by the world size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.engines.deepspeed_private import (
    Partition,
    Partitions,
    fetched_whole,
    gradients_by_parameter,
    partition,
    partition_of,
)
from pipeline.engines.engine import (
    B,
    Engine,
    LossFunction,
    ShardedVector,
    stacked_gradients,
    step_counter,
)
from pipeline.engines.rank_files import RankFiles, write
from pipeline.model.weights import Sources

_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state, cut as the weights are


class Zero3Engine(Engine):
    """A ShardedVector here is one flat tensor per ZeRO sub-group."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any],
        blocks: Sequence[nn.Module] = (), sources: Sources | None = None, reduces_once: bool = False,
    ):  # fmt: skip
        """blocks: modules gathered as a whole, one at a time.

        sources: values of the module's placeholders (pipeline/model/weights.py); each rank reads its part.

        reduces_once: whole gradients wait on every rank for the last micro-batch, and are reduced in one go. What is
        trained must then stay whole between passes (the persistence threshold).
        """
        import deepspeed

        if sources:
            partition(module, sources, ds_config)
        dtypes = {parameter: parameter.dtype for parameter in module.parameters()}
        fetched_whole(module, blocks)
        with gradients_by_parameter():
            self.ds, self.optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=ds_config
            )
        self.module = self.ds.module
        self.rank, self.world_size = (
            torch.distributed.get_rank(),
            torch.distributed.get_world_size(),
        )
        self.device = torch.device(self.ds.device)
        # Without a bf16 block zero.Init has made whole models float32.
        wrong = [
            parameter for parameter, dtype in dtypes.items() if _cut(parameter).held.dtype != dtype
        ]
        assert not wrong, f"DeepSpeed changed the dtype of {len(wrong)} weights"
        self.ds.train()
        self._reduces_once = reduces_once
        self._names = {parameter: name for name, parameter in self.module.named_parameters()}
        self._partitions = Partitions(self.optimizer)
        if reduces_once:
            self._partitions.gather_on_demand()
        self._padding = [self._padding_mask(group) for group in self._partitions.groups]

    def forward_backward(
        self, loss_fn: LossFunction[B], batches: Sequence[B], v: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._clear_gradient()
        loss = self._backward(loss_fn, batches, ends_step=True, v=v)
        if not v:
            return loss, None
        # The loss was scaled by the world size for DeepSpeed's mean; v's gradient is ours to sum.
        gradient = stacked_gradients(v, [row.grad for row in v]) / self.world_size
        return loss, self.sum_over_ranks(gradient)

    def gradient(
        self, loss_fn: LossFunction[B], batches: Sequence[B]
    ) -> tuple[torch.Tensor, ShardedVector]:
        self._clear_gradient()
        loss = self._backward(loss_fn, batches, ends_step=False)
        shard = self.accumulated_gradient()
        self._clear_gradient()
        return loss, shard

    def probe_gradient(
        self, loss_fn: LossFunction[B], batches: Sequence[B], v: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, gradient = (
            self.zero(),
            torch.zeros(len(v), v[0].numel(), dtype=v[0].dtype, device=self.device),
        )
        for batch in batches:
            loss = loss_fn(self.module, batch.to(self.device))
            # Scaled as in the main pass: p(1) - p(0) of the lagged schedule must not hold the
            # rounding of two different scales.
            gradient += (
                stacked_gradients(
                    v, torch.autograd.grad(loss * self.world_size, v, allow_unused=True)
                )
                / self.world_size
            )
            total += loss.detach().double()
            # Layers below the lowest probe saw no backward: their gathered weights would stay.
            self._partitions.release_leftovers()
        return self.sum_over_ranks(total), self.sum_over_ranks(gradient)

    @contextlib.contextmanager
    def perturbed(self, direction: ShardedVector, scale: float) -> Iterator[None]:
        self.drop_gathered()
        stash = [lp.clone() for lp in self._partitions.compute]
        try:
            for lp, master, d in zip(
                self._partitions.compute, self._masters(), direction, strict=True
            ):
                lp.copy_(master.to(lp.device) + scale * d.to(lp.device))
            yield
        finally:
            self.drop_gathered()
            for lp, saved in zip(self._partitions.compute, stash, strict=True):
                lp.copy_(saved)

    def accumulated_gradient(self) -> ShardedVector:
        flat = self._partitions.gradient
        parts = flat.split([mask.numel() for mask in self._padding])
        return [
            part.detach().float().clone().to(mask.device).masked_fill_(mask, 0.0)
            for part, mask in zip(parts, self._padding, strict=True)
        ]

    def add_gradient(self, shard: ShardedVector, scale: float) -> None:
        # In the gradient's dtype: where bf16 weights are all trained, what is below 1/256 of an element's gradient is
        # lost, as in any accumulation there.
        flat = self._partitions.gradient
        for part, added in zip(
            flat.split([mask.numel() for mask in self._padding]), shard, strict=True
        ):
            part.add_(added.to(part.device, part.dtype), alpha=scale)
        if self._partitions.offloaded:
            # An offloaded optimizer has taken the gradient, and the norms it clips by,
            # at the last backward: let it take them again.
            self._partitions.offload_gradient(
                [parameter for parameter in self._names if parameter.requires_grad]
            )

    def weights(self) -> ShardedVector:
        return [
            m.detach().float().clone().to(mask.device).masked_fill_(mask, 0.0)
            for m, mask in zip(self._masters(), self._padding, strict=True)
        ]

    def assign(self, weights: ShardedVector) -> None:
        self.drop_gathered()
        for lp, master, part in zip(
            self._partitions.compute, self._masters(), weights, strict=True
        ):
            master.copy_(part)
            lp.copy_(master)

    def storage(self) -> list[torch.Tensor]:
        return [*self._partitions.compute, *self._masters()]

    def step(self, lr: float, norm: float | None = None) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.ds.step()

    def discard(self) -> None:
        self._clear_gradient()

    def gathered(self, shard: ShardedVector) -> Iterator[tuple[str, torch.Tensor]]:
        for parameter, part in self._parts(shard):
            whole = torch.empty(
                self.world_size * part.numel(), dtype=part.dtype, device=self.device
            )
            torch.distributed.all_gather_into_tensor(whole, part.contiguous().to(self.device))
            if self.rank == 0:
                cut = _cut(parameter)
                yield self._names[parameter], whole[: cut.numel].view(cut.shape).cpu().clone()

    def parts(self, shard: ShardedVector) -> Iterator[tuple[str, torch.Tensor]]:
        return ((self._names[parameter], part) for parameter, part in self._parts(shard))

    def shard(self, named: Mapping[str, torch.Tensor]) -> ShardedVector:
        def part(parameter: nn.Parameter) -> torch.Tensor:
            size = _cut(parameter).padded
            whole = named[self._names[parameter]].flatten().float()
            padded = torch.cat([whole, whole.new_zeros(size * self.world_size - whole.numel())])
            return padded[self.rank * size : (self.rank + 1) * size].to(self.device)

        return [
            torch.cat([part(parameter) for parameter in group]) for group in self._partitions.groups
        ]

    def save(self, folder: Path, vectors: dict[str, ShardedVector]) -> None:
        """By parameter name: ZeRO's own pickled form knows nothing of vectors, and needs an offline conversion
        (universal checkpoints) before another number of ranks can read it.
        """
        flats = {
            "weight": self.weights(),
            **{f"vector.{key}": parts for key, parts in vectors.items()},
        }
        states = [self._partitions.adam.state[master] for master in self._partitions.masters]
        flats |= {
            slot: [state[slot] for state in states]
            for slot in _MOMENTS
            if all(slot in state for state in states)
        }
        tensors = {
            f"{key}.{self._names[p]}": part
            for key, parts in flats.items()
            for p, part in self._parts(parts)
        }
        tensors |= {
            f"step.{index}": state["step"] for index, state in enumerate(states) if "step" in state
        }
        write(folder, self.rank, tensors)

    def load(self, folder: Path, vectors: Sequence[str] = ()) -> dict[str, ShardedVector]:
        self.drop_gathered()
        with RankFiles(folder) as files:
            # One counter: all sub-groups step together.
            counted = next(
                (files.alike(key) for key in files.keys if key.startswith("step.")), None
            )
            for index, master in enumerate(self._partitions.masters):
                group = self._partitions.groups[index]
                master.data.copy_(self._read(files, "weight", group))
                self._partitions.compute[index].copy_(master.data)
                if counted is not None:
                    state = {
                        slot: self._read(files, slot, group).to(master.device) for slot in _MOMENTS
                    }
                    counter = step_counter(self._partitions.adam, counted, master)
                    self._partitions.adam.state[master] = {"step": counter, **state}
            return {
                key: [
                    self._read(files, f"vector.{key}", group) for group in self._partitions.groups
                ]
                for key in vectors
            }

    def _read(self, files: RankFiles, key: str, group: Sequence[nn.Parameter]) -> torch.Tensor:
        """This rank's flat shard of a sub-group, from files of any number of ranks; padding is zero."""
        parts = []
        for p in group:
            cut = _cut(p)
            size = cut.padded
            part = files.read(
                f"{key}.{self._names[p]}", self.rank * size, min((self.rank + 1) * size, cut.numel)
            )
            parts.append(torch.cat([part, part.new_zeros(size - part.numel())]))
        return torch.cat(parts).to(self.device)

    def _parts(self, flats: Sequence[torch.Tensor]) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        for group, flat in zip(self._partitions.groups, flats, strict=True):
            yield from zip(group, flat.split([_cut(p).padded for p in group]), strict=True)

    def _backward(
        self,
        loss_fn: LossFunction[B],
        batches: Sequence[B],
        ends_step: bool,
        v: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        total = self.zero()
        leaves = [*(p for p in self._names if p.requires_grad), *v]
        waiting: list[torch.Tensor | None] = [None] * len(leaves)
        for number, batch in enumerate(batches, 1):
            if self._reduces_once and number < len(batches):
                # As in probe_gradient: what DeepSpeed does at the end of its own backward passes would reduce.
                loss = loss_fn(self.module, batch.to(self.device))
                found = torch.autograd.grad(loss * self.world_size, leaves, allow_unused=True)
                waiting = [_sum(pair) for pair in zip(waiting, found, strict=True)]
                self._partitions.release_leftovers()
            else:
                # Only the main pass's last backward may look like the end of a step:
                # offloaded optimizers take the gradient there.
                self.ds.set_gradient_accumulation_boundary(ends_step and number == len(batches))
                loss = loss_fn(self.ds, batch.to(self.device))
                # A leaf without one would have DeepSpeed's hooks called all the same, with no gradient.
                there = [
                    (gradient, leaf)
                    for gradient, leaf in zip(waiting, leaves, strict=True)
                    if gradient is not None
                ]
                if there:
                    gradients, used = zip(*there, strict=True)
                    loss = _WithGradients.apply(loss, gradients, *used)
                self.ds.backward(loss * self.world_size, scale_wrt_gas=False)
            total += loss.detach().double()
        return self.sum_over_ranks(total)

    def _clear_gradient(self) -> None:
        self.optimizer.zero_grad()
        self._partitions.gradient.zero_()

    def drop_gathered(self) -> None:
        self._partitions.drop_gathered()

    def _masters(self) -> list[torch.Tensor]:
        return [master.detach() for master in self._partitions.masters]

    def _padding_mask(self, group: Sequence[nn.Parameter]) -> torch.Tensor:
        """True where this rank's flat shard of the sub-group holds padding. ZeRO-3 pads every parameter by itself."""
        masks = []
        for parameter in group:
            cut = _cut(parameter)
            valid = min(max(cut.numel - self.rank * cut.padded, 0), cut.padded)
            masks.append(torch.arange(cut.padded, device=self.device) >= valid)
        return torch.cat(masks)


def _cut(parameter: nn.Parameter) -> Partition:
    """How ZeRO-3 has cut a parameter of its module."""
    found = partition_of(parameter)
    assert found is not None, "ZeRO-3 cuts every parameter of its module"
    return found


class _WithGradients(torch.autograd.Function):
    """A loss whose backward pass adds these gradients to the leaves', also to those that the loss does not use."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: torch.Tensor,
        gradients: Sequence[torch.Tensor],
        *leaves: torch.Tensor,
    ) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient, None, *ctx.gradients


def _sum(pair: tuple[torch.Tensor | None, torch.Tensor | None]) -> torch.Tensor | None:
    there, more = pair
    return there if more is None else more if there is None else there + more
