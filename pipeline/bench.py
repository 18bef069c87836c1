"""`sap bench`: what a step of each engine costs in host time, on a model whose arithmetic is next to nothing.

    sap bench                                  # 32 layers of hidden size 64, LoRA r8, two micro-batches, one process each
    sap bench --layers 80 --rounds 5 --json bench.json

A round starts one process for every engine with and without activation checkpointing, one after another, so what else
the machine does meets all of them alike. Printed are median and spread of the rounds' medians, the ratio to engine
`single`, and what a layer takes in a micro-batch. All engines must end with the same loss: a fast wrong step is exit 1.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENGINES = ("single", "fsdp2", "zero3")
_MICRO_BATCHES, _WARM_UP, _STEPS = 2, 3, 10
_ALIKE = 1e-4  # of the losses after all steps, relative
# Sizes of what is fetched come from the model (ds_config.fetched_by_layer); nothing is kept from pass to pass.
_ZERO = {"stage": 3, "overlap_comm": False, "reduce_bucket_size": 10_000_000, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}


def command(argv: Sequence[str]) -> int:
    """`sap bench`: prints the table; returns 1 where the engines' losses differ."""
    parser = argparse.ArgumentParser(
        prog="sap bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--layers", type=int, default=32, help="decoder layers of the model; default 32")
    parser.add_argument("--rounds", type=int, default=3, help="processes started for every row; default 3")
    parser.add_argument("--engines", default=",".join(ENGINES), help="which engines, by commas; default all")
    parser.add_argument("--json", type=Path, help="file for every measurement")
    options = parser.parse_args(argv)
    engines = options.engines.split(",")
    unknown = [name for name in engines if name not in ENGINES]
    if unknown:
        raise ValueError(f"--engines names '{unknown[0]}': it takes some of {', '.join(ENGINES)}")
    for name in ("layers", "rounds"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}: it must be at least 1")
    found = []
    for number in range(options.rounds):
        for engine in engines:
            for checkpointing in (True, False):
                row = _measured(engine, checkpointing, options.layers)
                found.append(row | {"round": number})
                print(f"[bench] round {number + 1}/{options.rounds} {engine}: {row['ms']:.0f} ms a step", file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found, options.layers))
    losses = [row["loss"] for row in found]
    if max(losses) - min(losses) > _ALIKE * abs(losses[0]):
        print(f"the engines end with different losses, {min(losses):.6f} to {max(losses):.6f}: one of them is wrong", file=sys.stderr)
        return 1
    return 0


def table(found: list[dict[str, Any]], layers: int) -> str:
    """One line an engine and setting; times in milliseconds."""
    groups: dict[tuple[bool, str], list[float]] = {}
    for row in found:
        groups.setdefault((row["checkpointing"], row["engine"]), []).append(row["ms"])
    lines = ["| checkpointing | engine | ms a step | rounds | to single | ms a layer and micro-batch, all included |", "| --- | --- | --- | --- | --- | --- |"]
    for (checkpointing, engine), times in sorted(groups.items(), key=lambda item: (not item[0][0], ENGINES.index(item[0][1]))):
        middle, single = statistics.median(times), groups.get((checkpointing, "single"))
        ratio = f"{middle / statistics.median(single):.2f}" if single else ""
        spread = f"{min(times):.0f} to {max(times):.0f}"
        each = f"{middle / layers / _MICRO_BATCHES:.2f}"
        lines.append(f"| {'on' if checkpointing else 'off'} | {engine} | {middle:.0f} | {spread} | {ratio} | {each} |")
    return "\n".join(lines)


def _measured(engine: str, checkpointing: bool, layers: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = json.dumps({"engine": engine, "checkpointing": checkpointing, "layers": layers})
    environment = os.environ | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "pipeline.bench", given], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise RuntimeError(f"the process of engine {engine} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(engine: str, checkpointing: bool, layers: int) -> dict[str, Any]:
    """In a process of its own: the median time of a step in ms, and the loss of the last one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.models import make_trainable
    from pipeline.sections import LoraSection, TrainSection
    from pipeline.sharding import launch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps({"zero_optimization": _ZERO, "steps_per_print": 10**6}))
        train = TrainSection(
            steps=1, engine=engine, ds_config=str(path), batch_size=8, micro_batch_size=8 // _MICRO_BATCHES,
            gradient_checkpointing=checkpointing, lora=LoraSection(r=8, target_modules=["q_proj", "v_proj"]),
        )  # fmt: skip
        launch.init_distributed(train)
        opened = launch.open_engine(make_trainable(LlamaForCausalLM(config), train, 0), train)
    ids = torch.randint(0, config.vocab_size, (8, 16))
    batches = ids.split(train.micro_batch_size)

    def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(input_ids=batch, labels=batch, use_cache=False).loss / _MICRO_BATCHES

    times, loss = [], 0.0
    for number in range(_WARM_UP + _STEPS):
        start = time.perf_counter()
        loss, _ = opened.forward_backward(loss_of, batches)
        opened.step(1e-3)
        times += [time.perf_counter() - start] if number >= _WARM_UP else []
    launch.leave()
    return {"engine": engine, "checkpointing": checkpointing, "ms": 1000 * statistics.median(times), "loss": loss}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
