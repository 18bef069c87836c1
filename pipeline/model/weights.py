"""Weights in safetensors files, read and written piece by piece; knows files, not models or engines.

    files = WeightFiles(Path("models/llama"))            # name -> tensor; nothing is read before it is asked for
    files.flat("model.norm.weight", 0, 10)                # ten elements
    write_sharded(merged(files, updates, torch.bfloat16), Path("merged"))

Files are mapped into memory, one at a time: pages of a file belong to the kernel's cache,
which all processes of a node share.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pipeline.system.system_errors import BrokenFile, naming

MAX_FILE_BYTES = 5 * 10**9  # transformers' own default
_CHUNK = 2**20  # elements read at a time
_CHUNK_OF_GPU = 2**22  # into memory of another device: fewer and larger copies
# Pieces that are read at the same time, each by one thread: while one waits for the disk, another is checked, quantised
# or on its way to a GPU. All that is read ahead is what these hold. For a GPU that is 32 MB of bfloat16 weights, or 64
# MB where they become 4 bits; twice that in float32.
READERS = 4

Source = Callable[[int, int], torch.Tensor]
"""Elements start..stop of a parameter's flattened value, in any dtype and on any device:
`read` brings them to the parameter's.

Several threads ask at the same time, for other elements of the same parameter.
"""


class Sources(dict[nn.Parameter, Source]):
    """Where parameters without memory get their values, in the order in which the files hold them.

    damaged: a sentence for each weight that was read and held NaN or infinity. It is for all ranks together to act on
    (`sharding.launch.open_engine`): each reads other parts, and one that left alone would leave the others waiting.
    """

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.damaged: list[str] = []


class WeightFiles(Mapping[str, torch.Tensor]):
    """The tensors of a folder's `<stem>.safetensors`, or of the several files that
    `<stem>.safetensors.index.json` lists.

    Iterates in the order of the files, so that whoever follows it maps each file once. A returned tensor is a view of
    the file: clone it to keep it. Threads may share it. Raises FileNotFoundError where the folder has neither,
    BrokenFile where one is not whole.
    """

    def __init__(self, folder: Path, stem: str = "model"):
        self.folder = folder
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        alone = single.is_file()
        names = dict.fromkeys(_names(single), single.name) if alone else listed(index)
        self._file_of = dict(sorted(names.items(), key=lambda item: item[1]))
        missing = [name for name in sorted(set(names.values())) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder / missing[0]} is missing, though {index.name} lists it"
            )
        self._open: tuple[str, safe_open] | None = None
        self._opening = threading.Lock()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __getitem__(self, name: str) -> torch.Tensor:
        with self._naming(name):
            return self._file(name).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor as it is stored; reads no weights."""
        with self._naming(name):
            return tuple(self._file(name).get_slice(name).get_shape())

    def is_float(self, name: str) -> bool:
        """Whether the tensor is of 16, 32 or 64-bit floating point; 8-bit floats are useless without their scales."""
        with self._naming(name):
            return self._file(name).get_slice(name).get_dtype() in ("F16", "BF16", "F32", "F64")

    def flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of the flattened tensor, in the file's dtype;
        only the rows that hold them are touched.
        """
        if stop <= start:
            return torch.empty(0)
        shape = self.shape(name)
        if not shape:
            return self[name].reshape(1)
        row = math.prod(shape[1:])
        first = start // row
        with self._naming(name):
            rows = self._file(name).get_slice(name)[first : -(-stop // row)]
        return rows.reshape(-1)[start - first * row : stop - first * row]

    def _naming(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Inside the block the system's errors, and those of a file that is not whole, name the tensor's file."""
        return naming(self.folder / self._file_of[name])

    def _file(self, name: str) -> safe_open:
        file = self._file_of[name]
        with self._opening:
            if self._open is None or self._open[0] != file:
                self._open = None  # unmapped before the next one is mapped
                self._open = (file, safe_open(self.folder / file, framework="pt"))
            return self._open[1]


def listed(index: Path) -> dict[str, str]:
    """Name of a tensor -> name of its file, by a `model.safetensors.index.json`.

    BrokenFile where it does not say so.
    """
    try:
        with naming(index):
            names = json.loads(index.read_text())["weight_map"]
        if all(isinstance(file, str) for file in names.values()):
            return names
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise BrokenFile(f"{index} holds no weight_map of tensors to files: copy or download it again")


def _names(file: Path) -> list[str]:
    with naming(file), safe_open(file, framework="pt") as opened:
        return sorted(opened.keys())


def file_source(files: WeightFiles, name: str) -> Source:
    """A tensor of the files as a source."""
    return lambda start, stop: files.flat(name, start, stop)


def not_finite(tensor: torch.Tensor) -> str | None:
    """ "NaN" or "infinity" where the tensor holds one; None where all is finite, or it holds no floating point."""
    if not tensor.is_floating_point():
        return None
    for part in tensor.detach().reshape(-1).split(_CHUNK):
        # A sum takes a tenth of isfinite's time; it may overflow where all is finite, so it only says where to look.
        # The common types need no copy for it; float16 would overflow all the time, and 8 bits have no sum.
        total = (
            part.sum()
            if part.dtype in (torch.bfloat16, torch.float32, torch.float64)
            else part.float().sum()
        )
        if not math.isfinite(total.item()) and not torch.isfinite(part).all():
            return "NaN" if part.isnan().any() else "infinity"
    return None


