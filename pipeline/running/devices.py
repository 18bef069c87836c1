"""The GPUs of this machine, and what a recipe's `auto` means on them.

Needs no torch: questions are answered in milliseconds.

    ranks(recipe.train)             # auto: every visible GPU, or two processes on a CPU
    dtype(recipe.model.dtype)       # auto: bfloat16 where the hardware multiplies it
    attention(recipe.model), ds_config(recipe.train)

NVIDIA's management library is asked (nvidia-ml-py); where it is not there and a GPU may be, torch is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import shipped
from pipeline.recipe.sections import ModelSection, TrainSection

if TYPE_CHECKING:
    from types import ModuleType

    import torch

CPU_PROCESSES = 2  # of `ranks: auto` without a GPU: one process would shard nothing
_BFLOAT16 = (8, 0)  # compute capability from which tensor cores multiply bfloat16 (Ampere)
# what transformers takes of the package
FLASH, _FLASH_GPUS, _FLASH_VERSION = "flash_attention_2", (8, 0), (2, 3, 3)


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use.

    name: as CUDA_VISIBLE_DEVICES names it; total, free: bytes; busy: processes that compute on it.
    """

    name: str
    model: str
    total: int
    free: int
    capability: tuple[int, int]
    busy: tuple[int, ...] = ()


def device() -> torch.device:
    """This process's accelerator, else the CPU.

    ValueError where the launcher started more processes than this machine has GPUs.
    """
    import torch  # which takes seconds, and nothing else here needs it

    if not torch.cuda.is_available():
        gpus()  # they may be there, and torch unable to use them: the reason is a ValueError
        return torch.device("cpu")
    rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    # Every rank says so where the launcher tells how many they are (torchrun, ours; deepspeed): the first one's
    # sentence is the one that is printed.
    started = max(
        rank + 1, *(int(os.environ.get(name) or 1) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    )
    if started > count:
        raise ValueError(
            f"{started} processes were started on this machine, and each sees {count} "
            f"GPU{'s' * (count > 1)}: start at most {count} (train.ranks, or the launcher's "
            "processes a node)"
        )
    return torch.device("cuda", rank)


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The visible GPUs, in CUDA_VISIBLE_DEVICES' order; none where torch is built without CUDA.

    Raises ValueError where torch cannot use them with this driver.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not _built_for_gpus():
        return ()
    try:
        import pynvml
    except ImportError:
        return _asked_of_torch()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return _asked_of_torch()
    try:
        found = _visible(pynvml)
        if found:
            _check_driver(pynvml)
        return found
    except pynvml.NVMLError:
        # not every GPU answers every question: memory that is shared with the CPU, a part of a GPU
        return _asked_of_torch()
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def environment() -> tuple[int, int]:
    """(rank, world size) of this process, as its launcher says; (0, 1) without one.

    ValueError where what it says is no rank.
    """
    rank, size = (
        os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))
    )
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ValueError(
            f"RANK is '{rank}' and WORLD_SIZE '{size}' in the environment: a launcher sets them to "
            "0 to N - 1 and N; unset both to run alone"
        )
    return int(rank), int(size)


def ranks(train: TrainSection) -> int:
    """Processes of a training on this machine.

    auto: the visible GPUs, or two on a CPU; fewer where train.batch_size is not divisible by them.
    """
    if train.ranks != "auto":
        return train.ranks
    if train.engine == "single":
        return 1
    most = len(gpus()) or CPU_PROCESSES
    return max(count for count in range(1, most + 1) if train.batch_size % count == 0)


def check_ranks(field: str, train: TrainSection) -> None:
    """ValueError where a training asks for more processes than there are GPUs here.

    field: of the recipe, e.g. train.
    """
    found = gpus()
    if found and ranks(train) > len(found):
        raise ValueError(
            f"{field}.ranks {ranks(train)} needs as many GPUs, and this machine shows "
            f"{len(found)} ({_summary(found)}): set {field}.ranks to auto or to at most "
            f"{len(found)}"
        )


def dtype(name: str) -> str:
    """float32 or bfloat16: what model.dtype means here. auto: bfloat16 where the hardware multiplies it natively."""
    if name != "auto":
        return name
    found = gpus()
    if found:
        return "bfloat16" if min(gpu.capability for gpu in found) >= _BFLOAT16 else "float32"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return "bfloat16" if re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) else "float32"


