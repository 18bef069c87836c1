"""A model folder as its files are, written without torch: for tests of what is looked at before anything is loaded."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from pipeline.defences.recipes import recipe_class
from pipeline.recipe.recipe import Recipe

WORDS, HIDDEN, LAYERS, POSITIONS = 20, 8, 2, 64
END, PAD = "<|end|>", "<|pad|>"
SOURCE = {"source": "data.jsonl"}


def shapes(tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a tiny Llama's tensors."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (WORDS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            found[f"model.layers.{layer}.{name}.weight"] = (HIDDEN, HIDDEN)
        found[f"model.layers.{layer}.input_layernorm.weight"] = (HIDDEN,)
    return found if tied else found | {"lm_head.weight": (WORDS, HIDDEN)}


def write_safetensors(
    path: Path, tensors: dict[str, tuple[int, ...]], dtype: str = "F32", width: int = 4
) -> None:
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = math.prod(shape) * width
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def write_shards(folder: Path, files: dict[str, dict[str, tuple[int, ...]]]) -> None:
    """Several files and their index, in place of model.safetensors."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    for file, tensors in files.items():
        write_safetensors(folder / file, tensors)
    index = {
        "metadata": {},
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | fields
    path.write_text(
        json.dumps({name: value for name, value in content.items() if value is not None})
    )


def make_folder(folder: Path, tied: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": WORDS, "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "max_position_embeddings": POSITIONS, "tie_word_embeddings": tied,
        "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {
        token: number
        for number, token in enumerate([END, PAD, *(f"word{i}" for i in range(WORDS - 2))])
    }
    added = [{"id": vocabulary[token], "content": token, "special": True} for token in (END, PAD)]
    (folder / "tokenizer.json").write_text(
        json.dumps({"added_tokens": added, "model": {"type": "WordLevel", "vocab": vocabulary}})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "pad_token": PAD}))
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    write_safetensors(folder / "model.safetensors", shapes(tied))
    return folder


def recipe_of(folder: Path | str, **sections: dict[str, Any]) -> Recipe:
    """A recipe of that model; sections: fields in place of the smallest ones that it takes."""
    smallest: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder)},
        "data": {
            "task": SOURCE,
            "safety": SOURCE,
            "max_length": POSITIONS,
            "safety_max_length": POSITIONS,
        },
        "train": {"steps": 1},
        "evaluate": {"harmful": SOURCE, "max_new_tokens": 8},
    }
    return recipe_class().model_validate(
        {
            "name": "t",
            **{name: fields | sections.get(name, {}) for name, fields in smallest.items()},
        }
    )
