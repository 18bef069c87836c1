"""DeepSpeed ZeRO-3: the same verbs on partitioned weights.

    engine = Zero3Engine(model, optimizer, ds_config, decoder_layers(model))       # after deepspeed.init_distributed()

Three flat rank-local views, all in the order of `fp16_groups`, are everything this module touches: the compute copy (`lp`), the
optimizer's float32 master, and the averaged gradient. A decoder layer is fetched, and released, as a whole: DeepSpeed's hooks on
every submodule cost more time than the arithmetic of a small layer. What goes wrong silently without care, and is handled here:
- a gathered copy of a weight may outlive the pass that used it, and an edit of the shard is then invisible: all gathered copies are
  dropped before the shard is edited and again before it is restored (DeepSpeed #5667 is what happens otherwise);
- `optimizer.zero_grad()` resets the accumulation counter but not the buffer: a parameter used only in a discarded pass would move at the
  next step, so the buffer is zeroed too;
- `torch.autograd.grad` after `engine(...)` fires DeepSpeed's epilogue: probe passes call the bare module and reduce themselves;
- the padding of the last shard is uninitialised memory: it is masked in every Shard;
- DeepSpeed averages gradients over ranks while our losses are shares that add up: losses are scaled by the world size.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.engines.deepspeed_private import fetched_whole, gradients_by_parameter
from pipeline.engines.engine import Engine, LossFunction, Shard, stacked_gradients, step_counter
from pipeline.engines.rank_files import RankFiles, write
from pipeline.model.weights import Sources, fill, read

_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state, cut as the weights are


class Zero3Engine(Engine):
    """A Shard here is one flat tensor per ZeRO sub-group."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any], blocks: Sequence[nn.Module] = (),
        sources: Sources | None = None,
    ):  # fmt: skip
        """blocks: modules gathered as a whole, one at a time. sources: values of the module's placeholders (pipeline/model/weights.py);
        each rank reads its part."""
        import deepspeed

        if sources:
            partition(module, sources, ds_config)
        dtypes = {parameter: parameter.dtype for parameter in module.parameters()}
        fetched_whole(blocks)
        with gradients_by_parameter():
            self.ds, self.optimizer, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config)
        self.module = self.ds.module
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device = torch.device(self.ds.device)
        # Without a bf16 block zero.Init has made whole models float32.
        wrong = [parameter for parameter, dtype in dtypes.items() if parameter.ds_tensor.dtype != dtype]
        assert not wrong, f"DeepSpeed changed the dtype of {len(wrong)} weights"
        self.ds.train()
        self._names = {parameter: name for name, parameter in self.module.named_parameters()}
        self._padding = [self._padding_mask(group) for group in self.optimizer.fp16_groups]

    def forward_backward(
        self, loss_fn: LossFunction, batches: Sequence[Any], v: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._clear_gradient()
        loss = self._backward(loss_fn, batches, ends_step=True)
        if not v:
            return loss, None
        # The loss was scaled by the world size for DeepSpeed's mean; v's gradient is ours to sum.
        gradient = stacked_gradients(v, [row.grad for row in v]) / self.world_size
        return loss, self.sum_over_ranks(gradient)

    def gradient(self, loss_fn: LossFunction, batches: Sequence[Any]) -> tuple[torch.Tensor, Shard]:
        self._clear_gradient()
        loss = self._backward(loss_fn, batches, ends_step=False)
        shard = self.accumulated_gradient()
        self._clear_gradient()
        return loss, shard

    def probe_gradient(
        self, loss_fn: LossFunction, batches: Sequence[Any], v: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, gradient = self.zero(), torch.zeros(len(v), v[0].numel(), dtype=v[0].dtype, device=self.device)
        for batch in batches:
            loss = loss_fn(self.module, batch.to(self.device))
            # Scaled as in the main pass: p(1) - p(0) of the lagged schedule must not hold the rounding of two different scales.
            gradient += stacked_gradients(v, torch.autograd.grad(loss * self.world_size, v, allow_unused=True)) / self.world_size
            total += loss.detach().double()
            # Layers below the lowest probe saw no backward: their gathered weights would stay.
            self.optimizer.parameter_offload.release_backward_leftovers()
        return self.sum_over_ranks(total), self.sum_over_ranks(gradient)

    @contextlib.contextmanager
    def perturbed(self, direction: Shard, scale: float) -> Iterator[None]:
        self.drop_gathered()
        stash = [lp.clone() for lp in self._compute_shards()]
        try:
            for lp, master, d in zip(self._compute_shards(), self._masters(), direction, strict=True):
                lp.copy_(master.to(lp.device) + scale * d.to(lp.device))
            yield
        finally:
            self.drop_gathered()
            for lp, saved in zip(self._compute_shards(), stash, strict=True):
                lp.copy_(saved)

    def accumulated_gradient(self) -> Shard:
        flat = self.optimizer.grad_partitions_flat_buffer
        parts = flat.split([mask.numel() for mask in self._padding])
        return [
            part.detach().float().clone().to(mask.device).masked_fill_(mask, 0.0) for part, mask in zip(parts, self._padding, strict=True)
        ]

    def add_gradient(self, shard: Shard, scale: float) -> None:
        # In the gradient's dtype: where bf16 weights are all trained, what is below 1/256 of an element's gradient is lost, as in any accumulation there.
        flat = self.optimizer.grad_partitions_flat_buffer
        for part, added in zip(flat.split([mask.numel() for mask in self._padding]), shard, strict=True):
            part.add_(added.to(part.device, part.dtype), alpha=scale)
        if self.optimizer.offload_optimizer:
            # An offloaded optimizer has taken the gradient, and the norms it clips by, at the last backward: let it take them again.
            self.optimizer._offload_boundary_param_ids.update(parameter.ds_id for parameter in self._names if parameter.requires_grad)
            self.optimizer._finalize_offload_gradient_accumulation()

    def weights(self) -> Shard:
        return [
            m.detach().float().clone().to(mask.device).masked_fill_(mask, 0.0)
            for m, mask in zip(self._masters(), self._padding, strict=True)
        ]

    def assign(self, weights: Shard) -> None:
        self.drop_gathered()
        for lp, master, part in zip(self._compute_shards(), self._masters(), weights, strict=True):
            master.copy_(part)
            lp.copy_(master)

    def storage(self) -> list[torch.Tensor]:
        return [*self._compute_shards(), *self._masters()]

    def step(self, lr: float, norm: float | None = None) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.ds.step()

    def discard(self) -> None:
        self._clear_gradient()

    def gathered(self, shard: Shard) -> Iterator[tuple[str, torch.Tensor]]:
        for parameter, part in self._parts(shard):
            whole = torch.empty(self.world_size * part.numel(), dtype=part.dtype, device=self.device)
            torch.distributed.all_gather_into_tensor(whole, part.contiguous().to(self.device))
            if self.rank == 0:
                yield self._names[parameter], whole[: parameter.ds_numel].view(parameter.ds_shape).cpu().clone()

    def parts(self, shard: Shard) -> Iterator[tuple[str, torch.Tensor]]:
        return ((self._names[parameter], part) for parameter, part in self._parts(shard))

    def shard(self, named: Mapping[str, torch.Tensor]) -> Shard:
        def part(parameter: nn.Parameter) -> torch.Tensor:
            size = parameter.partition_numel()
            whole = named[self._names[parameter]].flatten().float()
            padded = torch.cat([whole, whole.new_zeros(size * self.world_size - whole.numel())])
            return padded[self.rank * size : (self.rank + 1) * size].to(self.device)

        return [torch.cat([part(parameter) for parameter in group]) for group in self.optimizer.fp16_groups]

    def save(self, folder: Path, vectors: dict[str, Shard]) -> None:
        """By parameter name: ZeRO's own pickled form knows nothing of vectors, and needs an offline conversion (universal checkpoints)
        before another number of ranks can read it."""
        flats = {"weight": self.weights(), **{f"vector.{key}": parts for key, parts in vectors.items()}}
        states = [self.optimizer.optimizer.state[master] for master in self.optimizer.fp32_partitioned_groups_flat]
        flats |= {slot: [state[slot] for state in states] for slot in _MOMENTS if all(slot in state for state in states)}
        tensors = {f"{key}.{self._names[p]}": part for key, parts in flats.items() for p, part in self._parts(parts)}
        tensors |= {f"step.{index}": state["step"] for index, state in enumerate(states) if "step" in state}
        write(folder, self.rank, tensors)

    def load(self, folder: Path, vectors: Sequence[str] = ()) -> dict[str, Shard]:
        self.drop_gathered()
        with RankFiles(folder) as files:
            # One counter: all sub-groups step together.
            counted = next((files.alike(key) for key in files.keys if key.startswith("step.")), None)
            for index, master in enumerate(self.optimizer.fp32_partitioned_groups_flat):
                group = self.optimizer.fp16_groups[index]
                master.data.copy_(self._read(files, "weight", group))
                self._compute_shards()[index].copy_(master.data)
                if counted is not None:
                    state = {slot: self._read(files, slot, group).to(master.device) for slot in _MOMENTS}
                    counter = step_counter(self.optimizer.optimizer, counted, master)
                    self.optimizer.optimizer.state[master] = {"step": counter, **state}
            return {key: [self._read(files, f"vector.{key}", group) for group in self.optimizer.fp16_groups] for key in vectors}

    def _read(self, files: RankFiles, key: str, group: Sequence[nn.Parameter]) -> torch.Tensor:
        """This rank's flat shard of a sub-group, from files of any number of ranks; padding is zero."""
        parts = []
        for p in group:
            size = p.partition_numel()
            part = files.read(f"{key}.{self._names[p]}", self.rank * size, min((self.rank + 1) * size, p.ds_numel))
            parts.append(torch.cat([part, part.new_zeros(size - part.numel())]))
        return torch.cat(parts).to(self.device)

    def _parts(self, flats: Sequence[torch.Tensor]) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        for group, flat in zip(self.optimizer.fp16_groups, flats, strict=True):
            yield from zip(group, flat.split([p.partition_numel() for p in group]), strict=True)

    def _backward(self, loss_fn: LossFunction, batches: Sequence[Any], ends_step: bool) -> torch.Tensor:
        total = self.zero()
        for number, batch in enumerate(batches):
            # Only the main pass's last backward may look like the end of a step: offloaded optimizers take the gradient there.
            self.ds.set_gradient_accumulation_boundary(ends_step and number == len(batches) - 1)
            loss = loss_fn(self.ds, batch.to(self.device))
            self.ds.backward(loss * self.world_size, scale_wrt_gas=False)
            total += loss.detach().double()
        return self.sum_over_ranks(total)

    def _clear_gradient(self) -> None:
        self.optimizer.zero_grad()
        self.optimizer.grad_partitions_flat_buffer.zero_()

    def drop_gathered(self) -> None:
        self.optimizer.parameter_offload.partition_all_parameters()

    def _compute_shards(self) -> list[torch.Tensor]:
        return self.optimizer.fp16_partitioned_groups_flat

    def _masters(self) -> list[torch.Tensor]:
        return [master.detach() for master in self.optimizer.fp32_partitioned_groups_flat]

    def _padding_mask(self, group: Sequence[nn.Parameter]) -> torch.Tensor:
        """True where this rank's flat shard of the sub-group holds padding. ZeRO-3 pads every parameter by itself."""
        masks = []
        for parameter in group:
            size = parameter.partition_numel()
            valid = min(max(parameter.ds_numel - self.rank * size, 0), size)
            masks.append(torch.arange(size, device=self.device) >= valid)
        return torch.cat(masks)


def partition(module: nn.Module, sources: Sources, ds_config: dict[str, Any]) -> None:
    """Make placeholders ZeRO-3 parameters whose shards are read from their sources: nothing is ever whole, sent, or moved as a whole.

    `zero.Init(module=...)` would do with whole parameters on every rank and broadcast each. The other parameters are left to DeepSpeed.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

    # An empty module: for all that Init sets up beside converting parameters.
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=copy.deepcopy(ds_config))
    if init.zero_param_process_group is not None or init.quantized_weights or init.quantized_nontrainable_weights or init.param_swapper:
        warnings.warn("weights are loaded whole on every rank, because train.ds_config has hpZ, quantised or NVMe weights", stacklevel=3)
        fill(sources)
        return
    for parameter, source in sources.items():
        init._convert_to_deepspeed_param(parameter)
        size = init._aligned_size(parameter) // init._partition_world_size(parameter)
        start = init._partition_rank(parameter) * size
        valid = max(min(start + size, parameter.ds_numel) - start, 0)
        shard = torch.zeros(size, dtype=parameter.dtype, device=init.local_device if parameter.ds_persist else init.remote_device)
        read(source, start, shard[:valid], parameter.dtype)
        shard = shard.pin_memory() if init.pin_memory and shard.device.type == "cpu" else shard
        shard.ds_numel, shard.status, shard.final_location = size, PartitionedParamStatus.AVAILABLE, None
        parameter.ds_tensor, parameter.ds_numel_aligned = shard, init._aligned_size(parameter)
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=init.local_device)
        parameter.partition()  # only marks it: the shard is there
    for buffer in module.buffers():
        buffer.data = buffer.data.to(init.local_device)  # DeepSpeed moves them only where it also moves the parameters
