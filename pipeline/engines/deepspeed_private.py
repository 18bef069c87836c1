"""What this project needs of DeepSpeed's insides, in one place: every name that its documentation does not have.

    import_deepspeed()
    check()
    fetched_whole(model, decoder_layers(model))
    with gradients_by_parameter():
        engine, optimizer, _, _ = deepspeed.initialize(...)
    partitions = Partitions(optimizer)

Its documentation has what `deepspeed.initialize` returns with `backward`, `step` and the accumulation boundary,
`zero.Init` and leaf modules. A parameter's `ds_*`, the optimizer's flat buffers and all of `deepspeed.runtime` have no
underscore, and are as free to change: to edit a shard there is no other way.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.libraries.needed import need
from pipeline.model.weights import Sources, fill, read
from pipeline.running.lean_imports import uncompiled, without

REQUIREMENT = "deepspeed>=0.19.4,<0.20"  # as pyproject.toml has it
_NAMED = "_named_parameters_of_leaf"  # what a leaf keeps of its own named_parameters(): ours
_ZERO = "deepspeed.runtime.zero"
_STAGE3, _INIT = (
    f"{_ZERO}.stage3:DeepSpeedZeroOptimizer_Stage3",
    f"{_ZERO}.partition_parameters:Init",
)
_NAMES = (
    f"{_ZERO}.partitioned_param_coordinator:get_all_parameters",
    f"{_ZERO}.partitioned_param_coordinator:print_rank_0",
    f"{_ZERO}.partition_parameters:print_rank_0",
    f"{_ZERO}.partition_parameters:PartitionedParamStatus.AVAILABLE",
    f"{_ZERO}.partition_parameters:ZeroParamStatus.AVAILABLE",
    f"{_ZERO}.parameter_offload:DeepSpeedZeRoOffload.partition_all_parameters",
    f"{_ZERO}.parameter_offload:DeepSpeedZeRoOffload.release_backward_leftovers",
    f"{_ZERO}.stage3:z3_leaf_parameter",
    "deepspeed.utils.nvtx:enable_nvtx",
    "deepspeed.ops:__compatible_ops__",
    *(
        f"{_STAGE3}.{name}"
        for name in (
            "fp16_groups", "fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat",
            "grad_partitions_flat_buffer", "parameter_offload", "offload_optimizer", "optimizer",
            "_offload_boundary_param_ids", "_finalize_offload_gradient_accumulation", "persistent_parameters",
        )
    ),
    *(
        f"{_INIT}.{name}"
        for name in (
            "_convert_to_deepspeed_param", "_aligned_size", "_partition_world_size", "_partition_rank", "local_device",
            "remote_device", "pin_memory", "zero_param_process_group", "quantized_weights",
            "quantized_nontrainable_weights", "param_swapper", "ds_tensor", "ds_numel", "ds_numel_aligned", "ds_shape",
            "ds_status", "ds_id", "ds_persist", "final_location", "partition", "partition_numel",
        )
    ),
)  # fmt: skip


def import_deepspeed() -> None:
    """Import deepspeed, whose autotuner then knows no mlflow, and whose Muon would run uncompiled."""
    with without("mlflow"), uncompiled():
        import deepspeed  # noqa: F401

        # a version without it compiles nothing there
        with contextlib.suppress(ModuleNotFoundError):
            from deepspeed.runtime.zero.muon import original_muon  # noqa: F401


def check() -> None:
    """ValueError, one sentence, where the DeepSpeed that is installed lacks a name that is used below."""
    need("deepspeed", REQUIREMENT, _NAMES)


def without_shared_memory() -> None:
    """The shared-memory collectives would be compiled for minutes at first use, on a CPU; gloo does."""
    import deepspeed

    for name in ("deepspeed_shm_comm", "shm_comm"):
        deepspeed.ops.__compatible_ops__[name] = False


def fetched_whole(module: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Have DeepSpeed fetch and release each block as a whole, with hooks on the block alone,
    in as little time as it can.

    It walks through a leaf's modules for their parameters at every fetch and release, through all modules twice a pass
    and three times a step, opens a range for NVIDIA's profiler at every call, and asks for its rank for messages that
    it does not print. So what the walks find is kept: no module comes or goes after this.
    """
    import deepspeed
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
    from deepspeed.utils import nvtx

    for block in blocks:
        deepspeed.utils.set_z3_leaf_module(block, True)
    for walked in (*blocks, module):
        walked.__dict__[_NAMED] = list(walked.named_parameters())
    everything = list(module.modules())
    module.__dict__["modules"] = lambda: iter(everything)
    found, said = coordinator.get_all_parameters, partition_parameters.print_rank_0
    if not hasattr(found, "of_leaves"):

        def parameters(module: nn.Module, recurse: bool = False) -> Any:
            known = module.__dict__.get(_NAMED) if recurse else None
            return (
                found(module, recurse)
                if known is None
                else itertools.chain(known, _as_leaf(module).ds_external_parameters())
            )

        parameters.of_leaves = True  # type: ignore[attr-defined]
        coordinator.get_all_parameters = parameters

        def print_rank_0(message: str, debug: bool = False, force: bool = False) -> None:
            if debug or force:
                said(message, debug, force)

        partition_parameters.print_rank_0 = coordinator.print_rank_0 = print_rank_0
    nvtx.enable_nvtx = False


def _as_leaf(module: nn.Module) -> Any:
    """The same, with the methods that DeepSpeed gives to a leaf module."""
    return module


