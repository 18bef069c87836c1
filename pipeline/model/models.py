"""Models, tokenizers and adapters: what is loaded, in which dtype, and where the decoder layers are.

from pipeline.model.models import load_model, load_tokenizer, add_lora
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

# transformers imports deepspeed, which looks for a device and complains about CPUs unless it is told.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from pipeline.data.chat import Chat
from pipeline.libraries.transformers_private import supports_attention
from pipeline.model.file_headers import Tensor
from pipeline.model.lora_targets import ALL_LINEAR, adapted_modules
from pipeline.model.model_files import model_location, resolve_model_path
from pipeline.model.weights import listed, not_finite
from pipeline.recipe.sections import LoraSection, ModelSection, TrainSection
from pipeline.running import devices, lean_imports
from pipeline.system.system_errors import naming, passes

# it misses an optional CPU kernel, on import by peft
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# peft still asks for it
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)
# An adapted head that shares the embedding's weight: merged models get a head of its own (training/product.py).
warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
    disable_progress_bar()


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template (or model.chat_template's). ValueError where it has none."""
    path = resolve_model_path(section)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=section.revision, trust_remote_code=False
        )
    except OSError as error:
        raise refused(path, error) from None
    except Exception as error:  # what the tokenizers library raises is no more than that
        if found := passes(error):
            raise found from None
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the tokenizer of model.path '{path}' cannot be read ({first}): save it again with "
            "tokenizer.save_pretrained"
        ) from None
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of model.path '{path}' is a slow one, without character offsets: "
            "save it as tokenizer.json with a fast tokenizer"
        )
    if section.chat_template is not None:
        if not section.chat_template.is_file():
            raise ValueError(
                f"model.chat_template {section.chat_template} does not exist: give the path of a Jinja file"
            )
        tokenizer.chat_template = section.chat_template.read_text()
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {path} has no chat template: use an instruction-tuned model or set "
            "model.chat_template to a Jinja file"
        )
    if tokenizer.eos_token is None:
        tokenizer.eos_token = _configured_eos(tokenizer, section)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_chat(section: ModelSection) -> Chat:
    """The tokenizer with its chat template, and the ids at which the model's configs stop generation.

    Raises ValueError.
    """
    path = resolve_model_path(section)
    try:
        described = GenerationConfig.from_pretrained(path, revision=section.revision).eos_token_id
    except (OSError, ValueError) as error:  # none there
        if found := passes(error):  # one that cannot be read would be an answer that ends elsewhere
            raise found from None
        described = None
    configured = (described, load_config(section).get_text_config().eos_token_id)
    stops = [
        token
        for value in configured
        for token in (value if isinstance(value, list) else [value])
        if isinstance(token, int)
    ]
    name = (
        f"model.chat_template {section.chat_template}"
        if section.chat_template
        else f"the chat template of {section.path}"
    )
    return Chat(load_tokenizer(section), stops, name)


def _configured_eos(tokenizer: PreTrainedTokenizerBase, section: ModelSection) -> str:
    """The eos token of the config, for a tokenizer that names none. ValueError where there is none either."""
    number = load_config(section).get_text_config().eos_token_id
    number = number[0] if isinstance(number, list) and number else number
    token = tokenizer.convert_ids_to_tokens(number) if isinstance(number, int) else None
    if token is None:
        raise ValueError(
            f"model.path {section.path} names no eos token, neither in tokenizer_config.json nor as eos_token_id in "
            "config.json: set eos_token in tokenizer_config.json to the token that ends an answer"
        )
    return token


def resolve_dtype(name: str) -> torch.dtype:
    """Dtype of the frozen weights; `auto` is bfloat16 where the hardware multiplies it natively (devices.dtype)."""
    return getattr(torch, devices.dtype(name))


