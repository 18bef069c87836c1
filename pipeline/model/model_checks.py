"""Whether a model's files go with the recipe, before anything heavy: headers and JSON are read, no torch, no weight.

facts = check_model(recipe)                       # None where the files are not on this machine yet
check_lora(facts, recipe.train, "train")
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.model.lora_targets import adapted_modules
from pipeline.model.model_facts import ModelFacts, decoder_config, read_facts, whole_number
from pipeline.model.model_files import model_location
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import ModelSection, TrainSection

# where the config is silent: a number of their own
_OWN_HEAD_SIZE = frozenset(("gemma", "gemma2", "gemma3_text", "qwen3"))
# Types whose attention and MLP have no more and no other matrices than Llama's.
_PLAIN_LAYERS = frozenset(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3")
)


def check_model(recipe: Recipe) -> ModelFacts | None:
    """What the model's files say, held against each other and the recipe. ValueError, one sentence, for what is wrong.

    None where they are not all here: a hub model that is not in the cache, the built-in one before it was fetched.
    """
    folder = local_folder(recipe.model)
    if folder is None:
        return None
    facts = check_files(recipe.model, folder)
    # The template of a hub model may not be in the cache yet.
    if facts.tokenizer.chat_template is None and Path(recipe.model.path).expanduser().is_dir():
        raise ValueError(
            f"{facts.label} has no chat template: "
            "use an instruction-tuned model or set model.chat_template to a Jinja file"
        )
    check_positions(facts.config, recipe)
    return facts


def check_files(section: ModelSection, folder: Path) -> ModelFacts:
    """What the files in a folder say, after holding them against each other. Raises ValueError, one sentence."""
    facts = read_facts(section, folder)
    _check_architecture(facts)
    _check_sizes(facts)
    _check_token_ids(facts)
    return facts


def local_folder(section: ModelSection) -> Path | None:
    """The folder with a model's files, where all are on this machine. ValueError for a name that is no model."""
    location = model_location(section)
    if section.path.startswith("builtin:"):
        return Path(location) if artifacts.complete(Path(location)) else None
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import try_to_load_from_cache

    def cached(name: str) -> Path | None:
        found = try_to_load_from_cache(location, name, revision=section.revision)
        return Path(found) if isinstance(found, str) else None

    names = ("config.json", "model.safetensors.index.json", "model.safetensors")
    config, index, single = (cached(name) for name in names)
    if config is None or not (
        cached("tokenizer.json") or cached("tokenizer.model") or cached("vocab.json")
    ):
        return None
    if single is None:
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values()) if index else {""}
        except (ValueError, KeyError, TypeError, AttributeError):
            return config.parent  # broken: reading the facts says how
        if not all((config.parent / shard).is_file() for shard in shards):
            return None
    return config.parent


def check_lora(facts: ModelFacts, train: TrainSection, field: str) -> list[str]:
    """Names of the modules that a training section's LoRA adapts, as far as files tell; none for adapter full.

    ValueError for targets that are no linear modules.
    """
    if train.adapter == "full":
        return []
    modules = {name.rpartition(".")[0] for name in facts.tensors}
    modules |= {name[:end] for name in modules for end in range(len(name)) if name[end] == "."}
    # Experts may be modules or not: transformers regroups those of most families. check_targets has the modules.
    experts = {name for name in modules if ".experts" in name}
    linears = [*facts.linears, *sorted(experts - set(facts.linears))]
    others = sorted(modules - set(linears) - {""})
    found = adapted_modules(train.lora.target_modules, linears, facts.head, field, others)
    return [name for name in found if name in facts.linears]


def _check_architecture(facts: ModelFacts) -> None:
    kind = facts.config.get("model_type")
    known = _causal_models()
    if not isinstance(kind, str):
        raise ValueError(
            f"{facts.label}: config.json has no model_type: give the folder of a saved transformers model"
        )
    if known and kind not in known:
        own = ": it needs code of its own, which is not run" if facts.config.get("auto_map") else ""
        raise ValueError(
            f"{facts.label} is of the type '{kind}', which transformers {version('transformers')} does not know as a "
            f"causal language model{own}; give another model, or install a transformers that has it"
        )
    quantised = facts.config.get("quantization_config") or facts.text_config.get(
        "quantization_config"
    )
    if quantised:
        how = (
            quantised.get("quant_method", "by a method of its own")
            if isinstance(quantised, dict)
            else quantised
        )
        raise ValueError(
            f"{facts.label} holds weights that are quantised already ({how}): give the original model; "
            "model.quantization nf4 trains it in 4 bits"
        )


