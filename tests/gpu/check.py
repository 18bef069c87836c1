"""`make gpu`: what must hold on a GPU, and how fast it is there, in under eight minutes.

    python3 -m tests.gpu.check                          # on a machine with a GPU; writes gpu-check.json
    python3 -m tests.gpu.check --parts bench,memory     # some of it
    python3 -m tests.gpu.check --tiny                   # the same path with tiny shapes, on any machine

Every part has a limit of its own: one that fails or takes too long is reported, and the others still run. Exit code 1
where one failed. It needs what pyproject.toml names, but for MLflow (tracking is off), pytest for the part tests, and
for doctor and demo the archives that `python -m pipeline.stages.fetch` keeps in ~/.cache/sap: with those, no network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.bench.cases import Case
from pipeline.bench.processes import Processes
from pipeline.stages.checks import shards_4_bit

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("single", "zero3", "fsdp2")
# of weights after five steps (which moved by up to 0.05), and of gradients, relative
_SAME_DEVICE, _FIRST_GRADIENT = 1e-4, 1e-3
_LOADING_RATIO = 3.0


@dataclass
class Part:
    """What a part found. lines: for people. rows: for the JSON file. problems: why it failed."""

    name: str
    lines: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Setting:
    """How a run is done. folder: for what it writes and later parts read."""

    tiny: bool
    folder: Path
    processes: Processes

    @property
    def case(self) -> Case:
        return Case("single", shape="tiny" if self.tiny else "8b", warm_up=2, steps=4)

    def sap(self, part: Part, seconds: float, *arguments: str) -> str:
        """Run `sap`; returns what it printed. A part's problem where it fails or takes longer."""
        return self.run(part, self.limit(seconds), "-m", "pipeline.cli", *arguments)

    def limit(self, seconds: float) -> float:
        """What may take so long on a GPU; more for tiny shapes, on cores that others use too."""
        return 10 * seconds if self.tiny else seconds

    def run(self, part: Part, seconds: float, *arguments: str) -> str:
        log = self.folder / f"{part.name}.log"
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=stream,
                start_new_session=True,
                text=True,
            )
            try:
                printed = process.communicate(timeout=seconds)[0]
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                printed = process.communicate()[0]
                part.problems.append(f"{' '.join(arguments)} took longer than {seconds:g} s")
                return printed
        if process.returncode:
            end = log.read_text(errors="replace").strip().splitlines()[-12:]
            part.problems.append(
                "\n".join(
                    [
                        f"{' '.join(arguments)} ended with {process.returncode}:",
                        *end,
                        *printed.strip().splitlines()[-12:],
                    ]
                )
            )
        return printed


def parity(part: Part, setting: Setting) -> None:
    """fp32: the engines against the single process on this device, and that one against the CPU;
    bits that must come back.
    """

    def ask(engine, kind, **more):
        return setting.processes.call(
            "tests.gpu.parity:examine",
            {"engine": engine, "quantization": kind},
            seconds=setting.limit(60),
            **more,
        )

    for kind in ("none", "nf4"):
        reference, on_cpu = (
            ask("single", kind),
            ask("single", kind, environment={"CUDA_VISIBLE_DEVICES": ""}),
        )
        for engine in ENGINES:
            if kind == "nf4" and not shards_4_bit(engine):
                part.lines.append(f"{engine:<7} {kind:<5} not run: it needs a newer torch")
                continue
            found = reference if engine == "single" else ask(engine, kind)
            weights = max(
                abs(a - b)
                for name, values in reference["weights"].items()
                for a, b in zip(values, found["weights"][name], strict=True)
            )
            first = _relative(
                found["gradient"], (on_cpu if engine == "single" else reference)["gradient"]
            )
            row = {
                "engine": engine, "quantization": kind, "device": found["device"], "weights": weights,
                "gradient": first, "restored": found["restored"], "untouched": found["untouched"],
                "moved": found["moved"],
            }  # fmt: skip
            part.rows.append(row)
            against = "the CPU" if engine == "single" else "single"
            part.lines.append(
                f"{engine:<7} {kind:<5} first gradient {first:.1e} from {against}'s, weights after "
                f"5 steps {weights:.1e} from single's"
            )
            if not (
                first < _FIRST_GRADIENT
                and weights < _SAME_DEVICE
                and found["restored"]
                and found["untouched"]
                and found["moved"]
            ):
                part.problems.append(f"parity of {engine} with quantization {kind}: {row}")


