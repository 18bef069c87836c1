"""What is measured: the models' shapes, the rows, and the arithmetic that a step cannot do without. Needs no torch."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

SHARDING = ("fsdp2", "zero3")
ENGINES = ("single", *SHARDING)
OTHERS = ("trainer", "trl")  # transformers.Trainer with PEFT, and TRL's SFTTrainer
METHODS = ("plain", "sap", "sap_lagged", "lisa", "ema")
MICRO_BATCHES = 2


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights, and rows of `length` tokens, the first half of them not supervised."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    length: int
    batch_size: int = 8

    def config(self) -> dict[str, Any]:
        """Keyword arguments of LlamaConfig."""
        own = {"length", "batch_size"}
        return {key: value for key, value in asdict(self).items() if key not in own} | {
            "max_position_embeddings": 2 * self.length
        }


SHAPES = {
    # arithmetic next to nothing: what is left is the host's work
    "host": Shape(128, 64, 128, 32, 4, 2, length=16),
    "tiny": Shape(128, 64, 128, 4, 4, 2, length=16),
    "135m": Shape(49152, 576, 1536, 30, 9, 3, length=128),
    "1b": Shape(128256, 2048, 8192, 16, 32, 8, length=512),
    "8b": Shape(128256, 4096, 14336, 32, 32, 8, length=512),
}


@dataclass(frozen=True)
class Case:
    """One process of the benchmark, or `ranks` of them, each with as many rows as one has alone.

    system: an engine, or one of OTHERS. length: tokens of a row, where not the shape's. lengths: fixed, or real (a few
    long rows, many short ones). tokens, packing: train.tokens_per_micro_batch and train.packing, of engines.
    """

    system: str
    method: str = "plain"
    shape: str = "host"
    layers: int | None = None
    checkpointing: bool = True
    quantization: str = "none"
    lengths: str = "fixed"
    length: int | None = None
    ranks: int = 1
    keep_gathered: bool = False
    tokens: int | None = None
    packing: bool = False
    warm_up: int = 3
    steps: int = 10
    profile: bool = False

    @property
    def model(self) -> Shape:
        """The model's shape, with `layers` decoder layers and `length` tokens a row where these are given."""
        given = {"num_hidden_layers": self.layers, "length": self.length}
        own = {key: value for key, value in given.items() if value is not None}
        return Shape(**asdict(SHAPES[self.shape]) | own)

    def rows(self) -> list[dict[str, list[int]]]:
        """input_ids and labels of one row for every draw of the run: the same for all systems."""
        shape, rng = self.model, random.Random(0)
        shares = (
            1.0 if self.lengths == "fixed" else min(1.0, rng.lognormvariate(-1.4, 0.8))
            for _ in range(self.ranks * shape.batch_size * (self.warm_up + self.steps))
        )
        return [
            _row(rng, shape.vocab_size, max(8, round(shape.length * share))) for share in shares
        ]

    def pairs(self) -> list[dict[str, list[int]]]:
        """Safety pairs of half a row's length."""
        shape, rng = self.model, random.Random(1)
        sides = [
            {
                side: _row(rng, shape.vocab_size, shape.length // 2)
                for side in ("chosen", "rejected")
            }
            for _ in range(32)
        ]
        return [
            {f"{side}_{key}": value for side, row in pair.items() for key, value in row.items()}
            for pair in sides
        ]


def _row(rng: random.Random, vocabulary: int, length: int) -> dict[str, list[int]]:
    # Not the padding's id: its embedding is zero, and a row that begins with it has gradients beyond float32.
    ids = [rng.randrange(3, vocabulary) for _ in range(length)]
    return {"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]}


def forward_flops(shape: Shape, tokens: int, supervised: int) -> float:
    """Of a forward pass: two a weight and token (the head at supervised positions), and attention's two products,
    causal ones counted half.
    """
    head_size = shape.hidden_size // shape.num_attention_heads
    attention = shape.hidden_size * (
        2 * shape.hidden_size + 2 * shape.num_key_value_heads * head_size
    )
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size
    scores = 2 * tokens * shape.length * shape.hidden_size
    return (
        2.0 * layer * shape.num_hidden_layers * tokens
        + 2.0 * shape.hidden_size * shape.vocab_size * supervised
        + scores * shape.num_hidden_layers
    )


def plain_step_flops(case: Case) -> float:
    """Of a plain LoRA step on rows of full length: forward, backward to the inputs of frozen weights, and a
    recomputation where asked for.
    """
    shape = case.model
    tokens = shape.batch_size * shape.length
    return forward_flops(shape, tokens, tokens // 2) * (3 if case.checkpointing else 2)
