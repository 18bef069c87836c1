"""What a cheaper SAP step loses: a cell's own training, and at some of its steps every cheaper V beside the exact one.

    python -m pipeline.bench.levers launch/recipes/compare.yaml --method sap --seed 0 --at 2,7,15,25,39

The cell's data and start must be complete (`sap run` makes them). It trains in this process, with the recipe's own
step, and writes nothing. All V are brought to the RMS that the training's own has. Reported, to the exact V of the same
step (all samples, the direction of pairs drawn in it): cosines of V, of the correction g(V) - g(0) and of the gradient
g(V), and the size of the correction. Time: what V and the step's main pass take, to the main pass alone.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.nn.functional import cosine_similarity

from pipeline import artifacts
from pipeline.data.sets import read_rows
from pipeline.defences.making import make_step
from pipeline.defences.saft.filter import kept
from pipeline.defences.sap import SAP
from pipeline.defences.sap.step import SapStep
from pipeline.engines.engine import Engine, ShardedVector
from pipeline.engines.open import init_distributed
from pipeline.model.models import load_tokenizer
from pipeline.objectives.batches import (
    BatchOrder,
    MicroBatch,
    PairBatch,
    micro_batches,
    pair_batches,
)
from pipeline.objectives.losses import useful_loss
from pipeline.objectives.sharing import share_of
from pipeline.recipe import strict_yaml
from pipeline.recipe.recipe import Cell, Experiment
from pipeline.running import entry
from pipeline.running.devices import environment
from pipeline.stages import STAGES, checks, command_line
from pipeline.stages.layout import Layout
from pipeline.stages.on_ranks import start_engine
from pipeline.system.tables import as_text
from pipeline.training.loop import learning_rate

SHARES = (0.5, 0.25, 0.125)
AGES = (1, 2, 4)  # of a V that is kept instead of computed
HEADER = (
    "step",
    "V",
    "cosine of V",
    "of the correction",
    "of the gradient",
    "size of the correction",
    "time",
)


@dataclass(frozen=True)
class Row:
    """One way at one step (from 1).

    v, correction, gradient: cosines with the exact way's. size: of the correction, to the exact one's.

    time: of V and main pass, to the main pass.
    """

    step: int
    way: str
    v: float
    correction: float
    gradient: float
    size: float
    time: float


class Levers:
    """A cell at its start, and the steps of its training."""

    def __init__(self, experiment: Experiment, cell: Cell):
        """ValueError where the cell does not use SAP's exact schedule, or what it starts from is not complete."""
        self.recipe, base, layout = cell.recipe, experiment.base, Layout(experiment)
        sap = SAP.of(self.recipe)
        if not sap.enabled or sap.schedule != "exact" or sap.direction != "live":
            raise ValueError(
                f"method {cell.method} of {experiment.path} is not SAP with schedule exact and "
                "direction live: name one that is with --method"
            )
        more = [part for part in self.recipe.parts if part not in ("sap", "saft")]
        if more:
            raise ValueError(
                f"method {cell.method} of {experiment.path} has {more[0]} beside SAP, whose part "
                "is not measured: name one without it with --method"
            )
        if environment()[1] != 1:
            raise ValueError(
                "pipeline.bench.levers runs in one process: start it without a launcher"
            )
        checks.check_upstream(experiment, STAGES["train"], cell)
        artifacts.verify(layout.prepare())
        init_distributed(self.recipe.train)
        self.pad = load_tokenizer(base.model).pad_token_id
        self.engine: Engine = start_engine(
            base, layout.start_model(), self.recipe.train, cell.seed, self.recipe
        )
        step = make_step(self.recipe, self.engine)
        assert isinstance(step, SapStep)
        self.step, self.seed = step, cell.seed
        rows = kept(layout.filter(cell)) if layout.needs_filter(cell) else None
        self.rows, self.pair_rows = (
            read_rows(layout.prepare(), "task_train", rows),
            read_rows(layout.prepare(), "safety_pairs"),
        )
        self.order = BatchOrder(len(self.rows), self.recipe.train.batch_size, cell.seed)
        self.pair_order = BatchOrder(
            len(self.pair_rows), self.recipe.safety_pairs.batch_size, cell.seed
        )
        self.kept: list[torch.Tensor] = []  # V of the training's steps so far

    def measured(self, at: Sequence[int]) -> Iterator[Row]:
        """Train to the last of the steps `at` (from 1), and yield what was measured before each of them."""
        train = self.recipe.train
        steps = train.steps or math.ceil((train.epochs or 0) * len(self.rows) / train.batch_size)
        if max(at) > steps:
            raise ValueError(f"--at names step {max(at)}, and the training has {steps}")
        for number in range(max(at)):
            if number + 1 in at:
                yield from self._beside(number)
            part = None if self.step.share == 1 else self._useful(number, self.step.share)
            metrics = self.step(
                self._useful(number), functools.partial(self._pairs, number), number, part
            )
            self.kept.append(self.step.v.clone())
            self.engine.step(learning_rate(train, number, steps))
            print(
                f"[levers] step {number + 1}/{max(at)}  loss {metrics['train/loss']:.3f}",
                file=sys.stderr,
                flush=True,
            )

    def _beside(self, number: int) -> list[Row]:
        """Every way at step `number` (from 0). Leaves no trace in the training."""
        g0, plain = _timed(lambda: self.engine.gradient(useful_loss, self._useful(number))[1])
        fresh = self.engine.gradient(self.step.safety_loss, self._pairs(number))[1]
        exact, took = _timed(lambda: self._ascent(number, fresh, 1.0))
        expected = self._gradient(number, exact)
        correction = _minus(expected, g0)
        rows = [Row(number + 1, "exact", 1.0, 1.0, 1.0, 1.0, 1 + took / plain)]
        for way, found, cost in self._ways(number, fresh):
            gradient = self._gradient(number, found)
            own = _minus(gradient, g0)
            size = self.engine.norm(own) / self.engine.norm(correction)
            cosines = (
                cosine_similarity(found.flatten(), exact.flatten(), dim=0).item(),
                self._cosine(own, correction),
                self._cosine(gradient, expected),
            )
            rows.append(Row(number + 1, way, *cosines, size, 1 + cost / plain))
        return rows

    def _ways(self, number: int, fresh: ShardedVector) -> Iterator[tuple[str, torch.Tensor, float]]:
        """(name, ascent or V, seconds) of every cheaper way there is at this step."""
        for share in SHARES:
            samples = share_of(self.recipe.train.batch_size, share)
            yield (
                f"of {samples} of {self.recipe.train.batch_size} samples",
                *_timed(functools.partial(self._ascent, number, fresh, share)),
            )
        if self.step.direction is not None:
            age = number - self.step.direction_step
            old = self.step.direction
            yield (
                f"with the direction of {age} steps before",
                *_timed(lambda: self._ascent(number, old, 1.0)),
            )
        for age in AGES:
            if len(self.kept) >= age:
                yield f"of {age} step{'s' * (age > 1)} before", self.kept[-age], 0.0

    def _ascent(self, number: int, direction: ShardedVector, share: float) -> torch.Tensor:
        """grad_V L_su (line 5 of Algorithm 1) from a share of the step's samples."""
        engine, zero, batches = (
            self.engine,
            self.step.probe.zeros(self.engine.device),
            self._useful(number, share),
        )
        scale = self.step.section.eps * engine.norm(engine.weights()) / engine.norm(direction)
        with self.step.probe.active(zero) as rows:
            _, before = engine.probe_gradient(useful_loss, batches, rows)
        with engine.perturbed(direction, scale), self.step.probe.active(zero) as rows:
            _, after = engine.probe_gradient(useful_loss, batches, rows)
        return after - before

    def _gradient(self, number: int, v: torch.Tensor) -> ShardedVector:
        """g(V) of the step's samples, V at the RMS of the training's own."""
        with self.step.probe.active(
            self.step.scale * v / v.square().mean().sqrt(), requires_grad=False
        ):
            return self.engine.gradient(useful_loss, self._useful(number))[1]

    def _useful(self, number: int, share: float = 1.0) -> list[MicroBatch]:
        train = self.recipe.train
        chosen = self.order.step(number)[: share_of(train.batch_size, share)]
        sharing = (
            train.micro_batch_size,
            0,
            1,
            self.pad,
            self.seed,
            number,
            train.tokens_per_micro_batch,
        )
        return micro_batches(self.rows, chosen, *sharing, packing=train.packing)

    def _pairs(self, number: int) -> list[PairBatch]:
        size = self.recipe.safety_pairs.micro_batch_size
        return pair_batches(
            self.pair_rows, self.pair_order.step(number), size, 0, 1, self.pad, self.seed, number
        )

    def _cosine(self, a: ShardedVector, b: ShardedVector) -> float:
        return self.engine.dot(a, b) / (self.engine.norm(a) * self.engine.norm(b))