@cache
def _causal_models() -> frozenset[str]:
    """The model types that AutoModelForCausalLM knows; none where transformers does not list them as it does now.

    Read, not imported: the import brings in torch, and takes seconds.
    """
    spec = find_spec("transformers")
    source = (
        Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
        if spec and spec.origin
        else None
    )
    for node in ast.parse(source.read_bytes()).body if source and source.is_file() else []:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        if ast.unparse(node.targets[0]) == "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES":
            return frozenset(name for name, _ in ast.literal_eval(node.value.args[0]))
    return frozenset()


def _check_sizes(facts: ModelFacts) -> None:
    """ValueError where config.json and the weights are of different models."""
    weights = (
        (name, tensor.dtype) for name, tensor in facts.tensors.items() if name.endswith(".weight")
    )
    coded = next(
        ((name, dtype) for name, dtype in weights if dtype not in ("F16", "BF16", "F32", "F64")),
        None,
    )
    if coded:
        raise ValueError(
            f"{facts.label}: {coded[0]} is stored as {coded[1]}, not as floating point of 16 bits or more: "
            "give the original model"
        )
    if facts.embedding is None:
        return
    rows, width = facts.tensors[facts.embedding].shape
    hidden = facts.number("word_embed_proj_dim", "hidden_size", "n_embd", "d_model")
    for field, said, found in (
        ("vocab_size", facts.number("vocab_size"), rows),
        ("hidden_size", hidden, width),
    ):
        if said is not None and said != found:
            raise ValueError(
                _disagree(facts, f"{field} {said:,}", f"{facts.embedding} is {rows:,} x {width:,}")
            )
    head = facts.tensors.get(f"{facts.head}.weight")
    if head and len(head.shape) == 2 and head.shape[0] != rows:
        raise ValueError(
            f"{facts.label}: {facts.head}.weight has {head.shape[0]:,} rows and {facts.embedding} {rows:,}: "
            "resize both with model.resize_token_embeddings and save the model again"
        )
    _check_linears(facts, hidden)
    said = facts.number("num_hidden_layers", "n_layer", "num_layers")
    if said is None or not facts.layers:
        return
    held = f"there are weights of {len(facts.layers)} layers"
    missing = next((index for index in range(said) if index not in facts.layers), None)
    if missing is not None:
        raise ValueError(
            _disagree(facts, f"num_hidden_layers {said}", f"{held}, none of layer {missing}")
        )
    # Layers that predict further tokens stand behind the others, and are not loaded.
    if max(facts.layers) + 1 - said > (facts.number("num_nextn_predict_layers") or 0):
        raise ValueError(_disagree(facts, f"num_hidden_layers {said}", held))


