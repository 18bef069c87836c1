"""A tiny random chat model, its data and the global batches of a step: what many tests share."""

from __future__ import annotations

import random

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.data.batches import BatchOrder, micro_batches, pair_batches
from pipeline.models import add_lora
from pipeline.recipe import LoraSection

VOCABULARY, HIDDEN, LAYERS = 97, 33, 4


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """Llama with grouped-query attention and odd sizes, so that shards are padded."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=50, num_hidden_layers=LAYERS, num_attention_heads=3,
        num_key_value_heads=1, head_dim=10, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def tiny_lora(dtype: torch.dtype = torch.float32, dropout: float = 0.0, warm: bool = True) -> nn.Module:
    """The tiny model with LoRA; warm: B is not zero, as after some training."""
    model = add_lora(tiny_model(dtype), LoraSection(r=3, alpha=6, dropout=dropout), seed=0).to(dtype)
    if warm:
        torch.manual_seed(7)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    return model.train()


def tiny_rows(count: int = 40, seed: int = 0) -> list[dict]:
    """Token rows of unequal length with unequal numbers of supervised tokens."""
    rng = random.Random(seed)

    def row() -> dict:
        length = rng.randint(5, 14)
        masked = rng.randint(1, length - 2)
        ids = [rng.randrange(VOCABULARY) for _ in range(length)]
        return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}

    return [row() for _ in range(count)]


def tiny_pairs(count: int = 16, seed: int = 1) -> list[dict]:
    rows = tiny_rows(2 * count, seed)
    chosen, rejected = rows[:count], rows[count:]
    return [
        {f"chosen_{k}": v for k, v in a.items()} | {f"rejected_{k}": v for k, v in b.items()} for a, b in zip(chosen, rejected, strict=True)
    ]


class StepBatches:
    """Batches of step n for one rank: 8 sequences in micro-batches of 2, 4 pairs in micro-batches of 1."""

    def __init__(self, rank: int = 0, world_size: int = 1, pairs: list[dict] | None = None):
        self.rows, self.pair_rows = tiny_rows(), tiny_pairs() if pairs is None else pairs
        self.rank, self.world_size = rank, world_size

    def useful(self, number: int) -> list:
        return micro_batches(self.rows, BatchOrder(len(self.rows), 8, 0).step(number), 2, self.rank, self.world_size, 0, 0, number)

    def pairs(self, number: int) -> list:
        return pair_batches(self.pair_rows, BatchOrder(len(self.pair_rows), 4, 0).step(number), 1, self.rank, self.world_size, 0, 0, number)
