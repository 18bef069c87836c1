"""PyTorch FSDP2 (`fully_shard`): the same verbs on DTensor weights.

    engine = Fsdp2Engine(model, decoder_layers(model), optimizer_of, max_grad_norm=1.0, device=device, dtype=None)

Every decoder layer is one group, what is left (embeddings, final norm, head) is the root's. An adapter is the root's,
too: frozen weights of layers are not here (frozen.py), and it is small enough to be whole from a step's first pass to
its update. What needs care here:
- the root's group stays gathered after a forward pass without backward: an edit of its shards would be invisible, so
  everything is resharded before the shards are edited and again before they are restored;
- gradients are summed over ranks, not averaged: our losses are shares that add up;
- the optimizer's weights are the sharded parameters themselves (float32); a lower compute dtype is the mixed-precision
  policy's cast at the all-gather, so restoring the shards restores everything.
Shards of a dimension that does not divide are uneven, not padded: nothing has to be masked.
A rank may hold nothing of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Shard as RowShard

from pipeline.engines.autograd import AutogradEngine
from pipeline.engines.engine import ShardedVector, clip, step_counter
from pipeline.engines.rank_files import RankFiles, write
from pipeline.libraries import torch_private
from pipeline.model.weights import Source, Sources, read

Places = list[tuple[nn.Module, str]]


class Fsdp2Engine(AutogradEngine):
    """A ShardedVector here is one flat tensor per trainable parameter: this rank's rows of it."""

    def __init__(
        self, module: nn.Module, blocks: Sequence[nn.Module],
        optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer], max_grad_norm: float | None,
        device: torch.device, dtype: torch.dtype | None = None, sources: Sources | None = None,
    ):  # fmt: skip
        """blocks: modules gathered one at a time; none, and what is trained is whole from a step's first pass to its
        update, its gradients reduced once.

        dtype: compute dtype of the all-gathered weights where it is not the shards' own, which are then float32.
        sources: values of the module's placeholders (pipeline/model/weights.py); each rank reads its part.
        """
        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), device
        self.mesh = init_device_mesh(device.type, (self.world_size,))
        policy = (
            MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            if dtype
            else MixedPrecisionPolicy()
        )
        waiting = _on_meta(module, Sources() if sources is None else sources)
        if dtype is not None:
            module.float()
        for block in (*blocks, module):
            sharded = fully_shard(block, mesh=self.mesh, mp_policy=policy)
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        for places, source, held in waiting:
            self._read(places, source, held)
        self.module = module.to(device).train()
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        # This rank's rows as plain tensors: on DTensors an optimizer spends its time on placements.
        self._rows_of = [nn.Parameter(local) for local in self.storage()]
        self.optimizer = optimizer_of(self._rows_of)
        self.max_grad_norm = max_grad_norm
        assert isinstance(self.module, FSDPModule)
        self._at_once = not blocks
        self.module.set_reshard_after_backward(not self._at_once)
        if self._at_once:
            # Not by FSDP2's own hook, which keeps the buffer of the all-gather through the whole forward pass.
            self.module.register_forward_pre_hook(_unshard, prepend=True)

    def _before(self, last: bool) -> None:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last or not self._at_once)

    def _begun(self, loss: torch.Tensor) -> None:
        if self._at_once:
            torch_private.ends_with(self.module, loss)

    def _gradients(self) -> ShardedVector:
        return [
            torch.zeros(local.numel(), device=self.device)
            if p.grad is None
            else _local(p.grad.detach()).float().flatten()
            for p, local in zip(self.parameters, self.storage(), strict=True)
        ]

    def add_gradient(self, shard: ShardedVector, scale: float) -> None:
        for p, part in zip(self.parameters, shard, strict=True):
            if p.grad is None:
                p.grad = self._like(p, torch.zeros_like(part))
            local = _local(p.grad)
            local.add_(part.view_as(local), alpha=scale)

    def weights(self) -> ShardedVector:
        return [local.float().clone().flatten() for local in self.storage()]

    def storage(self) -> list[torch.Tensor]:
        return [_local(p.detach()) for p in self.parameters]

    def step(self, lr: float, norm: float | None = None) -> None:
        if self.max_grad_norm is not None:
            held = [_local(p.grad) for p in self.parameters if p.grad is not None]
            clip(held, self.gradient_norm().item() if norm is None else norm, self.max_grad_norm)
        for p, rows in zip(self.parameters, self._rows_of, strict=True):
            rows.grad = None if p.grad is None else _local(p.grad)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.discard()
        self.drop_gathered()

    def gathered(self, shard: ShardedVector) -> Iterator[tuple[str, torch.Tensor]]:
        for (name, p), part in zip(self.named.items(), shard, strict=True):
            whole = self._like(p, part).full_tensor()
            if self.rank == 0:
                yield name, whole.cpu()

    def shard(self, named: Mapping[str, torch.Tensor]) -> ShardedVector:
        return [self._rows(named[name].float()).flatten().to(self.device) for name in self.named]

    def save(self, folder: Path, vectors: dict[str, ShardedVector]) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, rows in zip(self.named, self._rows_of, strict=True):
            tensors[f"weight.{name}"] = rows.flatten()
            tensors |= {
                f"{key}.{name}": value if key == "step" else value.flatten()
                for key, value in self.optimizer.state[rows].items()
            }
        for key, parts in vectors.items():
            tensors |= {
                f"vector.{key}.{name}": part for name, part in zip(self.named, parts, strict=True)
            }
        write(folder, self.rank, tensors)

    def load(self, folder: Path, vectors: Sequence[str] = ()) -> dict[str, ShardedVector]:
        self.drop_gathered()
        with RankFiles(folder) as files, torch.no_grad():
            for (name, p), rows in zip(self.named.items(), self._rows_of, strict=True):
                rows.copy_(self._piece(files, f"weight.{name}", p).view_as(rows))
                if f"step.{name}" in files.keys:
                    moments = {
                        slot: self._piece(files, f"{slot}.{name}", p).view_as(rows)
                        for slot in ("exp_avg", "exp_avg_sq")
                    }
                    counter = step_counter(self.optimizer, files.alike(f"step.{name}"), rows)
                    self.optimizer.state[rows] = {"step": counter, **moments}
            return {
                key: [
                    self._piece(files, f"vector.{key}.{name}", p) for name, p in self.named.items()
                ]
                for key in vectors
            }

    def _piece(self, files: RankFiles, key: str, p: nn.Parameter) -> torch.Tensor:
        """This rank's rows of a whole tensor like p, flat, from files of any number of ranks."""
        start = self._first_row(p) * (p.numel() // p.shape[0])
        return files.read(key, start, start + _local(p).numel()).to(self.device)

    def _read(self, places: Places, source: Source, dtype: torch.dtype) -> None:
        """Put this rank's rows of a parameter of `dtype`, read from its source,
        where the sharded one without memory is.
        """
        owner, name = places[0]
        p = owner.get_parameter(name)
        local = torch.empty(_local(p).shape, dtype=p.dtype, device=self.device)
        read(source, self._first_row(p) * (p.numel() // p.shape[0]), local.view(-1), dtype)
        whole = DTensor.from_local(
            local, self.mesh, [RowShard(0)], run_check=False, shape=p.shape, stride=p.stride()
        )
        new = nn.Parameter(whole, requires_grad=p.requires_grad)
        for owner, name in places:
            setattr(owner, name, new)

    def _first_row(self, p: nn.Parameter) -> int:
        """Where this rank's rows begin, as fully_shard cuts them."""
        return min(-(-p.shape[0] // self.world_size) * self.rank, p.shape[0])

    def drop_gathered(self) -> None:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _like(self, p: nn.Parameter, part: torch.Tensor) -> DTensor:
        rows = part.view(_local(p.detach()).shape)
        return DTensor.from_local(
            rows, self.mesh, [RowShard(0)], run_check=False, shape=p.shape, stride=p.stride()
        )

    def _rows(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's rows, as fully_shard cuts them; every rank holds the whole, so nothing is sent."""
        return distribute_tensor(
            whole.to(self.device), self.mesh, [RowShard(0)], src_data_rank=None
        ).to_local()


def _unshard(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    assert isinstance(module, FSDPModule)
    module.unshard()


def _local(sharded: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a parameter of the sharded module, or of its gradient."""
    assert isinstance(sharded, DTensor)
    return sharded.to_local()


def _on_meta(module: nn.Module, sources: Sources) -> list[tuple[Places, Source, torch.dtype]]:
    """Replace placeholders by meta parameters, which fully_shard cuts without moving anything;
    returns where they are, sources and dtypes.
    """
    found: dict[nn.Parameter, Places] = {parameter: [] for parameter in sources}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if parameter in found:
                found[parameter].append((owner, name))
    for parameter, places in found.items():
        empty = nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"),
            requires_grad=parameter.requires_grad,
        )
        for owner, name in places:
            setattr(owner, name, empty)
    return [(found[parameter], source, parameter.dtype) for parameter, source in sources.items()]
