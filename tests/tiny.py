"""A tiny random chat model, its data and the global batches of a step: what many tests share."""

from __future__ import annotations

import random

import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline.model.models import add_lora
from pipeline.objectives.batches import BatchOrder, micro_batches, pair_batches
from pipeline.recipe.sections import LoraSection

VOCABULARY, HIDDEN, LAYERS = 97, 33, 4


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """Llama with grouped-query attention and odd sizes, so that shards are padded."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=50, num_hidden_layers=LAYERS,
        num_attention_heads=3, num_key_value_heads=1, head_dim=10, max_position_embeddings=128,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def tiny_lora(
    dtype: torch.dtype = torch.float32, dropout: float = 0.0, warm: bool = True
) -> nn.Module:
    """The tiny model with LoRA; warm: B is not zero, as after some training."""
    model = add_lora(tiny_model(dtype), LoraSection(r=3, alpha=6, dropout=dropout), seed=0).to(
        dtype
    )
    if warm:
        torch.manual_seed(7)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    return model.train()


# What each family adds to a plain decoder. Hidden size, vocabulary and LoRA's rank divide by neither 2 nor 3,
# so that shards are padded.
FAMILIES = {
    # Grouped queries: five heads share a key.
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        {"num_attention_heads": 35, "num_key_value_heads": 7, "head_dim": 2},
    ),
    # Biases of queries, keys and values: one-dimensional weights.
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 14},
    ),
    # Scaled embeddings, norms after the blocks and of queries and keys, three layers of four with a sliding window.
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "sliding_window": 6,
            "query_pre_attn_scalar": 10,
        },
    ),
}
FAMILY_HIDDEN, FAMILY_RANK = 35, 5


def family_model(family: str, tied: bool, seed: int = 0) -> PreTrainedModel:
    """A random model of one of FAMILIES, embeddings tied to the head or not."""
    torch.manual_seed(seed)
    model_class, config_class, own = FAMILIES[family]
    config = config_class(
        vocab_size=VOCABULARY, hidden_size=FAMILY_HIDDEN, intermediate_size=53, num_hidden_layers=LAYERS,
        max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.2, pad_token_id=0, **own,
    )  # fmt: skip
    return model_class(config).train()


def tiny_rows(count: int = 40, seed: int = 0, equal: bool = False, longest: int = 14) -> list[dict]:
    """Token rows of unequal length with unequal numbers of supervised tokens. longest: a row, in tokens.

    equal: all of one length and number.
    """
    rng = random.Random(seed)

    def row() -> dict:
        length = 9 if equal else rng.randint(5, longest)
        masked = 4 if equal else rng.randint(1, length - 2)
        ids = [rng.randrange(VOCABULARY) for _ in range(length)]
        return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}

    return [row() for _ in range(count)]


def tiny_pairs(count: int = 16, seed: int = 1, equal: bool = False) -> list[dict]:
    rows = tiny_rows(2 * count, seed, equal)
    chosen, rejected = rows[:count], rows[count:]
    return [
        {f"chosen_{k}": v for k, v in a.items()} | {f"rejected_{k}": v for k, v in b.items()}
        for a, b in zip(chosen, rejected, strict=True)
    ]


class StepBatches:
    """Batches of step n for one rank: 8 sequences in micro-batches of 2 where not told otherwise,
    4 pairs in micro-batches of 1.
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, pairs: list[dict] | None = None, rows: list[dict] | None = None,
        batch_size: int = 8, micro_batch_size: int = 2, token_budget: int | None = None, packing: bool = False,
    ):  # fmt: skip
        self.rows, self.pair_rows = (
            tiny_rows() if rows is None else rows,
            tiny_pairs() if pairs is None else pairs,
        )
        self.rank, self.world_size = rank, world_size
        self.batch_size, self.micro_batch_size, self.token_budget = (
            batch_size,
            micro_batch_size,
            token_budget,
        )
        self.packing = packing

    def useful(self, number: int, samples: int | None = None) -> list:
        """samples: the first so many of the step's, where not all are meant."""
        indices = BatchOrder(len(self.rows), self.batch_size, 0).step(number)[:samples]
        sharing = (self.micro_batch_size, self.rank, self.world_size)
        return micro_batches(
            self.rows, indices, *sharing, 0, 0, number, self.token_budget, packing=self.packing
        )

    def pairs(self, number: int) -> list:
        return pair_batches(
            self.pair_rows,
            BatchOrder(len(self.pair_rows), 4, 0).step(number),
            1,
            self.rank,
            self.world_size,
            0,
            0,
            number,
        )
