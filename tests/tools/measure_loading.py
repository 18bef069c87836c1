"""Host memory while a model is loaded into shards, on two ranks of this machine.

    python -m tests.tools.measure_loading            # a random Llama of 550 MB (float32) in files of 100 MB

Counted is anonymous memory (RssAnon) above what the process had before, sampled every millisecond. Pages of the mapped
files are counted apart: they belong to the kernel's cache, once for all processes of a node, and are given up where
memory is short.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.distributed.ranks import spawn

WORLD = 2


def make_model(
    folder: Path, hidden: int, layers: int, file_bytes: int, dtype: torch.dtype = torch.float32
) -> int:
    """Write a random Llama in several files; returns the bytes of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=file_bytes)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


class Memory:
    """The most that this process held inside the block, above what it held before: anonymous, and mapped file pages.

    Bytes.
    """

    def __enter__(self) -> Memory:
        gc.collect()
        # freed memory that glibc kept would hide what the block takes
        ctypes.CDLL(None).malloc_trim(0)
        self.start, self.anonymous, self.mapped, self._done = _resident(), 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._look()
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self._look()

    def _look(self) -> None:
        anonymous, mapped = (
            now - before for now, before in zip(_resident(), self.start, strict=True)
        )
        self.anonymous, self.mapped = max(self.anonymous, anonymous), max(self.mapped, mapped)


def _resident() -> tuple[int, int]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


def load(
    location: str,
    engine: str,
    quantization: str,
    adapter: str,
    streamed: bool,
    dtype: str = "float32",
) -> Any:
    """The engine over the model at `location`, on the ranks of the process group."""
    from pipeline.engines.open import open_engine
    from pipeline.model.loading import open_model
    from pipeline.model.models import load_model, make_trainable
    from pipeline.recipe.sections import ModelSection, TrainSection

    section = ModelSection(path=location, dtype=dtype, quantization=quantization)
    train = TrainSection(
        engine=engine,
        adapter=adapter,
        steps=1,
        batch_size=2,
        micro_batch_size=1,
        ds_config=Path("ds_configs/zero3_cpu.json"),
    )
    model, sources = (
        open_model(section, location, sharded=True)
        if streamed
        else (load_model(location, getattr(torch, dtype)), {})
    )
    return open_engine(make_trainable(model, train, seed=0), train, sources)


def held(engine: Any) -> int:
    """Bytes of the parameters' shards on this rank."""
    parts = [
        p.ds_tensor if hasattr(p, "ds_tensor") else p.to_local() for p in engine.module.parameters()
    ]
    parts += [layer.part for layer in engine.frozen.layers]
    return sum(part.numel() * part.element_size() for part in parts)


def rank_main(rank: int, engine: str, small: str, cases: list[dict[str, Any]], out: str) -> None:
    """What one rank does (tests.distributed.ranks): every case in turn,
    after a small model has brought in what loading imports.
    """
    from pipeline.engines.open import init_distributed
    from pipeline.recipe.sections import TrainSection

    init_distributed(TrainSection(engine=engine, steps=1))
    rows = []
    for case in cases:
        options = {key: value for key, value in case.items() if key != "location"}
        del_me = load(small, engine, **options)
        del del_me
        gc.collect()
        torch.distributed.barrier()
        started = time.perf_counter()
        with Memory() as memory:
            loaded = load(case["location"], engine, **options)
        numbers = torch.tensor(
            [
                memory.anonymous,
                memory.mapped,
                held(loaded),
                int(1e6 * (time.perf_counter() - started)),
            ],
            dtype=torch.float64,
        )
        largest = numbers.clone()
        torch.distributed.all_reduce(numbers)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        row = {
            "anonymous": numbers[0].item(),
            "mapped": largest[1].item(),
            "shards": numbers[2].item(),
            "seconds": largest[3].item() / 1e6,
        }
        rows.append({"engine": engine, **case, **row})
        del loaded
        gc.collect()
    if rank == 0:
        Path(out).write_text(json.dumps(rows))


def measure(
    engine: str, small: Path, cases: list[dict[str, Any]], out: Path
) -> list[dict[str, Any]]:
    """Rows of `cases` on two ranks: bytes of both ranks together (anonymous, shards), of one (mapped), and seconds."""
    spawn(WORLD, rank_main, engine, str(small), cases, str(out))
    return json.loads(out.read_text())


def in_own_process(function: Callable[..., Any], *arguments: Any) -> None:
    """Run it elsewhere, so that its memory is not part of the measurement."""
    torch.multiprocessing.spawn(_call, args=(function, arguments), nprocs=1)


def _call(_rank: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    function(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--file-mb", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_own_process(make_model, folder / "small", 64, 2, 10**9)
        in_own_process(
            make_model, folder / "model", options.hidden, options.layers, options.file_mb * 10**6
        )
        files = list((folder / "model").glob("*.safetensors"))
        largest = max(path.stat().st_size for path in files)
        print(
            f"{sum(path.stat().st_size for path in files) / 1e6:.0f} MB in {len(files)} files, the "
            f"largest {largest / 1e6:.0f} MB; {WORLD} ranks\n"
        )
        print("MB, both ranks together (mapped: one rank)\n")
        print(
            "| engine | weights | shards | shards + one file | peak | mapped | s |\n|---|---|---|---|---|---|---|"
        )
        common = {"location": str(folder / "model")}
        lora = {**common, "adapter": "lora", "quantization": "none", "streamed": True}
        cases = [
            lora,
            {**lora, "dtype": "bfloat16"},
            {**lora, "dtype": "bfloat16", "quantization": "nf4"},
            {**lora, "dtype": "bfloat16", "streamed": False},
        ]
        for engine in ("zero3", "fsdp2"):
            for row in measure(engine, folder / "small", cases, folder / "rows.json"):
                weights = (
                    row.get("dtype", "float32")
                    + (", nf4" if row["quantization"] == "nf4" else "")
                    + ("" if row["streamed"] else ", loaded whole")
                )
                numbers = [row["shards"], row["shards"] + largest, row["anonymous"], row["mapped"]]
                print(
                    f"| {engine} | {weights} | "
                    + " | ".join(f"{n / 1e6:.0f}" for n in numbers)
                    + f" | {row['seconds']:.1f} |"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
