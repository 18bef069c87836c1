"""The training loop around any step: schedule, validation, logging, checkpoints, leaving in order.

loop = Loop(engine, PlainStep(engine), data, recipe.train, seed=0, folder=Path("work"), identity="...",
callbacks=[Console("sft")]) finished = loop.run()
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.defences.callback import Callback
from pipeline.defences.step import Step
from pipeline.engines.engine import Engine
from pipeline.engines.exchange import from_first
from pipeline.objectives.batches import (
    BatchOrder,
    MicroBatch,
    PairBatch,
    micro_batches,
    pair_batches,
)
from pipeline.objectives.losses import useful_loss
from pipeline.objectives.sharing import share_of
from pipeline.recipe.sections import TrainSection
from pipeline.running.batch_job import circumstances, saved_before
from pipeline.running.stopping import StopRequest
from pipeline.system.system_errors import naming
from pipeline.training import checkpoint
from pipeline.training.spikes import Spikes, logged

Rows = Sequence[dict[str, Any]]
# spikes in a row: the run has left the range that it has learned in, and is no spike
_MOST_SKIPPED = 10
_ASKED = "ranks asked to stop"  # among the numbers that a step reads


@dataclass(frozen=True)
class TrainingData:
    """Tokenised rows, as prepare writes them. validation: name -> rows, logged as validation/NAME_loss."""

    train: Rows
    pairs: Rows
    pad_id: int
    pairs_per_step: int = 1
    pairs_micro_batch: int = 1
    validation: Mapping[str, Rows] = field(default_factory=dict)


class Loop:
    """Runs `step` from where the last checkpoint left off to the end, or to a stop request."""

    def __init__(
        self, engine: Engine, step: Step, data: TrainingData, train: TrainSection, seed: int, folder: Path,
        identity: str, callbacks: Sequence[Callback] = (), basis: dict[str, Any] | None = None,
    ):  # fmt: skip
        """identity, basis: of its checkpoints (checkpoint.save). callbacks: called in this order."""
        self.engine, self.step, self.data, self.train, self.seed = engine, step, data, train, seed
        self.folder, self.identity, self.basis, self.callbacks = (
            folder,
            identity,
            basis or {},
            callbacks,
        )
        epochs = train.epochs or 0  # one of the two is given
        self.steps = train.steps or math.ceil(epochs * len(data.train) / train.batch_size)
        self.order = BatchOrder(len(data.train), train.batch_size, seed)
        self.pair_order = (
            BatchOrder(len(data.pairs), data.pairs_per_step, seed) if data.pairs else None
        )
        self.state = checkpoint.Carried(step, callbacks)
        self.metrics_file, self.checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
        for callback in callbacks:
            callback.begin(self.steps)

    def run(self) -> bool:
        """True when all steps are done; False when a stop was requested (the state is saved)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self._begin()
        # Rank 0's: the others may look before it has put the file back.
        before = logged(self.metrics_file) if self.engine.rank == 0 else None
        # A step of another kind does not take the next task batch.
        self.spikes = Spikes(
            self.train.spike_factor,
            from_first(before),
            lambda number: self.step.positions(number + 1)[0] == self.step.positions(number)[0],
        )
        if self._started_anew:
            self.spikes.in_a_row = 0  # those of the run before were not left out by this one
        with StopRequest(self.folder / "STOP") as stop, self._each("around"):
            if not done and self.data.validation:
                # where the curves begin
                self._write({"step": 0, "time": time.time(), **self._validate()})
            for number in range(done, self.steps):
                asked = self._one_step(number, stop)
                self._progress(f"step {number + 1}")
                last = number + 1 == self.steps
                stopping = asked and not last
                if stopping or last or (number + 1) % self.train.save_every == 0:
                    self._save(number + 1)
                    self._progress(f"the checkpoint of step {number + 1}")
                if stopping:
                    stop.obeyed(self.engine.rank)
                    self._event(
                        f"stopped after step {number + 1} ({stop.reason or 'another rank'})",
                        f", saved in {self.checkpoints}",
                    )
                    return False
        return True

    def _begin(self) -> int:
        """Steps done: by this run, as its last checkpoint says, or by the one that it starts from."""
        done = checkpoint.load_latest(
            self.engine, self.state, self.checkpoints, self.identity, self.metrics_file
        )
        if not done and saved_before():
            # Every checkpoint is damaged, or this node does not see them:
            # to begin again without a word would throw all of that work away.
            raise RuntimeError(
                f"the job had saved step {saved_before()} in {self.checkpoints}, but no checkpoint "
                "there can be read: delete it to begin again"
            )
        if not done and self.engine.rank == 0:
            self.metrics_file.unlink(missing_ok=True)  # of steps that run again
        if done or circumstances():
            self._event((f"resumed after step {done}" if done else "started") + circumstances())
        given = self.train.resume_from
        self._started_anew = not done and given is not None
        if not done and given is not None:
            done = checkpoint.start_from(
                self.engine, self.state, given, self.basis, self.steps, self.metrics_file
            )
            self._save(done)  # the other run goes on, or is deleted
            self._event(f"started from {given.name}", f" ({given})")
        return done

    def _save(self, number: int) -> None:
        with naming(self.checkpoints):
            checkpoint.save(
                self.engine,
                self.state,
                self.checkpoints,
                number,
                self.identity,
                self.metrics_file,
                self.basis,
            )

    def _one_step(self, number: int, stop: StopRequest) -> bool:
        """Train step `number` and log it; whether a rank had been asked to stop before the update."""
        started = time.perf_counter()
        lr = learning_rate(self.train, number, self.steps)
        drawn: list[int] = []  # the safety pairs of this step, however often the step asks for them
        task, draw = self.step.positions(number)
        useful = self._useful(number, task)
        part = None if self.step.share == 1 else self._useful(number, task, self.step.share)
        measured = self.step(useful, lambda: self._pairs(number, draw, drawn), number, part)
        measured |= {
            "train/lr": lr,
            "train/grad_norm": self.engine.gradient_norm(),
            "safety/pairs": float(len(drawn)),
        }
        measured["train/padding"] = padding(useful)
        # All that ranks agree on, read at once: they refuse together, before the update, and stop together.
        metrics = self.engine.read({**measured, _ASKED: self.engine.ranks_with(stop.requested())})
        asked = metrics.pop(_ASKED) > 0
        for key, what in (("train/loss", "loss"), ("train/grad_norm", "gradient's norm")):
            if not math.isfinite(metrics[key]):
                raise ValueError(
                    f"the {what} is {metrics[key]} at step {number + 1}, before the update: lower "
                    f"train.lr (now {self.train.lr}) or check the data"
                )
        skipped = self._skipped(metrics, number)
        if skipped:
            self.engine.discard()
        else:
            self.engine.step(lr, metrics["train/grad_norm"])
        metrics |= {"train/skipped": float(skipped)} if self.train.on_spike == "skip" else {}
        if not skipped:
            for callback in self.callbacks:
                callback.updated(number + 1)
        metrics["time/step"] = time.perf_counter() - started
        if (number + 1) % self.train.validate_every == 0 or number + 1 == self.steps:
            metrics |= self._validate()
        self._log(metrics, number + 1)
        return asked

    def _skipped(self, metrics: dict[str, float], number: int) -> bool:
        """Whether the update is left out, because of a spike.

        ValueError where that ends the training. All ranks see the same numbers.
        """
        spike = self.spikes.seen(metrics, number)
        if spike is None:
            return False
        way_on = "begin anew from a checkpoint before it with a lower train.lr (--resume-from)"
        skip = self.train.on_spike == "skip"
        if self.spikes.in_a_row == 1 or skip:
            self._event(
                f"{spike} at step {number + 1}" + (", whose update is left out" if skip else "")
            )
        if self.train.on_spike == "stop":
            raise ValueError(f"{spike} at step {number + 1}, before the update: {way_on}")
        if skip and self.spikes.in_a_row >= _MOST_SKIPPED:
            raise ValueError(
                f"the last {_MOST_SKIPPED} steps were spikes, whose updates are left out, and "
                f"nothing is learned any more: {way_on}"
            )
        return skip

    def _useful(self, number: int, task: int, share: float = 1.0) -> list[MicroBatch]:
        engine = self.engine
        # in an order drawn at random, of which the first are as good as any
        indices = self.order.step(task)
        return micro_batches(
            self.data.train, indices[: share_of(len(indices), share)], self.train.micro_batch_size, engine.rank,
            engine.world_size, self.data.pad_id, self.seed, number, self.train.tokens_per_micro_batch,
            packing=self.train.packing,
        )  # fmt: skip

    def _pairs(self, number: int, draw: int, drawn: list[int]) -> list[PairBatch]:
        assert self.pair_order is not None, "this step needs safety pairs"
        engine, size = self.engine, self.data.pairs_micro_batch
        drawn[:] = self.pair_order.step(draw)
        return pair_batches(
            self.data.pairs,
            drawn,
            size,
            engine.rank,
            engine.world_size,
            self.data.pad_id,
            self.seed,
            number,
        )

    def _validate(self) -> dict[str, float]:
        engine, train, size, losses = self.engine, self.train, self.train.micro_batch_size, {}
        with self.counted_weights():
            for name, rows in self.data.validation.items():
                batches = micro_batches(
                    rows, list(range(len(rows))), size, engine.rank, engine.world_size, self.data.pad_id, 0, 0,
                    train.tokens_per_micro_batch, -(-train.batch_size // engine.world_size), train.packing,
                )  # fmt: skip
                losses[f"validation/{name}_loss"] = engine.loss(useful_loss, batches)
                self._progress(f"the validation of {name}")
        return losses

    def counted_weights(self) -> contextlib.AbstractContextManager[object]:
        """Inside the block the engine's weights are those that count: averaged ones, where the recipe averages."""
        return self._each("weights")

    @contextlib.contextmanager
    def _each(self, name: Literal["around", "weights"]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(getattr(callback, name)())
            yield

    def _progress(self, what: str) -> None:
        for callback in self.callbacks:
            callback.progress(what)

    def _log(self, metrics: dict[str, float], number: int) -> None:
        self._write({"step": number, "time": time.time(), **metrics})
        if self.engine.rank == 0:
            for callback in self.callbacks:
                callback.logged(metrics, number)

    def _write(self, line: dict[str, float]) -> None:
        if self.engine.rank == 0:
            with naming(self.metrics_file), self.metrics_file.open("a") as stream:
                stream.write(json.dumps(line) + "\n")

    def _event(self, text: str, where: str = "") -> None:
        if self.engine.rank == 0:
            for callback in self.callbacks:
                callback.event(text, where)


def padding(batches: Sequence[MicroBatch]) -> float:
    """Share of padding among the tokens of a rank's micro-batches."""
    return sum(batch.padding for batch in batches) / sum(
        batch.input_ids.numel() for batch in batches
    )


def learning_rate(train: TrainSection, number: int, steps: int) -> float:
    """Learning rate of step `number` (from 0): linear warm-up to train.lr, then the decay towards 0."""
    if number < train.warmup_steps:
        return train.lr * (number + 1) / train.warmup_steps
    progress = (number - train.warmup_steps) / max(1, steps - train.warmup_steps)
    if train.decay == "cosine":
        return train.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return train.lr * (1 - progress) if train.decay == "linear" else train.lr
