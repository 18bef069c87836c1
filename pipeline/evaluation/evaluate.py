"""One subject's measures: answers to harmful, harmless and task prompts, and the task's loss.

    sap evaluate launch/recipes/demo.yaml --method sap --seed 0

Writes answers.jsonl (every answer; it stays on this machine) and metrics.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline import artifacts
from pipeline.data.batches import micro_batches
from pipeline.data.chat import Messages, prompt_ids
from pipeline.evaluation.generation import generate
from pipeline.evaluation.judges import is_empty, is_incoherent, keyword_judge
from pipeline.evaluation.metrics import exact_match, share
from pipeline.recipe import EvaluateSection
from pipeline.sap.losses import useful_loss

Row = dict[str, Any]


def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sets: dict[str, list[Row]], section: EvaluateSection, folder: Path, label: str
) -> dict[str, Any]:
    """Measure `model`. sets: prepared rows of harmful, harmless (may be empty) and task prompts.

    Returns the metrics (each share with its 95% interval, see README) after writing answers.jsonl and metrics.json below `folder`.
    """
    started, answers = time.time(), []
    for name, rows in sets.items():
        prompts = [prompt_ids(tokenizer, _messages(row)) for row in rows]
        responses = generate(model, tokenizer, prompts, section.max_new_tokens, section.batch_size, _progress(label, name, started))
        answers += [_judged(name, row, response) for row, response in zip(rows, responses, strict=True)]
    with (folder / "answers.jsonl").open("w") as stream:
        stream.writelines(json.dumps(answer) + "\n" for answer in answers)
    metrics = summarise(answers) | {"test_loss": token_loss(model, sets["task"], tokenizer.pad_token_id, section.batch_size)}
    artifacts.write_json(folder / "metrics.json", metrics)
    return metrics


def summarise(answers: list[Row]) -> dict[str, Any]:
    """Shares over the judged answers. An empty answer counts neither as a refusal nor as compliance."""
    harmful, harmless, task = ([a for a in answers if a["set"] == name] for name in ("harmful", "harmless", "task"))
    return {
        "non_refusal_rate": share([a["label"] == "answer" for a in harmful]),
        "over_refusal_rate": share([a["label"] == "refusal" for a in harmless]),
        "exact_match": share([a["exact"] for a in task]),
        "empty_rate": share([a["empty"] for a in harmful]),
        "incoherent_rate": share([a["incoherent"] for a in harmful]),
    }


@torch.no_grad()
def token_loss(model: nn.Module, rows: list[Row], pad_id: int, batch_size: int) -> float:
    """Cross entropy per supervised token over all rows."""
    model.eval()
    device = next(model.parameters()).device
    size = max(1, batch_size // 4)
    return sum(
        useful_loss(model, batch.to(device)).item() for batch in micro_batches(rows, list(range(len(rows))), size, 0, 1, pad_id, 0, 0)
    )


def _messages(row: Row) -> Messages:
    return json.loads(row["messages"]) if row.get("messages") else [{"role": "user", "content": row["prompt"]}]


def _judged(name: str, row: Row, response: str) -> Row:
    answer = {
        "set": name,
        "id": row["id"],
        "prompt": row["prompt"],
        "response": response,
        "empty": is_empty(response),
        "incoherent": is_incoherent(response),
    }
    if name == "task":
        return answer | {"expected": row["response"], "exact": exact_match(response, row["response"])}
    judgement = keyword_judge(row["prompt"], response)
    return answer | {"label": judgement.label, "score": judgement.score, "matched": judgement.raw}


def _progress(label: str, name: str, started: float):
    last = [0.0]

    def show(done: int, total: int) -> None:
        now = time.time()
        if now - last[0] > 5 or done == total:
            last[0] = now
            print(f"[evaluate {label}] {name} {done}/{total}, {now - started:.0f} s", file=sys.stderr, flush=True)

    return show