def _check_linears(facts: ModelFacts, hidden: int | None) -> None:
    """ValueError where a layer's matrices are not of the sizes that config.json names.

    Families that shape them otherwise are left alone.
    """
    inner, heads = facts.number("intermediate_size"), facts.number("num_attention_heads")
    if facts.config.get("model_type") not in _PLAIN_LAYERS or not (hidden and inner and heads):
        return
    dimension, keys = facts.number("head_dim"), facts.number("num_key_value_heads") or heads
    if dimension is None and facts.config["model_type"] in _OWN_HEAD_SIZE:
        return
    dimension = dimension or hidden // heads
    queries, few = (heads * dimension, hidden), (keys * dimension, hidden)
    wanted = {"q_proj": queries, "k_proj": few, "v_proj": few, "o_proj": queries[::-1]}
    wanted |= {
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    for name, shape in facts.linears.items():
        size = wanted.get(name.rpartition(".")[2])
        if size and facts.layer_of(f"{name}.weight") is not None and tuple(shape) != size:
            tensor = facts.tensors[f"{name}.weight"]
            raise ValueError(
                f"{facts.label}: {name}.weight is {' x '.join(f'{n:,}' for n in shape)} in "
                f"{tensor.file}, but config.json makes it {' x '.join(f'{n:,}' for n in size)}: "
                "copy config and weights from the same place"
            )


def _disagree(facts: ModelFacts, said: str, found: str) -> str:
    reason = f"config.json says {said}, but {found}"
    return f"{facts.label}: {reason}: config and weights are not of one model; copy both from the same place"


def _check_token_ids(facts: ModelFacts) -> None:
    """ValueError where the tokenizer gives ids that the embedding has no row for, or nothing ends an answer."""
    tokenizer = facts.tokenizer
    if "eos_token" not in tokenizer.named and not facts.stop_ids:
        raise ValueError(
            f"{facts.label} names no eos token, neither in tokenizer_config.json nor as eos_token_id in config.json: "
            "answers would never end; set eos_token in tokenizer_config.json to the token that ends an answer"
        )
    if facts.embedding is None:
        return
    rows = facts.tensors[facts.embedding].shape[0]
    for name in ("pad_token", "eos_token"):
        number = tokenizer.id_of(name)
        if number is not None and number >= rows:
            raise ValueError(
                f"{facts.label}: {name} '{tokenizer.named[name]}' has id {number:,}, "
                f"but the embedding has {rows:,} rows: name a token in tokenizer_config.json that has one, "
                "or resize the embedding with model.resize_token_embeddings and save the model again"
            )
    beyond = next((number for number in sorted(facts.stop_ids) if number >= rows), None)
    if beyond is not None:
        raise ValueError(
            f"{facts.label}: eos_token_id {beyond:,} is beyond the embedding's {rows:,} rows: "
            "set it in config.json and generation_config.json to the id of eos_token"
        )
    padding = facts.number("pad_token_id")
    if padding is not None and padding >= rows:
        raise ValueError(
            f"{facts.label}: config.json's pad_token_id {padding:,} is beyond the embedding's {rows:,} rows: "
            "set it to the id of pad_token, or to null"
        )
    known = {**tokenizer.vocabulary, **tokenizer.added}
    exempt = tokenizer.other_modalities
    outside = {
        token: number for token, number in known.items() if number >= rows and token not in exempt
    }
    if outside:
        first = min(outside, key=outside.__getitem__)
        raise ValueError(
            f"{facts.label}: the tokenizer has ids up to {max(outside.values()):,} ('{first}' is {outside[first]:,}), "
            f"but the embedding has {rows:,} rows: resize it with model.resize_token_embeddings and save the model "
            "again, or give the model its own tokenizer"
        )


def positions(config: dict[str, Any]) -> int | None:
    """Tokens that a model has positions for, rope scaling included; None where its config names no limit.

    config: config.json's content.
    """
    text = decoder_config(config)
    limit = whole_number(text, "max_position_embeddings", "n_positions", "max_seq_len")
    if limit is None:
        return None
    scaled = [limit]
    for rope in _ropes(text):
        factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
        if isinstance(factor, int | float) and math.isfinite(factor):
            scaled.append(int(factor * (original if isinstance(original, int) else limit)))
    return max(scaled)


def _ropes(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Settings of rotary embeddings: one for the model, or one for each type of layer."""
    found = [config.get(name) for name in ("rope_parameters", "rope_scaling")]
    found += [inner for outer in found if isinstance(outer, dict) for inner in outer.values()]
    return [rope for rope in found if isinstance(rope, dict)]


def check_positions(config: dict[str, Any], recipe: Recipe) -> None:
    """ValueError where sequences are to be longer than the model has positions for. config: config.json's content."""
    limit = positions(config)
    if limit is None:
        return
    lengths = {
        "data.max_length": recipe.data.max_length,
        "data.safety_max_length": recipe.data.safety_max_length,
        # a prompt has a token at the least
        "evaluate.max_new_tokens": recipe.evaluate.max_new_tokens + 1,
    }
    for field, length in lengths.items():
        if length > limit:
            most = limit - 1 if field.startswith("evaluate") else limit
            where = f"the {limit:,} positions of model.path {recipe.model.path}"
            raise ValueError(f"{field} is beyond {where}: set it to {most:,} at the most")


def check_prompts(config: dict[str, Any], lengths: Iterable[int], recipe: Recipe) -> None:
    """ValueError where a prompt and its answer are longer than the model has positions for.

    config: config.json's content. lengths: tokens of each evaluation prompt.
    """
    limit, longest, new = positions(config), max(lengths, default=0), recipe.evaluate.max_new_tokens
    if limit is not None and longest + new > limit:
        raise ValueError(
            f"the longest evaluation prompt has {longest:,} tokens, and with evaluate.max_new_tokens {new:,} "
            f"its answer would end beyond the {limit:,} positions of model.path {recipe.model.path}: "
            "lower evaluate.max_new_tokens, or take the prompt out of its source"
        )
