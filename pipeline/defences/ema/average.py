"""An exponential moving average of the weights (arXiv 2508.12531), on each rank's own float32 shard:
nothing is gathered or sent.

    ema = Ema(engine, recipe.ema)
    ema.updated(done)                # after every optimizer step
    with ema.weights(): ...          # validation and export see the average; the weights come back bit for bit

The paper's update rule, decay and code were not to be found, so `mode` holds both readings of "EMA momentum in
parameter space": shadow averages beside the training, momentum lets the training go on from the average, which holds it
near where it began. With LoRA the factors A and B are averaged, each by itself: the average's update is not the average
of the updates B A.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from pipeline.defences.callback import Callback
from pipeline.defences.ema.section import EmaSection
from pipeline.engines.engine import Engine, ShardedVector


class Ema(Callback):
    """s <- decay * s + (1 - decay) * w.

    After n updates from s_0: s_n = decay^n s_0 + (1 - decay) sum_k decay^(n-k) w_k.
    """

    def __init__(self, engine: Engine, section: EmaSection):
        self.engine, self.section = engine, section
        self.average: ShardedVector | None = None if section.warmup_steps else engine.weights()

    def begin(self, steps: int) -> None:
        """ValueError where so many steps end before the first update."""
        self.section.check_steps(steps)

    def updated(self, done: int) -> None:
        """Take in the weights after `done` optimizer steps; in mode momentum they become the average."""
        since = done - self.section.warmup_steps
        if since == 0:
            self.average = self.engine.weights()
        if since <= 0 or since % self.section.every:
            return
        assert self.average is not None, "it begins after the warm-up"
        decay = self.section.decay
        for average, weight in zip(self.average, self.engine.weights(), strict=True):
            average.mul_(decay).add_(weight, alpha=1 - decay)
        if self.section.mode == "momentum":
            self.engine.assign(self.average)

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """Inside the block the engine's weights are those that count: the average in mode shadow, once it has begun."""
        if self.section.mode == "momentum" or self.average is None:
            yield
            return
        with self.engine.replaced(self.average):
            yield

    def vectors(self) -> dict[str, ShardedVector]:
        """What a resumed run needs: the average, once there is one."""
        return {} if self.average is None else {"average": self.average}

    def load_state_dict(
        self, state: dict[str, torch.Tensor], vectors: dict[str, ShardedVector]
    ) -> None:
        self.average = vectors.get("average")
