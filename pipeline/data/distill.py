"""The model's own answers to harmless prompts: licence-clean data that keep an aligned model helpful.

rows = complete_answers(model, tokenizer, rows, max_new_tokens=48, max_length=128, rank=0, world_size=2)
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.chat import encode_chat, prompt_ids
from pipeline.evaluation.generation import generate


def complete_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    max_new_tokens: int,
    max_length: int,
    rank: int,
    world_size: int,
) -> list[dict[str, Any]]:
    """Rows whose response is None get the model's greedy answer, cut at its last whole sentence; rows it leaves empty are dropped.

    Ranks share the work and all return the same rows: input_ids and labels filled in.
    """
    missing = [index for index, row in enumerate(rows) if row["response"] is None]
    if not missing:
        return rows
    mine = missing[rank::world_size]
    if rank == 0:
        print(f"[align] the model answers {len(missing)} harmless prompts itself", file=sys.stderr, flush=True)
    prompts = [prompt_ids(tokenizer, json.loads(rows[index]["messages"])) for index in mine]
    answers = dict(zip(mine, generate(model, tokenizer, prompts, max_new_tokens, batch_size=32), strict=True))
    if world_size > 1:
        parts: list[dict[int, str]] = [{} for _ in range(world_size)]
        torch.distributed.all_gather_object(parts, answers)
        answers = {index: text for part in parts for index, text in part.items()}
    model.train()
    completed = []
    for index, row in enumerate(rows):
        if index not in answers:
            completed.append(row)
            continue
        text = whole_sentences(answers[index])
        messages = [*json.loads(row["messages"]), {"role": "assistant", "content": text}]
        encoded = encode_chat(tokenizer, messages, max_length) if text else None
        if encoded is not None:
            completed.append({**row, "response": text, "input_ids": encoded.input_ids, "labels": encoded.labels})
    return completed


def whole_sentences(text: str) -> str:
    """The text up to its last sentence end; unchanged where it has none."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text)]
    return text[: ends[-1]].strip() if ends else text.strip()