def _minus(a: ShardedVector, b: ShardedVector) -> ShardedVector:
    return [x - y for x, y in zip(a, b, strict=True)]


T = TypeVar("T")


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def table(rows: Sequence[Row]) -> str:
    """Every row, and under them the median of every way."""

    def line(step: str, way: str, values: Iterable[float]) -> tuple[str, ...]:
        return (step, way, *(f"{value:.2f}" for value in values))

    def values(row: Row) -> tuple[float, ...]:
        return (row.v, row.correction, row.gradient, row.size, row.time)

    lines = [line(str(row.step), row.way, values(row)) for row in rows]
    for way in dict.fromkeys(row.way for row in rows):
        columns = zip(*(values(row) for row in rows if row.way == way), strict=True)
        lines.append(line("median", way, map(statistics.median, columns)))
    return as_text(lines, HEADER)


def main() -> None:
    """Measure the levers of the recipe's SAP method, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.bench.levers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe")
    parser.add_argument("--method", help="method of the recipe; needed where it has several")
    parser.add_argument("--seed", type=int, help="seed of the recipe; needed where it has several")
    parser.add_argument("--at", required=True, help="steps at which to measure, by commas, from 1")
    options, rest = parser.parse_known_args()
    if not all(part.isdigit() and int(part) for part in options.at.split(",")):
        raise ValueError(
            f"--at is '{options.at}': it takes steps by commas, from 1, such as 2,10,20"
        )
    experiment = command_line.open_recipe(options.recipe, strict_yaml.parse_overrides(rest))
    levers = Levers(experiment, command_line.choose_cell(experiment, options.method, options.seed))
    print(table(list(levers.measured(sorted(map(int, options.at.split(",")))))), end="")


if __name__ == "__main__":
    sys.exit(entry.guarded(main))
