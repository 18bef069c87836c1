"""`sap bench`: what a step costs, by engine and method, beside transformers' Trainer with PEFT and TRL's SFTTrainer.

    sap bench                                                   # host time: a model whose arithmetic is next to nothing
    sap bench --shape 8b --systems trainer,single,fsdp2,zero3   # on a GPU
    sap bench --shape 135m --systems single --methods plain,sap,sap_lagged,lisa,ema --json bench.json

A round runs every case in a process of its own, one after another, so what else the machine does meets all of them
alike. Printed are median and spread of the rounds' medians and the ratio to the first system's plain step. Systems that
train the same way must end with the same loss: a fast wrong step is exit 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.bench.cases import ENGINES, METHODS, OTHERS, SHAPES, SHARDING, Case
from pipeline.bench.processes import Processes

# of the losses after all steps, relative; on GPUs frozen weights are bfloat16, and Trainer casts the adapter too
_ALIKE = {"cpu": 1e-4, "gpu": 2e-3}


def command(argv: Sequence[str]) -> int:
    """`sap bench`: prints the table; returns 1 where losses differ that must be the same.

    ValueError for what cannot be measured.
    """
    options = _options(argv)
    found: list[dict[str, Any]] = []
    cases = _cases(options)
    with Processes() as processes:
        rate = processes.call("pipeline.bench.measure:matmul_rate")
        for number in range(options.rounds):
            for case in cases:
                row = processes.call("pipeline.bench.measure:measure", case) | {"round": number}
                found.append(row)
                print(
                    f"[bench] round {number + 1}/{options.rounds} {_name(row)}: {row['ms']:.0f} ms a step",
                    file=sys.stderr,
                    flush=True,
                )
                if row["profile"]:
                    print(row["profile"])
    if options.json:
        artifacts.write_text(
            options.json, json.dumps({"matmul_flops_per_s": rate, "rows": found}, indent=1) + "\n"
        )
    print(table(found, rate))
    problem = unlike(found)
    if problem:
        print(problem, file=sys.stderr)
    return int(problem is not None)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sap bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--shape", default="host", help=f"the model: {', '.join(SHAPES)}; default host"
    )
    parser.add_argument(
        "--layers", type=int, help="decoder layers of the model, where not the shape's"
    )
    parser.add_argument(
        "--systems",
        default=",".join(ENGINES),
        help=f"by commas, some of {', '.join((*ENGINES, *OTHERS))}; default all engines",
    )
    parser.add_argument(
        "--methods",
        default="plain",
        help=f"by commas, some of {', '.join(METHODS)}; default plain; others than plain on engines only",
    )
    parser.add_argument(
        "--checkpointing",
        choices=("on", "off", "both"),
        default="both",
        help="recomputation of activations; default both",
    )
    parser.add_argument(
        "--lengths",
        choices=("fixed", "real"),
        default="fixed",
        help="rows of one length, or a few long and many short ones; default fixed",
    )
    parser.add_argument("--length", type=int, help="tokens of a row, where not the shape's")
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        help="processes that share a step, each with as many rows as one alone: of engines that shard; default 1",
    )
    parser.add_argument(
        "--keep-gathered", action="store_true", help="as train.keep_gathered, for fsdp2 and zero3"
    )
    parser.add_argument("--tokens", type=int, help="as train.tokens_per_micro_batch, for engines")
    parser.add_argument(
        "--packing", action="store_true", help="as train.packing, for engines, with --tokens"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="processes started for every case; default 3"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=10,
        help="steps that are timed, after three that are not; default 10",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also print the dearest operators of every case; its times are not to be compared",
    )
    parser.add_argument("--json", type=Path, help="file for every measurement")
    options = parser.parse_args(argv)
    for name, known in (
        ("systems", (*ENGINES, *OTHERS)),
        ("methods", METHODS),
        ("shape", tuple(SHAPES)),
    ):
        given = getattr(options, name)
        unknown = [
            one for one in ([given] if name == "shape" else given.split(",")) if one not in known
        ]
        if unknown:
            raise ValueError(
                f"--{name} names '{unknown[0]}': it takes {'one' if name == 'shape' else 'some'} of {', '.join(known)}"
            )
    if options.json and not options.json.absolute().parent.is_dir():
        raise ValueError(f"--json {options.json} is in no folder that exists: make it first")
    if "trl" in options.systems.split(",") and importlib.util.find_spec("trl") is None:
        raise ValueError(
            "--systems names trl, which is not installed: pip install trl, or leave it out"
        )
    _check_together(options)
    for name in ("layers", "length", "ranks", "tokens", "rounds", "steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}: it must be at least 1")
    if not _cases(options):
        raise ValueError(
            f"--systems {options.systems} and --methods {options.methods} go together in no case: "
            "methods other than plain need an engine"
        )
    return options


def _check_together(options: argparse.Namespace) -> None:
    """ValueError for options that do not go with one another."""
    systems = options.systems.split(",")
    alone = [system for system in systems if system not in SHARDING]
    if options.ranks > 1 and alone:
        raise ValueError(
            f"--ranks {options.ranks} goes with systems that shard, {' and '.join(SHARDING)}, and not with {alone[0]}"
        )
    if options.keep_gathered and not set(systems) & set(SHARDING):
        raise ValueError(
            f"--keep-gathered is for {' and '.join(SHARDING)}: name one with --systems"
        )
    if options.packing and options.tokens is None:
        raise ValueError("--packing needs --tokens, the budget of a packed row")
    least = SHAPES[options.shape].length if options.length is None else options.length
    if options.tokens is not None and options.tokens < least:
        raise ValueError(
            f"--tokens is {options.tokens}, less than a row of {least}: raise it, or lower --length"
        )


def _cases(options: argparse.Namespace) -> list[Case]:
    ways = {"on": (True,), "off": (False,), "both": (True, False)}[options.checkpointing]
    return [
        Case(
            system,
            method,
            options.shape,
            options.layers,
            way,
            lengths=options.lengths,
            length=options.length,
            ranks=options.ranks,
            keep_gathered=options.keep_gathered and system in SHARDING,
            tokens=options.tokens if system in ENGINES else None,
            packing=options.packing and system in ENGINES,
            steps=options.steps,
            profile=options.profile,
        )
        for way in ways
        for system in options.systems.split(",")
        for method in options.methods.split(",")
        if method == "plain" or system in ENGINES
    ]


def _name(row: dict[str, Any]) -> str:
    return (
        f"{row['system']} {row['method']}, checkpointing {'on' if row['checkpointing'] else 'off'}"
    )


def table(found: list[dict[str, Any]], rate: float) -> str:
    """One line a case, in the order they ran.

    Ratios are to the first line of the same setting; rate: FLOP/s of a large matrix product.
    """
    groups: dict[tuple[bool, str, str], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["checkpointing"], row["system"], row["method"]), []).append(row)
    names = [
        "checkpointing",
        "system",
        "method",
        "ms a step",
        "rounds",
        "ratio",
        "tokens a second",
        "share of the bound",
        "peak GiB",
        "first step after s",
    ]
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    first: dict[bool, float] = {}
    for (checkpointing, system, method), rows in groups.items():
        times = [row["ms"] for row in rows]
        middle = statistics.median(times)
        first.setdefault(checkpointing, middle)
        bound = (
            rows[0]["flops"] / rate * 1000 / middle
            if method == "plain" and rows[0]["lengths"] == "fixed"
            else None
        )
        cells = [
            "on" if checkpointing else "off", system, method, f"{middle:.0f}", f"{min(times):.0f} to {max(times):.0f}",
            f"{middle / first[checkpointing]:.2f}", f"{rows[0]['tokens_per_s'] * rows[0]['ms'] / middle:.0f}",
            "" if bound is None else f"{bound:.2f}",
            "" if rows[0]["peak_gib"] is None else f"{max(row['peak_gib'] for row in rows):.1f}",
            f"{statistics.median(row['before_s'] for row in rows):.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            f"on {found[0]['device']}; a large matrix product runs at {rate / 1e12:.3g} TFLOP/s",
            "",
            *lines,
        ]
    )


def unlike(found: list[dict[str, Any]]) -> str | None:
    """The sentence for losses that differ between systems that train the same way,
    or are no number; None where all agree.
    """
    for row in found:
        if not math.isfinite(row["loss"]):
            return f"{_name(row)} ends with loss {row['loss']}: it is wrong"
    allowed = _ALIKE["cpu" if found[0]["device"] == "cpu" else "gpu"]
    for method in {row["method"]: None for row in found}:
        alike = [row for row in found if row["method"] == method]
        low, high = min(alike, key=itemgetter("loss")), max(alike, key=itemgetter("loss"))
        if high["loss"] - low["loss"] > allowed * abs(low["loss"]):
            return (
                f"{_name(low)} ends with loss {low['loss']:.6f}, {_name(high)} with "
                f"{high['loss']:.6f}: one of them is wrong"
            )
    return None