def load_model(
    path: str, dtype: torch.dtype, attention: str = "sdpa", revision: str | None = None
) -> PreTrainedModel:
    """A causal language model on the CPU, in train mode, with the key-value cache off.

    path: local folder or hub id. Raises ValueError where it could not be loaded, or is not complete.
    """
    index, single = (Path(path) / f"model.safetensors{ending}" for ending in (".index.json", ""))
    if index.is_file() and not single.is_file():
        listed(index)  # transformers would say that JSON is wrong, and not whose
    try:
        with naming(Path(path)):
            model, report = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, attn_implementation=attention, revision=revision, trust_remote_code=False,
                use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except OSError as error:
        raise refused(path, error) from None
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        sizes = f"{tuple(found)} in the files, but config.json makes it {tuple(wanted)}"
        raise ValueError(
            f"model.path '{path}': {name} is {sizes}: copy config and weights from the same place"
        )
    if report["missing_keys"]:
        raise ValueError(
            f"model.path '{path}' lacks the weight {min(report['missing_keys'])}, which "
            "transformers would draw at random: give a complete model"
        )
    for name, parameter in model.named_parameters():
        problem = not_finite(parameter.data)
        if problem:
            raise ValueError(damaged_weight(path, name, problem))
    model.config.use_cache = False
    return model.train()


def damaged_weight(path: str, name: str, problem: str) -> str:
    """The sentence for a weight that no training can start from."""
    reason = "the model was damaged, or saved by a training that diverged"
    return f"model.path '{path}': weight {name} holds {problem}: {reason}; give another one"


def load_config(section: ModelSection) -> PretrainedConfig:
    """The model's config, of which nothing else need be there. ValueError where it could not be loaded."""
    path = (
        resolve_model_path(section)
        if section.path.startswith("builtin:")
        else model_location(section)
    )
    try:
        return AutoConfig.from_pretrained(path, revision=section.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        # ValueError: an architecture that transformers does not know
        raise refused(path, error) from None


def outline(section: ModelSection) -> PreTrainedModel:
    """The model's modules without their weights (meta tensors), from its config alone:
    for what is to be known before weights are read.
    """
    return without_weights(load_config(section), section.path)


def without_weights(config: PretrainedConfig, path: str) -> PreTrainedModel:
    """The modules of a config without memory (meta tensors).

    path: of the model, for the ValueError where transformers has no such model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(unreachable(path, error)) from None


def check_targets(model: PreTrainedModel, lora: LoraSection, field: str) -> list[str]:
    """Names of the modules that lora.target_modules adapts, in the model's order. ValueError for targets it lacks."""
    names = {name: isinstance(module, nn.Linear) for name, module in model.named_modules() if name}
    head = model.get_output_embeddings()
    head_name = next((name for name, module in model.named_modules() if module is head), None)
    linears, others = (
        [name for name, linear in names.items() if linear is which] for which in (True, False)
    )
    return adapted_modules(lora.target_modules, linears, head_name, field, others)


def check_attention(model: PreTrainedModel, section: ModelSection) -> None:
    """ValueError, one sentence, where transformers has the model without the attention that model.attention means here.

    model: an `outline`.
    """
    name = devices.attention(section)
    if not supports_attention(model, name):
        meant = (
            name if section.attention == name else f"{section.attention} ({name} on this machine)"
        )
        others = (
            "sdpa or eager"
            if name == devices.FLASH and supports_attention(model, "sdpa")
            else "eager"
        )
        raise ValueError(
            f"model.attention {meant} is not there for model.path {section.path}: transformers has no such form of "
            f"{type(model).__name__}; set model.attention to {others}"
        )


def check_weights(model: PreTrainedModel, tensors: Mapping[str, Tensor], label: str) -> None:
    """ValueError where the files' tensors do not make up the model, an `outline`: a shape differs, or one is missing.

    A missing one is looked for only where the files use the model's names: transformers renames or regroups others.
    """
    state = model.state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)  # names of tied weights share a tensor
        if name in tensors and tensors[name].shape != tuple(tensor.shape):
            found, wanted = (
                " x ".join(f"{size:,}" for size in shape)
                for shape in (tensors[name].shape, tensor.shape)
            )
            sizes = f"{found} in {tensors[name].file}, but config.json makes it {wanted}"
            raise ValueError(
                f"{label}: {name} is {sizes}: copy config and weights from the same place"
            )
    missing = [names[0] for names in groups.values() if not any(name in tensors for name in names)]
    # of old Llamas
    surplus = {
        name for name in tensors.keys() - state.keys() if not name.endswith("rotary_emb.inv_freq")
    }
    if missing and not surplus:
        raise ValueError(
            f"{label} lacks the weight {missing[0]}, which transformers would draw at random: give a complete model"
        )