def tensor_source(tensor: torch.Tensor) -> Source:
    """A tensor in memory as a source."""
    return lambda start, stop: tensor.reshape(-1)[start:stop]


def placeholder(
    shape: Iterable[int], dtype: torch.dtype, requires_grad: bool = False
) -> nn.Parameter:
    """A parameter of that shape on the CPU that takes the memory of one element: its value comes from a source."""
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(*shape), requires_grad=requires_grad)


def read(source: Source, start: int, target: torch.Tensor, dtype: torch.dtype) -> None:
    """Fill the flat `target` with a source's elements from `start` on, rounded to `dtype`.

    Several threads read, a piece of some MB each. Raises what the source raises, of several pieces the first one's.
    """
    size = _CHUNK if target.device.type == "cpu" else _CHUNK_OF_GPU

    def piece(low: int) -> None:
        part = target[low : low + size]
        value = source(start + low, start + low + part.numel())
        # copy_ casts without a temporary tensor; a float32 master of bfloat16 weights is rounded first.
        part.copy_(value if part.dtype == dtype else value.to(dtype))

    if target.numel() <= size:  # biases and norms, and all of a small shard: no thread to start
        if target.numel():
            piece(0)
        return
    with ThreadPoolExecutor(READERS, thread_name_prefix="weights") as pool:
        # A thread takes the lowest that is left and writes it into the target itself: nothing waits to be fetched.
        pieces = [pool.submit(piece, low) for low in range(0, target.numel(), size)]
        try:
            for waited in pieces:
                waited.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is left would be read for nothing
            raise


def fill(sources: Sources, device: torch.device | str = "cpu") -> None:
    """Give every placeholder its whole value, on `device`: for a process that holds the whole model."""
    for parameter, source in sources.items():
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        read(source, 0, value.view(-1), parameter.dtype)
        parameter.data = value


def write_sharded(
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    stem: str = "model",
    max_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write named tensors as they come: `<stem>.safetensors`, or several files and their index as
    transformers and vLLM read it.

    Holds one file's tensors at the most (`max_bytes`, or one tensor where that is larger). Re-opens what it wrote;
    AssertionError where a tensor is empty, not finite, or not in the files as it came.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, torch.Size] = {}
    parts: list[list[str]] = []
    total = 0
    for part in _packed(tensors, max_bytes):
        assert not part.keys() & shapes.keys(), (
            f"{sorted(part.keys() & shapes.keys())[0]} came twice"
        )
        shapes |= {name: tensor.shape for name, tensor in part.items()}
        total += sum(map(_bytes, part.values()))
        # Contiguous copies of views: safetensors refuses tensors that share memory.
        held = Counter(tensor.untyped_storage().data_ptr() for tensor in part.values())
        alone = {
            name for name, tensor in part.items() if held[tensor.untyped_storage().data_ptr()] == 1
        }
        owned = {
            name: tensor.contiguous() if name in alone else tensor.clone()
            for name, tensor in part.items()
        }
        save_file(owned, folder / f"{stem}-{len(parts) + 1:05d}.part", metadata={"format": "pt"})
        parts.append(list(part))
        del part, owned  # before the next part is collected
    names = [
        f"{stem}-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        if len(parts) > 1
        else f"{stem}.safetensors"
        for number in range(len(parts))
    ]
    for number, name in enumerate(names):
        (folder / f"{stem}-{number + 1:05d}.part").replace(folder / name)
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {
                name: file for file, part in zip(names, parts, strict=True) for name in part
            },
        }
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )
    _check(WeightFiles(folder, stem), shapes)


def _packed(
    tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        assert tensor.numel() > 0, f"{name} is empty"
        assert name not in part, f"{name} came twice"
        if part and size + _bytes(tensor) > max_bytes:
            yield part
            part, size = {}, 0
        part[name], size = tensor, size + _bytes(tensor)
        del tensor
    yield part


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _check(files: WeightFiles, shapes: dict[str, torch.Size]) -> None:
    assert set(files) == set(shapes), f"{files.folder} does not hold the tensors that were written"
    for name in files:
        assert files.shape(name) == tuple(shapes[name]), (
            f"{name} changed its shape in {files.folder}"
        )
        assert torch.isfinite(files[name]).all(), f"{name} in {files.folder} is not finite"


def merged(
    base: Mapping[str, torch.Tensor],
    updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    scaling: float,
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The base's tensors with low-rank updates added, one at a time, in the order and under the names of the files.

    updates: weight name -> (A (r, in), B (out, r)), float32. W + (B A) * scaling is computed in float32 and then cast
    to `dtype`, which is bit for bit PEFT's merge_and_unload of a float32 model followed by `.to(dtype)`. Integer
    tensors stay as they are.
    """
    assert updates.keys() <= set(base), "an updated weight is not in the base's files"
    for name in base:
        tensor = base[name]
        if name in updates:
            a, b = updates[name]
            tensor = tensor.float() + (b @ a) * scaling
        # A copy: the view would keep its file mapped.
        yield name, tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
        del tensor
