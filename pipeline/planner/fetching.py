"""What of a model a rank holds, and what it fetches for a pass: the engines' ways with weights, as sums.

    fetching = Fetching(counted.weights, counted.layers, "zero3", zero_optimization, ranks=8)
    fetching.rows()             # bytes that are whole on a GPU while a pass runs, beside its shards

Read off pipeline/engines: frozen weights of layers as frozen.py cuts them, the others as the engine does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.defences.defence import Row
from pipeline.engines.ds_config import (
    cuts_frozen,
    fetched_at_once,
    fetched_by_layer,
    said_size,
)
from pipeline.model.model_size import Weight

# DeepSpeed's defaults of what is read here (deepspeed/runtime/zero/config.py).
ZERO_DEFAULTS = {
    "reduce_bucket_size": 500_000_000, "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 1_000_000_000, "sub_group_size": 1_000_000_000,
}  # fmt: skip


@dataclass(frozen=True)
class Fetching:
    """zero: DeepSpeed's zero_optimization, empty for other engines. kept: frozen layers that stay gathered."""

    weights: tuple[Weight, ...]
    layers: int
    engine: str
    zero: dict[str, Any]
    ranks: int
    kept: int = 0

    @property
    def at_once(self) -> bool:
        """Whether what is trained is whole on every rank in a step's passes."""
        trained = sum(w.numel for w in self.weights if w.trained)
        everything = sum(w.numel for w in self.weights)
        return not cuts_frozen(self.zero) and fetched_at_once(trained, everything)

    def by_layer(self, weight: Weight) -> bool:
        """Whether frozen.py cuts the weight with its layer's."""
        return (
            self.engine != "single"
            and weight.in_layer
            and not weight.trained
            and not cuts_frozen(self.zero)
        )

    def held(self, weight: Weight) -> float:
        """Elements of it on the rank that holds the most."""
        if self.by_layer(weight):
            return weight.numel / self.ranks
        return weight.held(self.engine, self.ranks)

    def size(self, key: str) -> int:
        """One of zero_optimization: as the file says it, by either of its names, what open.py sets, or DeepSpeed's."""
        rest = [w for w in self.weights if not self.by_layer(w)]
        if (
            self.at_once
        ):  # what is called with the layers is fetched as one: an adapter and the embeddings
            layer, others = sum(w.numel for w in rest), 0
            kept = max(w.numel for w in rest if w.trained)
        else:
            layer = max(sum(w.numel for w in rest if w.in_layer) // self.layers, 1)
            others, kept = sum(w.numel for w in rest if not w.in_layer), 0
        sizes = fetched_by_layer(self.zero, layer, others, kept)
        said = said_size(sizes, key)
        return ZERO_DEFAULTS[key] if said is None else said

    def rows(self) -> list[Row]:
        """Weights that are whole on a GPU while a pass runs, beside its shards.

        Of frozen layers there are two, the one at work and the next. ZeRO-3 fetches the rest a layer at a time and
        prefetches until stage3_max_live_parameters are live; it keeps what recurs within stage3_max_reuse_distance, of
        which forward and backward make half. To the larger comes a tensor that overfills it and one fetched on demand.
        A prefetched bucket, overfilled likewise, arrives in a buffer and is copied out. Tensors up to the persistence
        threshold stay whole. FSDP2 holds the layer at work, the next one, a third in the buffer of the all-gather, and
        embeddings and head all along; an adapter with them.
        """
        if self.engine == "single" or self.ranks == 1:
            return []
        rows = []
        frozen = [w for w in self.weights if self.by_layer(w)]
        if frozen:
            layer = _bytes(frozen) / self.layers
            passing = min(2, self.layers - self.kept)
            if self.kept:
                formula = f"{self.kept} layers of {layer / 1e9:.2f} GB"
                rows.append(Row("kept gathered", formula, self.kept * layer, "always"))
            if passing:
                formula = f"{passing} layers of {layer / 1e9:.2f} GB"
                rows.append(Row("gathered layers", formula, passing * layer, "in a pass"))
        rest = [w for w in self.weights if not self.by_layer(w)]
        if self.engine == "fsdp2":
            inner, outer = split(rest)
            most = inner if self.at_once else 3 * inner / self.layers
            parts = [
                f"{inner / 1e9:.2f} GB of the adapter"
                if self.at_once
                else f"3 layers of {inner / self.layers / 1e9:.2f} GB",
                f"{outer / 1e9:.2f} GB of the others",
            ]
            return [*rows, Row("gathered weights", " + ".join(parts), most + outer, "in a pass")]
        return [*rows, self._of_zero(rest)]

    def _of_zero(self, rest: Sequence[Weight]) -> Row:
        moving, small = self._moving(rest)
        inner, outer = split(moving)
        everything = sum(w.numel for w in moving)
        first = sum(w.numel for w in moving if not w.in_layer)
        largest = max((w.numel for w in moving), default=0)
        layer = sum(w.numel for w in rest if w.in_layer) // self.layers
        most, ahead = (
            self.size("stage3_max_live_parameters"),
            self.size("stage3_prefetch_bucket_size"),
        )
        reach = max(most, self.size("stage3_max_reuse_distance") // 2, layer)
        live, bucket = min(reach + 2 * largest, everything), min(ahead + largest, everything)
        # Embeddings and head first: they are the widest where layers are in 4 bits.
        size = sum(
            min(part / max(first, 1), 1) * outer
            + max(part - first, 0) * inner / max(everything - first, 1)
            for part in (live, bucket)
        )
        formula = f"{short(live)} live + {short(bucket)} in the bucket that arrives; {small / 1e9:.2f} GB persistent"
        return Row("gathered weights", formula, size + small, "in a pass")

    def received(self, through: int) -> float:
        """Bytes of weights that a micro-batch's passes fetch; the backward pass goes through the last `through` layers.

        Of frozen layers that do not stay gathered, the last two are there when it begins, and the first two layers when
        the next pass does.
        """
        frozen = [w for w in self.weights if self.by_layer(w)]
        passing = self.layers - self.kept
        there = max(2 - self.kept, 0) if through == self.layers else 0
        forward, backward = max(passing - there, 0), max(min(through, passing) - 2, 0)
        turns = (forward + backward) / self.layers
        inner, outer = split(self._moving([w for w in self.weights if not self.by_layer(w)])[0])
        if self.engine == "fsdp2" and self.at_once:
            inner = 0  # once a step, and small
        return _bytes(frozen) * turns + outer + inner * (1 + through / self.layers)

    def _moving(self, weights: Sequence[Weight]) -> tuple[list[Weight], float]:
        """Those that are fetched for every pass, and the bytes of those that ZeRO-3 leaves whole."""
        bound = self.size("stage3_param_persistence_threshold") if self.engine == "zero3" else 0
        return [w for w in weights if w.numel > bound], _bytes(
            [w for w in weights if w.numel <= bound]
        )


def split(weights: Sequence[Weight]) -> tuple[float, float]:
    """Bytes in decoder layers, and outside."""
    return _bytes([w for w in weights if w.in_layer]), _bytes(
        [w for w in weights if not w.in_layer]
    )


def short(count: float) -> str:
    """A count, for a formula: 1.20e9, 3.4e6, 5,120."""
    return (
        f"{count / 1e9:.2f}e9"
        if count >= 1e8
        else f"{count / 1e6:.1f}e6"
        if count >= 1e6
        else f"{count:,.0f}"
    )


def _bytes(weights: Sequence[Weight]) -> float:
    return sum(w.numel * w.width for w in weights)