def add_lora(model: PreTrainedModel, lora: LoraSection, seed: int) -> nn.Module:
    """A fresh LoRA (B = 0) in float32 on a frozen model; A is drawn from `seed` alone, so every rank has the same.

    Returns the PeftModel. See `check_targets` for names that the model lacks.
    """
    lean_imports.import_peft()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=_targets(model, lora),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _targets(model: PreTrainedModel, lora: LoraSection) -> list[str] | str:
    """As PEFT takes them; all-linear as names, because PEFT's takes in transposed weights, which are not merged."""
    if isinstance(lora.target_modules, str) and lora.target_modules.lower() == ALL_LINEAR:
        return check_targets(model, lora, "train")
    return lora.target_modules


def make_trainable(
    model: PreTrainedModel, train: TrainSection, seed: int, recomputed: int | None = None
) -> nn.Module:
    """The module to train: a fresh LoRA on the frozen model, or the model itself with every weight trainable;
    checkpointing where asked for.

    recomputed: number of decoder layers that recompute, for gradient_checkpointing auto; all without it.
    """
    adapted = (
        add_lora(model, train.lora, seed) if train.adapter == "lora" else model.requires_grad_(True)
    )
    if train.gradient_checkpointing and recomputed != 0 and _can_recompute(model, train):
        enable_checkpointing(model, recomputed)
    return adapted


def _can_recompute(model: PreTrainedModel, train: TrainSection) -> bool:
    """ValueError where a model cannot and the recipe says that it must."""
    if not model.supports_gradient_checkpointing and train.gradient_checkpointing is True:
        raise ValueError(
            f"{type(model).__name__} cannot recompute activations: set "
            "train.gradient_checkpointing (or align.train's) to false"
        )
    return model.supports_gradient_checkpointing


def enable_checkpointing(model: PreTrainedModel, layers: int | None = None) -> None:
    """Non-reentrant activation checkpointing: the reentrant kind raises in `torch.autograd.grad`.

    layers: how many, from the first on (passes that stop at a probe never come back to those); all without it, and in
    models that transformers has not taught to do it layer by layer.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in decoder_layers(model)[layers:] if layers is not None else ():
        vars(layer)["gradient_checkpointing"] = False


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order: the members of the longest ModuleList of equal modules, wherever wrappers put it."""
    lists = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) and len({type(layer) for layer in m}) == 1
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers to probe")
    longest = max(lists, key=len)
    return list(longest)


def hidden_size(model: nn.Module) -> int:
    """Width of the hidden states of a model of transformers, or of one with an adapter, by its configuration."""
    config: Any = model.config
    return config.get_text_config().hidden_size


def refused(path: str, error: Exception) -> Exception:
    """What to raise where a model could not be loaded: an error of the system that may pass as it
    is, else a ValueError.

    A folder that is not there any more is such an error: a library would take its name for one of the hub.
    """
    if Path(path).is_absolute() and not Path(path).exists():
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return passes(error) or ValueError(unreachable(path, error))


def unreachable(path: str, error: Exception) -> str:
    """The sentence for a model that cannot be read: of the hub only where the model is not a folder."""
    first = str(error).strip().splitlines()[0]
    if Path(path).is_dir():
        return f"model.path '{path}' cannot be read: {first.partition(' Checkout ')[0]}"
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    hint = (
        "HF_HUB_OFFLINE=1 is set, so only the local cache was looked at"
        if offline
        else "check the id, the network and your access (hf auth login)"
    )
    return f"model.path '{path}' could not be loaded: {hint}; a local folder works too ({first})"