def _relative(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    def square(values):
        return sum(value * value for value in values)

    off = sum(
        square(x - y for x, y in zip(a[name], values, strict=True)) for name, values in b.items()
    )
    return (off / sum(map(square, b.values()))) ** 0.5


def bench(part: Part, setting: Setting) -> None:
    """Plain steps of all engines beside transformers' Trainer with PEFT, with and without recomputation."""
    _bench(
        part,
        setting,
        170,
        "--systems",
        "trainer,single,fsdp2,zero3",
        "--rounds",
        "1" if setting.tiny else "2",
    )


def methods(part: Part, setting: Setting) -> None:
    """What SAP, Lisa and EMA cost on one process."""
    _bench(
        part,
        setting,
        70,
        "--systems",
        "single",
        "--methods",
        "plain,sap,sap_lagged,lisa,ema",
        "--rounds",
        "1",
        "--checkpointing",
        "off",
    )


def _bench(part: Part, setting: Setting, seconds: float, *arguments: str) -> None:
    file = setting.folder / f"{part.name}.json"
    printed = setting.sap(
        part,
        seconds,
        "bench",
        "--shape",
        setting.case.shape,
        "--steps",
        str(setting.case.steps),
        "--json",
        str(file),
        *arguments,
    )
    part.lines += printed.strip().splitlines()
    part.rows += json.loads(file.read_text())["rows"] if file.is_file() else []


def memory(part: Part, setting: Setting) -> None:
    """The planner's bytes, without its allowance for CUDA, beside the peaks that the bench measured."""
    from transformers import LlamaConfig

    from pipeline.bench.measure import section
    from pipeline.model.model_outline import facts_of
    from pipeline.model.models import without_weights
    from pipeline.planner.planner import CUDA_ALLOWANCE, estimate

    file, shape = setting.folder / "bench.json", setting.case.model
    facts = facts_of(
        without_weights(LlamaConfig(**shape.config(), tie_word_embeddings=False), "bench"), "bench"
    )
    peaks: dict[tuple[str, bool], float] = {}
    for row in json.loads(file.read_text())["rows"] if file.is_file() else []:
        if row["system"] in ENGINES:
            peaks[row["system"], row["checkpointing"]] = row["peak_gib"] or 0.0
    for (engine, checkpointing), peak in peaks.items():
        with tempfile.TemporaryDirectory() as folder:
            train = section(
                replace(setting.case, system=engine, checkpointing=checkpointing), Path(folder)
            )
            zero = json.loads(Path(train.ds_config).read_text())
        plan = estimate(facts, train, None, zero, 2, "none", 1, shape.length, shape.length // 2)
        planned = (plan.total() - CUDA_ALLOWANCE) / 2**30
        part.rows.append(
            {
                "engine": engine,
                "checkpointing": checkpointing,
                "planned_gib": planned,
                "peak_gib": peak,
            }
        )
        part.lines.append(
            f"{engine:<7} checkpointing {'on ' if checkpointing else 'off'}  planned {planned:.1f} "
            f"GiB, {f'measured {peak:.1f} GiB' if peak else 'not measured: no GPU'}"
        )
        if peak and not 0.8 < planned / peak < 1.5:
            part.problems.append(
                f"the plan of {engine} is {planned:.1f} GiB, and {peak:.1f} GiB were taken"
            )
    if not peaks:
        part.problems.append("there is no bench to hold the plan against: run the part bench too")


def loading(part: Part, setting: Setting) -> None:
    """Seconds from the files to an engine that could train, in bfloat16 and in 4 bits,
    and what the host had to hold.
    """
    folder = setting.folder / "model"
    size = setting.processes.call(
        "tests.gpu.loading:write", setting.case, str(folder), seconds=setting.limit(90)
    )
    for kind in ("none", "nf4"):
        for engine in ("fsdp2", "zero3"):
            if kind == "nf4" and not shards_4_bit(engine):
                part.lines.append(f"{engine:<7} {kind:<5} not run: it needs a newer torch")
                continue
            case = replace(setting.case, system=engine, quantization=kind)
            row = setting.processes.call(
                "tests.gpu.loading:load", case, str(folder), seconds=setting.limit(60)
            )
            part.rows.append(row | {"bytes": size})
            part.lines.append(
                f"{engine:<7} {kind:<5} {row['seconds']:.1f} s, host {row['host_gib']:.1f} GiB "
                f"more, device {row['device_gib'] or 0:.1f} GiB"
            )
    shutil.rmtree(folder)
    for engine in ("fsdp2", "zero3"):
        found = [row for row in part.rows if row["system"] == engine]
        plain, *rest = (row["seconds"] for row in found)
        # what is aimed at on a GPU
        for quantised in rest if plain > 1 and found[0]["device_gib"] is not None else ():
            if quantised <= _LOADING_RATIO * plain:
                continue
            part.problems.append(
                f"{engine} loads in 4 bits in {quantised:.1f} s and in bfloat16 in {plain:.1f} s: "
                f"more than {_LOADING_RATIO:g} times"
            )


def doctor(part: Part, setting: Setting) -> None:
    """`sap doctor` on the demo's recipe, with each sharding engine."""
    for engine in ("zero3", "fsdp2"):
        printed = setting.sap(
            part, 100, "doctor", _recipe(setting), "--train.engine", engine, *_quiet(setting)
        )
        last = (printed.strip().splitlines() or ["nothing was printed"])[-1]
        part.lines.append(f"{engine}: {last}")
        if not last.startswith("ok:"):
            part.problems.append(f"the doctor ends with '{last}' for {engine}")
        part.rows.append({"engine": engine, "printed": printed})


def demo(part: Part, setting: Setting) -> None:
    """The demo from preparation to report."""
    printed = setting.sap(part, 240, "run", _recipe(setting), *_quiet(setting))
    part.lines += printed.strip().splitlines()
    part.rows.append({"printed": printed})
    if not all(f"\n{method} " in printed for method in ("sft", "sap")):
        part.problems.append("the demo printed no table of sft and sap")


def tests(part: Part, setting: Setting) -> None:
    """`pytest -m gpu`: questions to the driver, the tiny chain on every GPU, more ranks than GPUs."""
    printed = setting.run(
        part, 200, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"
    )
    part.lines += printed.strip().splitlines()[-3:]
    if " skipped" in printed or (" passed" not in printed):
        part.problems.append("not every test of tests/gpu ran and passed")


def _recipe(setting: Setting) -> str:
    if not setting.tiny:
        return str(ROOT / "launch" / "recipes" / "demo.yaml")
    recipe = setting.folder / "tiny" / "recipe.yaml"
    if not recipe.is_file():
        from tests.project import make_project, write_recipe

        recipe.parent.mkdir()
        recipe = write_recipe(recipe.parent, make_project(recipe.parent))
    return str(recipe)


def _quiet(setting: Setting) -> list[str]:
    return ["--tracking.enabled", "false", "--output_dir", str(setting.folder / "runs")]


PARTS: dict[str, Callable[[Part, Setting], None]] = {
    "parity": parity, "bench": bench, "memory": memory, "methods": methods, "loading": loading, "doctor": doctor,
    "demo": demo, "tests": tests,
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the parts; prints what each found and a table of them; 1 where one failed.

    ValueError for a part that does not exist.
    """
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.gpu.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts",
        help=f"by commas; default all: {', '.join(PARTS)}; with --tiny all but tests, which need a GPU",
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, which any machine can do")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("gpu-check.json"),
        help="file for what was found; default gpu-check.json",
    )
    options = parser.parse_args(argv)
    chosen = (
        options.parts.split(",")
        if options.parts
        else [name for name in PARTS if not (options.tiny and name == "tests")]
    )
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        print(
            f"error: --parts names '{unknown[0]}': it takes some of {', '.join(PARTS)}",
            file=sys.stderr,
        )
        return 2
    missing = [
        name
        for name in ("torch", "transformers", "peft", "deepspeed")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        print(
            f"error: {sys.executable} has no {missing[0]}: name a Python that has it with make gpu PYTHON=...",
            file=sys.stderr,
        )
        return 2
    if not options.json.absolute().parent.is_dir():
        print(f"error: --json {options.json} is in no folder that exists", file=sys.stderr)
        return 2
    done: list[Part] = []
    with Processes() as processes, tempfile.TemporaryDirectory() as folder:
        card = processes.call("tests.gpu.check:card")
        if not options.tiny and card == "cpu":
            print(
                "error: there is no GPU here: give --tiny for tiny shapes on a CPU", file=sys.stderr
            )
            return 2
        setting = Setting(options.tiny, Path(folder), processes)
        for name in chosen:
            part, started = Part(name), time.monotonic()
            try:
                PARTS[name](part, setting)
            except Exception as error:  # the other parts are still worth running
                part.problems.append("".join(traceback.format_exception_only(error)).strip())
            part.seconds = time.monotonic() - started
            done.append(part)
            print(
                f"\n== {name}, {part.seconds:.0f} s",
                *part.lines,
                *(f"FAILED: {problem}" for problem in part.problems),
                sep="\n",
                flush=True,
            )
            options.json.write_text(
                json.dumps(
                    {"card": card, "tiny": options.tiny, "parts": [asdict(part) for part in done]},
                    indent=1,
                )
                + "\n"
            )
    print(f"\n| on {card} | seconds | result |\n| --- | --- | --- |")
    for part in done:
        print(f"| {part.name} | {part.seconds:.0f} | {'FAILED' if part.problems else 'ok'} |")
    return int(any(part.problems for part in done))


def card() -> str:
    """The GPU's name and torch's version, or cpu."""
    import torch

    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        if torch.cuda.is_available()
        else "cpu"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