def attention(model: ModelSection) -> str:
    """flash_attention_2, sdpa or eager: what model.attention means here.

    auto: eager on a CPU, where it was a tenth faster on sequences of 128 tokens; on GPUs FlashAttention where it can be
    had, else sdpa.
    """
    if model.attention != "auto":
        return model.attention
    return "eager" if not gpus() else "sdpa" if _without_flash(model) else FLASH


def check_attention(model: ModelSection) -> None:
    """ValueError, one sentence, where model.attention names FlashAttention and this machine has none for the model."""
    reason = _without_flash(model) if model.attention == FLASH else None
    if reason:
        raise ValueError(
            f"model.attention {FLASH} {reason}: set model.attention to auto, or to sdpa"
        )


def _without_flash(model: ModelSection) -> str | None:
    """Why FlashAttention cannot be used here; None where it can."""
    if not gpus():
        return "needs a GPU, and none is visible"
    oldest = min(gpus(), key=lambda gpu: gpu.capability)
    if oldest.capability < _FLASH_GPUS:
        has = ".".join(map(str, oldest.capability))
        return f"needs compute capability 8.0, and GPU {oldest.name} ({oldest.model}) has {has}"
    if dtype(model.dtype) != "bfloat16":
        return f"computes in bfloat16, and model.dtype is {dtype(model.dtype)}"
    found = _flash_version()
    if found is None or tuple(map(int, re.findall(r"\d+", found)[:3])) < _FLASH_VERSION:
        there = "it is not installed" if found is None else f"{found} is installed"
        return f"needs the package flash-attn {'.'.join(map(str, _FLASH_VERSION))} or newer, and {there}"
    return None


def _flash_version() -> str | None:
    """The installed flash-attn's version. Later generations of it come as packages of other names."""
    try:
        return importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return None


def ds_config(train: TrainSection) -> Path:
    """The DeepSpeed file of engine zero3.

    auto: small buckets on a CPU, where nothing overlaps; those of ds_configs/zero3.json on GPUs.
    """
    if train.ds_config != "auto":
        return train.ds_config
    return shipped.FOLDER / "ds_configs" / ("zero3.json" if gpus() else "zero3_cpu.json")


def describe(model: ModelSection, train: TrainSection) -> str:
    """Where a training runs and what was chosen for it, in one line."""
    found, count = gpus(), ranks(train)
    where = (
        _summary(found)
        if found
        else "the CPU (no GPU is visible)"
        if _built_for_gpus()
        else "the CPU (torch is built without CUDA)"
    )
    processes = f"{count} process{'es' * (count > 1)} on {where}"
    if train.ranks == "auto" and found and count < len(found) and train.engine != "single":
        processes += f", because train.batch_size {train.batch_size} is not divisible by more"
    if (
        found
        and count == 1
        and train.engine != "single"
        and train.adapter == "lora"
        and train.ds_config == "auto"
    ):
        processes += ", which shards nothing: train.engine single does the same in less time (docs/performance.md)"
    settings = f"model.dtype {dtype(model.dtype)}, model.attention {attention(model)}"
    return f"{processes}; {settings}" + (
        f", train.ds_config {ds_config(train).name}" if train.engine == "zero3" else ""
    )


def check_memory(needed: float, what: str, remedy: str) -> str | None:
    """Whether each GPU that is used has `needed` bytes, which the planner's sums may exceed by a fifth.

    A sentence of warning, or None.

    Raises ValueError where a GPU is too small, or busy, beyond that doubt. what: the training, e.g. "method sap";
    remedy: fields to change.
    """
    for gpu in gpus():
        size = (
            f"{what} needs about {needed / 1e9:.1f} GB of every GPU by arithmetic (`sap plan`), "
            f"and GPU {gpu.name} ({gpu.model})"
        )
        if needed > 1.2 * gpu.total:
            raise ValueError(f"{size} has {gpu.total / 1e9:.1f}: {remedy}")
        if needed > 1.2 * gpu.free:
            who = ", ".join(map(str, gpu.busy))
            by = (
                f" (process {who} holds the rest)"
                if len(gpu.busy) == 1
                else f" (processes {who} hold the rest)"
                if who
                else ""
            )
            raise ValueError(
                f"{size} has {gpu.free / 1e9:.1f} of {gpu.total / 1e9:.1f} GB free{by}: wait for "
                "it, or choose other GPUs with CUDA_VISIBLE_DEVICES"
            )
        if needed > gpu.free:
            return f"{size} has {gpu.free / 1e9:.1f} GB free: it may not fit"
    return None


