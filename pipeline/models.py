"""Models, tokenizers and adapters: what is loaded, in which dtype, and where the decoder layers are.

from pipeline.models import load_model, load_tokenizer, add_lora
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

import torch
from torch import nn

# transformers imports deepspeed, which looks for a device and complains about CPUs unless it is told.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from pipeline import devices, lean_imports  # noqa: E402
from pipeline.model_files import model_location, resolve_model_path  # noqa: E402
from pipeline.sections import LoraSection, ModelSection, TrainSection  # noqa: E402

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses an optional CPU kernel, on import by peft
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)  # peft still asks for it
if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
    disable_progress_bar()


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template (or model.chat_template's). ValueError where it has none."""
    path = resolve_model_path(section)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=section.revision, trust_remote_code=False)
    except OSError as error:
        raise ValueError(unreachable(path, error)) from None
    if section.chat_template is not None:
        if not section.chat_template.is_file():
            raise ValueError(f"model.chat_template {section.chat_template} does not exist: give the path of a Jinja file")
        tokenizer.chat_template = section.chat_template.read_text()
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {path} has no chat template: use an instruction-tuned model or set model.chat_template to a Jinja file"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_dtype(name: str) -> torch.dtype:
    """Dtype of the frozen weights; `auto` is bfloat16 where the hardware multiplies it natively (devices.dtype)."""
    return getattr(torch, devices.dtype(name))


def load_model(path: str, dtype: torch.dtype, attention: str = "sdpa", revision: str | None = None) -> PreTrainedModel:
    """A causal language model on the CPU, in train mode, with the key-value cache off.

    path: local folder or hub id. Raises ValueError where it cannot be had, or is not complete.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, revision=revision, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(unreachable(path, error)) from None
    if report["missing_keys"]:
        raise ValueError(
            f"model.path '{path}' lacks the weight {min(report['missing_keys'])}, which transformers would draw at random: give a complete model"
        )
    model.config.use_cache = False
    return model.train()


def read_config(section: ModelSection) -> PretrainedConfig:
    """The config of a folder or hub model, of which nothing else need be there. ValueError where it cannot be had."""
    path = model_location(section)
    try:
        return AutoConfig.from_pretrained(path, revision=section.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:  # ValueError: a type of model that transformers does not know
        raise ValueError(unreachable(path, error)) from None


def without_weights(config: PretrainedConfig, path: str) -> PreTrainedModel:
    """The modules of a config without memory (meta tensors). path: of the model, for the ValueError where transformers has no such model."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(unreachable(path, error)) from None


def check_targets(model: nn.Module, lora: LoraSection, field: str) -> None:
    """ValueError where one of lora.target_modules names no linear module of the model."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = [target for target in lora.target_modules if target not in names]
    if missing:
        raise ValueError(f"{field}.lora.target_modules names '{missing[0]}', which this model lacks: it has {', '.join(sorted(names))}")


def add_lora(model: PreTrainedModel, lora: LoraSection, seed: int) -> nn.Module:
    """A fresh LoRA (B = 0) in float32 on a frozen model; A is drawn from `seed` alone, so every rank has the same.

    Returns the PeftModel. See `check_targets` for names that the model lacks.
    """
    lean_imports.import_peft()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.target_modules), task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def make_trainable(model: PreTrainedModel, train: TrainSection, seed: int) -> nn.Module:
    """The module to train: a fresh LoRA on the frozen model, or the model itself with every weight trainable; checkpointing where asked for."""
    adapted = add_lora(model, train.lora, seed) if train.adapter == "lora" else model.requires_grad_(True)
    if train.gradient_checkpointing:
        enable_checkpointing(model)
    return adapted


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Non-reentrant activation checkpointing: the reentrant kind raises in `torch.autograd.grad`."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order: the members of the longest ModuleList of equal modules, wherever wrappers put it."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and len({type(layer) for layer in m}) == 1]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers to probe")
    return list(max(lists, key=len))


def unreachable(path: str, error: Exception) -> str:
    """The sentence for a model that cannot be read."""
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    hint = (
        "HF_HUB_OFFLINE=1 is set, so only the local cache was looked at"
        if offline
        else "check the id, the network and your access (huggingface-cli login)"
    )
    first = str(error).strip().splitlines()[0]
    return f"model.path '{path}' cannot be had: {hint}; a local folder works too ({first})"
