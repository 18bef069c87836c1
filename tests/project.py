"""A whole tiny project on disk: a random Llama with a trained tokenizer,
data files and a recipe that runs the demo's chain in a minute.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer():
    """Byte-level BPE with a ChatML template, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        [
            "how do I count the words in line",
            "Sure, here is the answer: item",
            "I cannot help with that.",
        ]
        * 20,
        trainer,
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def make_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_project(folder: Path) -> dict[str, Any]:
    """Write model, data and a DeepSpeed file below folder; returns the recipe as a mapping (write
    it with `write_recipe`).
    """
    make_model(folder / "model")
    rng = random.Random(0)
    words = ["red", "blue", "green", "old", "new", "small", "large", "round"]
    data = folder / "data"
    data.mkdir()
    write_jsonl(
        data / "task.jsonl",
        [
            {"question": f"count item {i} {rng.choice(words)}", "answer": f"total {i % 7}"}
            for i in range(80)
        ],
    )
    for name, count in {
        "safety": 12,
        "harmful": 12,
        "refusals": 10,
        "validation": 8,
        "harmful_eval": 8,
    }.items():
        write_jsonl(
            data / f"{name}.jsonl",
            [{"goal": f"{name} forbidden request number {i}"} for i in range(count)],
        )
    write_jsonl(
        data / "harmless.jsonl",
        [
            {"goal": f"how to water plant {i}", "reply": "Use a can." if i % 2 else None}
            for i in range(10)
        ],
    )
    write_jsonl(data / "ordinary.jsonl", [{"goal": f"bake cake {i}"} for i in range(9)])
    write_jsonl(data / "lookalike.jsonl", [{"goal": f"how to kill weed {i}"} for i in range(6)])
    zero = {
        "stage": 3,
        "overlap_comm": False,
        "reduce_bucket_size": 100_000,
        "stage3_prefetch_bucket_size": 10_000,
        "stage3_param_persistence_threshold": 100,
    }
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))

    def source(name: str, **columns: str) -> dict[str, Any]:
        return {"source": str(data / f"{name}.jsonl"), "columns": columns or {"prompt": "goal"}}

    train = {
        "ranks": 2,
        "ds_config": str(folder / "zero3.json"),
        "steps": 6,
        "batch_size": 8,
        "micro_batch_size": 2,
        "lr": 1e-2,
        "save_every": 2,
        "validate_every": 3,
    }
    return {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "model": {"path": str(folder / "model"), "dtype": "float32", "attention": "sdpa"},
        "data": {
            "task": source("task", prompt="question", response="answer"),
            "validation_samples": 8, "test_samples": 8, "max_length": 160,
            "harmful": source("harmful"), "harmful_fraction": 0.1,
            "safety": source("safety"), "safety_pairs": 8, "safety_max_length": 200,
            "refusals": source("refusals"), "refusal_samples": 8,
            "harmless": source("harmless", prompt="goal", response="reply"), "harmless_samples": 8,
            "validation_prompts": source("validation"),
        },
        "align": {"enabled": True, "distill_tokens": 6, "train": {**train, "steps": 2}},
        "train": train,
        "safety_pairs": {"batch_size": 4, "refresh_every": 4},
        "evaluate": {
            "harmful": source("harmful_eval"), "harmful_prompts": 6, "harmless": source("lookalike"),
            "harmless_prompts": 4, "ordinary": source("ordinary"), "ordinary_prompts": 4,
            "attacks": ["prefill", "role_play"], "attack_prompts": 3, "task_prompts": 4, "max_new_tokens": 6,
            "batch_size": 4,
        },
        "methods": {
            "sft": {},
            "sap": {"sap": {"enabled": True, "schedule": "lagged", "direction": "precomputed", "layers": [1, 2],
                            "noise_every": 3, "correction_every": 2, "beta": 0.01, "target_correction": 0.2}},
        },
    }  # fmt: skip


def write_recipe(folder: Path, recipe: dict[str, Any], name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def run(
    arguments: list[str], environment: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess:
    """Run a Python command of the project to its end, offline, with its output captured."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=quiet(environment),
        capture_output=True,
        text=True,
        timeout=900,
        **options,
    )


def quiet(environment: dict[str, str] | None = None) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        **(environment or {}),
    }


def sap(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess:
    return run(["-m", "pipeline.cli", *map(str, arguments)], **options)