@contextlib.contextmanager
def gradients_by_parameter() -> Iterator[None]:
    """Engines that are made inside take the gradient of each parameter of a leaf module as it comes, as elsewhere.

    DeepSpeed takes a leaf's gradients in a full backward hook on the module. It fires before they are there where the
    module's input needs no gradient (the first layer under LoRA), and leaves `grad` behind after passes that end no
    step.
    """
    from deepspeed.runtime.zero import stage3

    leaf = stage3.z3_leaf_parameter
    stage3.z3_leaf_parameter = lambda parameter: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = leaf


class Partitions:
    """What a rank's ZeRO-3 optimizer keeps of the trainable weights, in the order of `groups`: views, not copies."""

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer

    @property
    def groups(self) -> list[list[nn.Parameter]]:
        """The parameters by sub-group, as the flat tensors below hold them end to end."""
        return self._optimizer.fp16_groups

    @property
    def compute(self) -> list[torch.Tensor]:
        """The weights that passes use: a flat tensor per sub-group."""
        return self._optimizer.fp16_partitioned_groups_flat

    @property
    def masters(self) -> list[torch.Tensor]:
        """The float32 weights that the optimizer steps: a flat leaf tensor per sub-group."""
        return self._optimizer.fp32_partitioned_groups_flat

    @property
    def gradient(self) -> torch.Tensor:
        """The averaged gradient, flat, of all sub-groups end to end."""
        return self._optimizer.grad_partitions_flat_buffer

    @property
    def adam(self) -> torch.optim.Optimizer:
        """The optimizer whose state is of `masters`."""
        return self._optimizer.optimizer

    @property
    def offloaded(self) -> bool:
        """Whether the optimizer is in host memory."""
        return self._optimizer.offload_optimizer

    def offload_gradient(self, parameters: Sequence[nn.Parameter]) -> None:
        """Have an offloaded optimizer take the gradients of these, and the norms it clips by, once more."""
        self._optimizer._offload_boundary_param_ids.update(
            _as_cut(parameter).ds_id for parameter in parameters
        )
        self._optimizer._finalize_offload_gradient_accumulation()

    def gather_on_demand(self) -> None:
        """Have the next pass gather what stays whole between passes, in one collective: at the end of a step DeepSpeed
        would gather it in one for each tensor.
        """
        self._optimizer.persistent_parameters = []

    def drop_gathered(self) -> None:
        """Forget all gathered copies of weights."""
        self._optimizer.parameter_offload.partition_all_parameters()

    def release_leftovers(self) -> None:
        """Forget those gathered for a backward pass that did not come to them."""
        self._optimizer.parameter_offload.release_backward_leftovers()


@dataclass(frozen=True)
class Partition:
    """A parameter as ZeRO-3 has cut it. numel, shape: of the whole. padded: elements of a rank's part, with padding."""

    numel: int
    shape: torch.Size
    padded: int
    held: torch.Tensor  # this rank's part, where it is kept
    gathered: bool  # whether the whole is here, too


def partition_of(parameter: nn.Parameter) -> Partition | None:
    """None for a parameter that ZeRO-3 has not cut."""
    if not hasattr(parameter, "ds_tensor"):
        return None
    cut = _as_cut(parameter)
    return Partition(
        cut.ds_numel,
        cut.ds_shape,
        cut.partition_numel(),
        cut.ds_tensor,
        gathered=cut.ds_status.name == "AVAILABLE",
    )


def _as_cut(tensor: torch.Tensor) -> Any:
    """The same, with the attributes that DeepSpeed gives to what it cuts: no type knows of them."""
    return tensor


def partition(module: nn.Module, sources: Sources, ds_config: dict[str, Any]) -> None:
    """Make placeholders ZeRO-3 parameters whose shards are read from their sources:
    nothing is ever whole, sent, or moved as a whole.

    `zero.Init(module=...)` would do with whole parameters on every rank and broadcast each.
    The other parameters are left to DeepSpeed.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

    # An empty module: for all that Init sets up beside converting parameters.
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=copy.deepcopy(ds_config))
    if (
        init.zero_param_process_group is not None
        or init.quantized_weights
        or init.quantized_nontrainable_weights
        or init.param_swapper
    ):
        warnings.warn(
            "weights are loaded whole on every rank, because train.ds_config has hpZ, quantised or NVMe weights",
            stacklevel=3,
        )
        fill(sources)
        return
    for parameter, source in sources.items():
        init._convert_to_deepspeed_param(parameter)
        cut = _as_cut(parameter)
        size = init._aligned_size(parameter) // init._partition_world_size(parameter)
        start = init._partition_rank(parameter) * size
        valid = max(min(start + size, cut.ds_numel) - start, 0)
        shard = torch.zeros(
            size,
            dtype=parameter.dtype,
            device=init.local_device if cut.ds_persist else init.remote_device,
        )
        read(source, start, shard[:valid], parameter.dtype)
        shard = shard.pin_memory() if init.pin_memory and shard.device.type == "cpu" else shard
        held = _as_cut(shard)
        held.ds_numel, held.status, held.final_location = (
            size,
            PartitionedParamStatus.AVAILABLE,
            None,
        )
        cut.ds_tensor, cut.ds_numel_aligned = shard, init._aligned_size(parameter)
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=init.local_device)
        cut.partition()  # only marks it: the shard is there
    for buffer in module.buffers():
        # DeepSpeed moves them only where it also moves the parameters
        buffer.data = buffer.data.to(init.local_device)