def _summary(found: tuple[Gpu, ...]) -> str:
    models = list(dict.fromkeys(gpu.model for gpu in found))
    return f"{len(found)} GPU{'s' * (len(found) > 1)}: {', '.join(models)}"


def _visible(nvml: ModuleType) -> tuple[Gpu, ...]:
    """What CUDA_VISIBLE_DEVICES leaves of the machine's GPUs, read as CUDA reads it:
    it ends at the first entry that names none.

    Raises NVMLError where the library cannot tell, as of GPUs that are cut into parts (MIG),
    which CUDA counts by rules of its own.
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if any(_in_parts(nvml, handle) for handle in handles):
        raise nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED)
    named = {str(index): handle for index, handle in enumerate(handles)}
    uuids = {_text(nvml.nvmlDeviceGetUUID(handle)): handle for handle in handles}
    chosen: list[tuple[str, Any]] = []
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    for entry in (
        list(named) if variable is None else [part.strip() for part in variable.split(",")]
    ):
        number = re.match(r"\+?0*(\d+)", entry)  # as strtoul: 1gpu counts as 1
        by_uuid = [
            found
            for uuid, found in uuids.items()
            if entry.startswith("GPU-") and uuid.startswith(entry)
        ]
        handle = named.get(number[1]) if number else by_uuid[0] if len(by_uuid) == 1 else None
        if handle is None:
            break
        if any(handle is other for _, other in chosen):
            return ()  # one GPU named twice: CUDA takes that for none
        chosen.append((entry, handle))
    return tuple(_gpu(nvml, name, handle) for name, handle in chosen)


def _in_parts(nvml: ModuleType, handle: Any) -> bool:
    try:
        return nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    except nvml.NVMLError:  # a GPU that knows no parts
        return False


def _gpu(nvml: ModuleType, name: str, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        busy = tuple(
            process.pid
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            if process.pid != os.getpid()
        )
    except nvml.NVMLError:  # not told in every container
        busy = ()
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        name,
        _text(nvml.nvmlDeviceGetName(handle)),
        int(memory.total),
        int(memory.free),
        (int(major), int(minor)),
        busy,
    )


def _check_driver(nvml: ModuleType) -> None:
    """ValueError where the driver is of an older CUDA than torch's: torch would say that there is no GPU.

    Minor versions go together.
    """
    built = _torch_build()["cuda"] or ""
    known = nvml.nvmlSystemGetCudaDriverVersion_v2()  # 12020: CUDA 12.2
    major = re.match(r"\d+", built)
    if major and int(major[0]) > known // 1000:
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        raise ValueError(
            f"torch {_torch_build()['__version__']} is built for CUDA {built}, and this machine's "
            f"driver {driver} knows CUDA {known // 1000}.{known % 1000 // 10}: "
            f"install a newer driver or a torch built for CUDA {known // 1000}, or set "
            "CUDA_VISIBLE_DEVICES to nothing to train on the CPU"
        )


@functools.cache
def _torch_build() -> dict[str, str | None]:
    """cuda, hip: versions that the installed torch is built for, None where for none;
    read from its files, for importing it takes seconds.
    """
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).parent / "version.py" if spec and spec.origin else None
    text = file.read_text() if file and file.is_file() else ""
    return {
        name: (re.search(rf"^{name}\b[^=\n]*= '([^']+)'", text, re.MULTILINE) or [None, None])[1]
        for name in ("cuda", "hip", "__version__")
    }


def _built_for_gpus() -> bool:
    return bool(_torch_build()["cuda"] or _torch_build()["hip"])


def _asked_of_torch() -> tuple[Gpu, ...]:
    """The GPUs by torch, for those of which NVIDIA's library tells too little. All of their memory counts as free."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return ()
    import torch

    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "").split(",")
    found = []
    for index in range(torch.cuda.device_count()):
        # mem_get_info would leave a context of this process on the GPU
        properties = torch.cuda.get_device_properties(index)
        name = visible[index].strip() if index < len(visible) and visible[index] else str(index)
        size = properties.total_memory
        found.append(Gpu(name, properties.name, size, size, (properties.major, properties.minor)))
    return tuple(found)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
