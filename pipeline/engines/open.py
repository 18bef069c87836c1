"""Process groups and engines: who this process is, and which engine the recipe asks for.

Ranks come from the environment (RANK, WORLD_SIZE, LOCAL_RANK), as torchrun, the deepspeed launcher and our Slurm
scripts set it; without it the process is alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from pipeline.engines import deepspeed_private
from pipeline.engines.ds_config import (
    cuts_frozen,
    fetched_at_once,
    fetched_by_layer,
    read_ds_config,
    said_size,
)
from pipeline.engines.engine import Engine
from pipeline.engines.exchange import of_every_rank
from pipeline.engines.frozen import FrozenLayers
from pipeline.engines.single import SingleEngine
from pipeline.libraries import torch_private
from pipeline.model.models import decoder_layers
from pipeline.model.weights import Sources, fill
from pipeline.recipe.sections import TrainSection
from pipeline.running.devices import device, environment


def init_distributed(train: TrainSection, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Join the process group that the environment describes;
    engines zero3 and fsdp2 need one of a single process too.
    """
    torch_private.check()
    if torch.cuda.is_available():
        torch.cuda.set_device(device())  # before any collective: NCCL takes the current one
    if train.engine == "single" or torch.distributed.is_initialized():
        return
    _complete_environment()
    if train.engine == "fsdp2":
        # gloo beside NCCL: for tensors that stay on the CPU.
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timeout
        )
        return
    # DeepSpeed still calls these on every pass; torch 2.13 says so every time.
    warnings.filterwarnings(
        "ignore",
        message=r".* is deprecated\. Please use `torch\.distributed",
        category=FutureWarning,
    )
    deepspeed_private.import_deepspeed()
    deepspeed_private.check()
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR" if environment()[0] else "WARNING")
    if not torch.cuda.is_available():
        deepspeed_private.without_shared_memory()
    deepspeed.init_distributed(
        "nccl" if torch.cuda.is_available() else "gloo", timeout=timeout, verbose=False
    )


def _complete_environment() -> None:
    """What a process alone needs of what a launcher sets. ValueError where there are others and it does not say where.

    Port 0 is any that is free, and whoever listens is the only one who has to know: two runs on one node do not meet.
    """
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    missing = [name for name in alone if name not in os.environ]
    lacking = [name for name in missing if name != "LOCAL_RANK"]  # a rank a node needs none
    if lacking and environment()[1] > 1:
        raise ValueError(
            f"the environment has WORLD_SIZE {environment()[1]}, but no "
            f"{' and no '.join(lacking)}: start the ranks with torchrun, deepspeed or sap, which "
            "set it, or unset WORLD_SIZE for a process alone"
        )
    for name in missing:
        os.environ[name] = alone[name]


def largest_of_ranks(number: int) -> int:
    """The largest of all ranks' numbers, on every rank: for what they must do alike."""
    if not torch.distributed.is_initialized():
        return number
    found = torch.tensor(number, device=device())
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found.item())


def leave() -> None:
    """Leave the process group together: a rank that is gone first may abort the others' communication threads,
    and with them the exit code.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def open_engine(
    module: nn.Module, train: TrainSection, sources: Sources | None = None, kept: int | None = None
) -> Engine:
    """The engine that the recipe asks for, with AdamW over the trainable parameters; call `init_distributed` before.

    Weights of dtype bfloat16 that are trained get a float32 master (zero3, fsdp2). sources: values of the module's
    placeholders (pipeline/model/loading.py), of which every rank reads its part only. ValueError where one of them is
    not finite. kept: frozen layers that stay gathered, for train.keep_gathered auto, which else keeps none.
    """
    sources = sources or Sources()
    if kept is None:
        kept = len(decoder_layers(module)) if train.keep_gathered is True else 0
    engine = _open(module, train, sources, kept)
    _refuse_damaged(sources.damaged)
    return engine


def _open(module: nn.Module, train: TrainSection, sources: Sources, kept: int) -> Engine:
    trained = _trainable(module)
    if train.engine == "single":
        fill(sources, device())
        return SingleEngine(module, adamw(trained, train), train.max_grad_norm, device())
    blocks, everything = decoder_layers(module), _elements([module])
    config = read_ds_config(train, environment()[1]) if train.engine == "zero3" else {}
    ours = not cuts_frozen(config.get("zero_optimization", {}))
    frozen = FrozenLayers(module, blocks, sources, device(), kept) if ours else None
    if ours and fetched_at_once(sum(p.numel() for p in trained), everything):
        blocks = []
    low = {p.dtype for p in trained} == {torch.bfloat16}
    if train.engine == "fsdp2":
        from pipeline.engines.fsdp2 import Fsdp2Engine

        dtype, norm = torch.bfloat16 if low else None, train.max_grad_norm
        engine: Engine = Fsdp2Engine(
            module, blocks, lambda ps: adamw(ps, train), norm, device(), dtype, sources
        )
    else:
        config |= {"bf16": {"enabled": True}} if low else {}
        engine = _zero3(module, train, blocks, config, sources)
    engine.frozen = frozen
    return engine


def _zero3(
    module: nn.Module, train: TrainSection, blocks: Sequence[nn.Module], config: dict[str, Any],
    sources: Sources,
) -> Engine:  # fmt: skip
    """blocks: none where what is trained is fetched at once."""
    from pipeline.engines.zero3 import Zero3Engine

    trained, at_once = _trainable(module), not blocks
    fetched, kept = (
        ([_around(module, decoder_layers(module))], max(p.numel() for p in trained))
        if at_once
        else (blocks, 0)
    )
    layer, rest = max(_elements([block]) for block in fetched), _elements(fetched)
    zero = fetched_by_layer(config["zero_optimization"], layer, _elements([module]) - rest, kept)
    once = at_once and (said_size(zero, "stage3_param_persistence_threshold") or 0) >= kept
    config = config | {"zero_optimization": zero}
    return Zero3Engine(module, adamw(trained, train), config, fetched, sources, once)


def _around(module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
    """The innermost module that calls all of the blocks."""
    holds = [m for m in module.modules() if set(blocks) <= set(m.modules())]
    return next(m for m in reversed(holds) if not isinstance(m, nn.ModuleList))


def _elements(modules: Sequence[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _refuse_damaged(found: list[str]) -> None:
    """ValueError on all ranks where one of them read a weight that is not finite: they leave together."""
    first = next(
        (sentence for sentences in of_every_rank(found[:1]) for sentence in sentences), None
    )
    if first:
        raise ValueError(first)


def adamw(parameters: list[nn.Parameter], train: TrainSection) -> torch.optim.Optimizer:
    """The recipe's AdamW: fused on GPUs, where a kernel a tensor and operation takes longer than the arithmetic;
    else one tensor at a time.

    The fused form differs from the other in the last digits, and is the same on every engine whose
    optimizer is on the GPU.
    """
    betas = (train.adam_beta1, train.adam_beta2)
    form = {"fused": True} if torch.cuda.is_available() else {"foreach": False}
    return torch.optim.AdamW(
        parameters,
        lr=train.lr,
        betas=betas,
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        **form,
    )


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
