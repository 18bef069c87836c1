"""Models whose weights are read piece by piece: every rank reads its own part of the files, and nobody holds the whole.

    # modules without memory, and where their weights come from
    model, sources = open_model(recipe.model, "models/llama", sharded=True)
    engine = open_engine(make_trainable(model, train, seed), train, sources)     # shards, then fills the shards

A checkpoint that transformers converts while it loads (renamed or regrouped tensors) is loaded as usual, with a
warning: every rank then holds a whole copy for a while.
"""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from pipeline.libraries.transformers_private import conversions, keeps_float32
from pipeline.model.model_checks import check_files
from pipeline.model.models import damaged_weight, load_model, refused, resolve_dtype
from pipeline.model.quantization import quantise
from pipeline.model.weights import (
    Source,
    Sources,
    WeightFiles,
    file_source,
    fill,
    listed,
    not_finite,
    placeholder,
)
from pipeline.recipe.sections import ModelSection
from pipeline.running import devices
from pipeline.running.devices import device


def open_model(
    section: ModelSection, location: str, sharded: bool
) -> tuple[PreTrainedModel, Sources]:
    """The model as the recipe computes it, in train mode, and the sources of those of its
    parameters that have no memory yet.

    location: local folder or hub id. sharded: leave the weights to the engine's shards; else only quantised ones are
    left. They are quantised on this process's accelerator wherever they are kept. Raises ValueError where the model
    could not be loaded.
    """
    if not Path(location).is_dir():
        # they were not here when the recipe was checked
        check_files(section, _files_of(location, section.revision).folder)
    how = location, resolve_dtype(section.dtype), devices.attention(section), section.revision
    opened = _skeleton(*how) if sharded or section.quantization == "nf4" else None
    model, sources = opened or (load_model(*how), Sources())
    if section.quantization == "nf4":
        quantise(model, sources, device())
    return model, sources


def load_whole(section: ModelSection, location: str) -> PreTrainedModel:
    """The model as the recipe computes it, whole on the CPU: for answers and evaluation. Raises as `open_model`.

    In 4 bits where the recipe says so, with the codes that training sees:
    the CPU holds what the accelerator has quantised.
    """
    model, sources = open_model(section, location, sharded=False)
    fill(sources)
    if sources.damaged:
        raise ValueError(sources.damaged[0])
    return model


def weight_files(location: str, revision: str | None = None) -> WeightFiles:
    """The safetensors files of a local folder or hub model (fetched first, unless HF_HUB_OFFLINE=1).

    Raises OSError where it has none.
    """
    if Path(location).is_dir():
        return WeightFiles(Path(location))
    folder = Path(snapshot_download(location, revision=revision, allow_patterns=["*.json"]))
    index = folder / "model.safetensors.index.json"
    names = sorted(set(listed(index).values())) if index.is_file() else ["model.safetensors"]
    return WeightFiles(
        Path(snapshot_download(location, revision=revision, allow_patterns=["*.json", *names]))
    )


def _files_of(location: str, revision: str | None) -> WeightFiles:
    try:
        return weight_files(location, revision)
    except (OSError, ValueError) as error:  # ValueError: no id at all
        raise refused(location, error) from None


def _skeleton(
    location: str, dtype: torch.dtype, attention: str, revision: str | None
) -> tuple[PreTrainedModel, Sources] | None:
    """`load_model` without the weights: placeholders with their sources;
    None, after a warning, where that is not possible.
    """
    from accelerate import init_empty_weights

    try:
        config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=False)
        files = _files_of(location, revision)
        # Buffers are real: those that no file holds, such as rotary frequencies, are computed here.
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
        if model.can_generate() and (files.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(files.folder)
    except OSError as error:
        raise refused(location, error) from None
    model.tie_weights()
    problem = _differs(model, files, dtype)
    if problem:
        warnings.warn(
            f"{location} is loaded whole on every rank, because {problem}: it takes ranks times the model's memory",
            stacklevel=3,
        )
        return None
    model.config.use_cache = False
    model.name_or_path = model.config.name_or_path = location
    for name, buffer in model.state_dict().items():
        if not buffer.is_meta:
            buffer.copy_(files[name])
    return model.train(), _placeholders(model, files, location)


def _placeholders(model: PreTrainedModel, files: WeightFiles, location: str) -> Sources:
    """Put a placeholder in every parameter's places (two where weights are tied); sources in the files' order."""
    places: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
    for prefix, owner in model.named_modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(parameter, []).append(
                (f"{prefix}.{name}" if prefix else name, owner, name)
            )
    by_name = {}
    for parameter, held in places.items():
        new = placeholder(parameter.shape, parameter.dtype, parameter.requires_grad)
        for _, owner, name in held:
            setattr(owner, name, new)
        by_name[next(full for full, _, _ in held if full in files)] = new
    sources = Sources()
    for name in files:
        if name in by_name:
            sources[by_name[name]] = _noting(sources, file_source(files, name), location, name)
    return sources


def _noting(sources: Sources, source: Source, location: str, name: str) -> Source:
    """The same source, which notes in `sources.damaged` what it yields that is not finite."""

    # the first element of the piece that is noted, and where in the list
    lock, lowest, place = threading.Lock(), 0, -1

    def noting(start: int, stop: int) -> torch.Tensor:
        nonlocal lowest, place
        value = source(start, stop)
        problem = not_finite(value)
        if problem:
            sentence = damaged_weight(location, name, problem)
            # Pieces come in any order, from several threads; what is said is what is wrong with the first.
            with lock:
                if place < 0:
                    lowest, place = start, len(sources.damaged)
                    sources.damaged.append(sentence)
                elif start < lowest:
                    lowest, sources.damaged[place] = start, sentence
        return value

    return noting


def _differs(model: PreTrainedModel, files: WeightFiles, dtype: torch.dtype) -> str | None:
    """Why the files do not hold the model's parameters one to one, in half a sentence; None where they do."""
    if getattr(model.config, "quantization_config", None) is not None:
        return "its weights are quantised"
    if dtype != torch.float32 and keeps_float32(model):
        return f"transformers keeps some of its weights in float32 beside {dtype}"
    converts = conversions(model)
    held: dict[int, list[str]] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        held.setdefault(id(tensor), []).append(name)
    for names in held.values():
        present = [name for name in names if name in files]
        if len(present) != 1:
            return f"its files hold {'both of the tied' if present else 'no'} {' and '.join(names)}"
        name, tensor = present[0], tensors[present[0]]
        if converts(name):
            return f"transformers converts {name} while it loads"
        if files.shape(name) != tuple(tensor.shape) or not files.is_float(name):
            return f"{name} has another shape or type in its files"
    return None
