"""Batched greedy generation whose answers do not depend on the batch.

texts = generate(model, chat.tokenizer, [chat.prompt_ids(messages)], max_new_tokens=32, batch_size=32)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], max_new_tokens: int,
    batch_size: int, progress: Callable[[int, int], None] = lambda done, total: None, stops: Collection[int] = (),
) -> list[str]:  # fmt: skip
    """Greedy answers, special tokens removed, in the order of `prompts` (token ids with the generation prompt).

    stops: ids at which an answer ends beside eos. Left-padded batches of prompts of similar length; a row ends at the
    end-of-turn token. progress(done, total) is called after every batch. Leaves the model in eval mode.
    """
    model.eval()
    device = next(model.parameters()).device
    stops = _stop_tokens(model, tokenizer, stops)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in chunk)
        padding = [width - len(prompts[index]) for index in chunk]
        ids = torch.tensor(
            [
                [tokenizer.pad_token_id] * pad + prompts[index]
                for pad, index in zip(padding, chunk, strict=True)
            ],
            device=device,
        )
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=device)
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
            use_cache=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=stops, temperature=None, top_p=None,
            top_k=None,
        )  # fmt: skip
        for index, row in zip(chunk, output[:, width:].tolist(), strict=True):
            end = next((position for position, token in enumerate(row) if token in stops), len(row))
            answers[index] = tokenizer.decode(row[:end], skip_special_tokens=True).strip()
        progress(len(answers), len(prompts))
    return [answers[index] for index in range(len(prompts))]


def _stop_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: Collection[int]
) -> list[int]:
    """Where training ends its answers (chat_template.py), and where tokenizer and generation config say."""
    configured = model.generation_config.eos_token_id
    found = {
        tokenizer.eos_token_id,
        *(configured if isinstance(configured, list) else [configured]),
        *stops,
    }
    return sorted(token for token in found if token is not None)
