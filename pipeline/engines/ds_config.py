"""Engines and what they are configured with, held against what the recipe decides. Needs no torch.

config = read_ds_config(recipe.train, world_size=8)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.objectives.sharing import accumulation
from pipeline.recipe.sections import TrainSection
from pipeline.running import devices


def check_engine(field: str, train: TrainSection, world_size: int) -> None:
    """ValueError where engine, ranks and DeepSpeed configuration do not go together. field: of the recipe, e.g. train.

    Reads no model.
    """
    if train.engine == "single" and world_size > 1:
        raise ValueError(
            f"{field}.engine single runs one process, but there are {world_size} ranks: use "
            f"{field}.engine zero3 or fsdp2, or {field}.ranks 1"
        )
    config = read_ds_config(train, world_size, field) if train.engine == "zero3" else {}
    if train.keep_gathered is True:
        _refuse_keeping(field, train, config)


def _refuse_keeping(field: str, train: TrainSection, config: dict[str, Any]) -> None:
    """ValueError where train.keep_gathered has nothing to keep."""
    ways = (
        (train.engine == "single", f"{field}.engine is single, which gathers nothing"),
        (train.adapter == "full", f"{field}.adapter is full, so that no layer is frozen"),
        (
            cuts_frozen(config.get("zero_optimization", {})),
            f"{field}.ds_config {train.ds_config} leaves frozen layers to DeepSpeed (offload_param, hpZ or quantized "
            "weights)",
        ),
    )
    why = next((why for holds, why in ways if holds), None)
    if why:
        raise ValueError(
            f"{field}.keep_gathered is true, but {why}: set {field}.keep_gathered to false, or to auto, which keeps "
            "what there is"
        )


def read_ds_config(train: TrainSection, world_size: int, field: str = "train") -> dict[str, Any]:
    """The DeepSpeed configuration: the recipe's JSON plus what the recipe itself decides.

    field: the section's, for messages.

    Raises ValueError where the file is missing, no JSON, not stage 3, holds "auto",
    or sets what the recipe owns to another value.
    """
    path = devices.ds_config(train)
    if not path.is_file():
        raise ValueError(
            f"{field}.ds_config {path} does not exist: give a DeepSpeed JSON file, e.g. ds_configs/zero3.json"
        )
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{field}.ds_config {path} is not valid JSON: {error}") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") != 3:
        raise ValueError(
            f"{field}.ds_config {path} must set zero_optimization.stage to 3 for engine zero3"
        )
    for key in ("offload_param", "offload_optimizer"):
        offloaded = zero.get(key) or {}
        if not isinstance(offloaded, dict) or offloaded.get("device", "none") not in (
            "none",
            "cpu",
        ):
            raise ValueError(
                f"{field}.ds_config {path} sets zero_optimization.{key} to something other than "
                "device cpu, which the perturbation was never "
                'tested with: take it out, or write {"device": "cpu"}'
            )
    size, passes = (
        train.micro_batch_size,
        accumulation(train.batch_size, train.micro_batch_size, world_size),
    )
    if train.tokens_per_micro_batch is not None:
        _refuse_fixed_passes(field, path, config)
        # Both differ from step to step. DeepSpeed wants numbers whose product is the batch, and computes nothing with
        # them: losses are shares of the global batch, and the engine says itself which pass ends a step.
        size, passes = 1, accumulation(train.batch_size, 1, world_size)
    owned = {
        "train_micro_batch_size_per_gpu": (f"{field}.micro_batch_size", size),
        "gradient_accumulation_steps": (f"{field}.batch_size and micro_batch_size", passes),
        "gradient_clipping": (f"{field}.max_grad_norm", train.max_grad_norm or 0.0),
    }
    for key, (named, value) in owned.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{field}.ds_config {path} sets {key} to {config[key]!r}, but {named} of the "
                f"recipe makes it {value}: take it out of the file"
            )
    for key in ("bf16", "fp16", "torch_autocast", "data_types"):
        if config.get(key) and (
            not isinstance(config[key], dict) or config[key].get("enabled", key == "data_types")
        ):
            raise ValueError(
                f"{field}.ds_config {path} sets {key}, which would cast the adapter or its "
                "gradient: take it out and set model.dtype"
            )
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ValueError(
                f"{field}.ds_config {path} sets {key}, which the recipe's {field} section owns: take it out of the file"
            )
    automatic = _auto_paths(config)
    if automatic:
        raise ValueError(
            f'{field}.ds_config {path} sets {automatic[0]} to "auto", which plain DeepSpeed drops '
            "silently: write a value"
        )
    # DeepSpeed multiplies it from the two, as if every micro-batch were full
    total = config.pop("train_batch_size", train.batch_size)
    if total != train.batch_size:
        raise ValueError(
            f"{field}.ds_config {path} sets train_batch_size to {total!r}, but {field}.batch_size "
            f"of the recipe makes it {train.batch_size}: take it out of the file"
        )
    # DeepSpeed's own linear inspects a signature at every call, for memory that is not held anyway: saved weights are
    # the parameters, which are released with their layer.
    zero.setdefault("memory_efficient_linear", False)
    # With an offloaded optimizer DeepSpeed insists on its own CPU Adam, which compiles for minutes, unless it is told.
    return {
        "zero_force_ds_cpu_optimizer": False,
        **config,
        **{key: value for key, (_, value) in owned.items()},
    }


def _refuse_fixed_passes(field: str, path: Path, config: dict[str, Any]) -> None:
    """ValueError where the file fixes what differs from step to step under a budget of tokens."""
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if key in config:
            raise ValueError(
                f"{field}.ds_config {path} sets {key}, but with {field}.tokens_per_micro_batch it differs from step to "
                f"step: take it out of the file, or set {field}.tokens_per_micro_batch to null"
            )


def cuts_frozen(zero: dict[str, Any]) -> bool:
    """Whether frozen weights of layers are left to DeepSpeed, because the file has them kept in a way that is its own:
    in host memory, in groups of ranks (hpZ), or gathered in fewer bits.
    """
    return (
        (zero.get("offload_param") or {}).get("device", "none") != "none"
        or zero.get("zero_hpz_partition_size", 1) > 1
        or any(zero.get(f"zero_quantized_{what}") for what in ("weights", "nontrainable_weights"))
    )


def fetched_at_once(trained: int, everything: int) -> bool:
    """Whether what is trained is small enough to be whole on every rank from a step's first pass to its update, and its
    gradients until the last micro-batch: an adapter.

    trained, everything: elements that are trained, and of all weights.
    """
    return trained < 0.05 * everything


def fetched_by_layer(
    zero: dict[str, Any], layer: int, others: int, kept: int = 0
) -> dict[str, Any]:
    """zero_optimization with the sizes that fetching whole modules wants, where the file says nothing of them.

    layer, others: elements of the largest such module (a decoder layer), and of all that is in none. One is fetched
    ahead while another is at work; DeepSpeed's own default, 50e6 elements, would fetch a quarter of a 7B model's layer
    ahead. kept: elements of a tensor up to which it stays whole between passes.
    """
    sizes = {
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": 2 * layer + others,
        **({"stage3_param_persistence_threshold": kept} if kept else {}),
    }
    return zero | {name: size for name, size in sizes.items() if said_size(zero, name) is None}


def said_size(zero: dict[str, Any], key: str) -> int | None:
    """A size of zero_optimization, which has two names; None where nothing is said of it."""
    names = (key, key.removeprefix("stage3_"))
    return next((int(zero[name]) for name in names if name in zero), None)


def _auto_paths(value: Any, prefix: str = "") -> list[str]:
    if isinstance(value, dict):
        return [
            path
            for key, item in value.items()
            for path in _auto_paths(item, f"{prefix}.{key}" if prefix else key)
        ]
    return [prefix] if value == "auto" else []
