"""Products of a run, in safetensors, re-opened and checked before they count:
a PEFT adapter, a merged model, or a fully trained one.

    save_adapter(engine, "models/base", Path("adapter"))      # PeftModel.from_pretrained(model, "adapter") loads it
    save_merged(engine, source, recipe.model, Path("merged"), tokenizer)     # AutoModelForCausalLM, vLLM
    save_model(engine, source, recipe.model, Path("model"), tokenizer)       # the same of all weights trained

Models are streamed: rank 0 holds the tensors of one file (5 GB) at a time, whatever the model's size.
All functions are collective calls.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections import ChainMap, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.engines.engine import Engine
from pipeline.libraries.transformers_private import as_in_files
from pipeline.model.loading import weight_files
from pipeline.model.models import load_model, resolve_dtype
from pipeline.model.weights import merged as merge
from pipeline.model.weights import write_sharded
from pipeline.recipe.sections import ModelSection, TrainSection
from pipeline.running import lean_imports
from pipeline.system.system_errors import naming

if TYPE_CHECKING:
    from peft import PeftModel


def save_product(
    engine: Engine, train: TrainSection, source: str, section: ModelSection, folder: Path,
    tokenizer: PreTrainedTokenizerBase, merged: str | None = None,
) -> None:  # fmt: skip
    """What a stage leaves of a model that started as `source`: folder/model of all weights, or folder/adapter.

    merged: name of a folder for the model with the adapter added, beside it; train.export_merged asks for `merged`.
    """
    if train.adapter == "full":
        save_model(engine, source, section, folder / "model", tokenizer)
        return
    save_adapter(engine, source, folder / "adapter")
    names = [name for name in (merged, "merged" if train.export_merged else None) if name]
    for name in names:
        save_merged(engine, source, section, folder / name, tokenizer)


def save_gathered(
    engine: Engine, tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, stem: str = "model"
) -> None:
    """Write what `engine.gathered` yields, on rank 0, as it comes."""
    if engine.rank == 0:
        write_sharded(tensors, folder, stem)
    else:
        deque(tensors, maxlen=0)


def save_adapter(engine: Engine, base_model: str, folder: Path) -> None:
    """Gather the adapter and write it as PEFT does, on rank 0.

    AssertionError where the file does not hold what was trained.
    """
    gathered = engine.gather(engine.weights())
    if engine.rank == 0:
        _write_adapter(engine.module, gathered, base_model, folder)


def _write_adapter(
    module: PeftModel, gathered: dict[str, torch.Tensor], base_model: str, folder: Path
) -> None:
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True)
    config = copy.deepcopy(module.peft_config["default"])
    config.inference_mode, config.base_model_name_or_path = True, base_model
    for name, value in vars(config).items():
        # PEFT would write it in an order that is another one in every process
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    # save_embedding_layers: else PEFT announces that it saves an adapted head's own weight too, which was not gathered.
    saved = get_peft_model_state_dict(module, state_dict=gathered, save_embedding_layers=False)
    state = {name: tensor.contiguous() for name, tensor in saved.items()}
    config.save_pretrained(str(folder))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    again = load_file(folder / "adapter_model.safetensors")
    assert len(again) == len(gathered), "the adapter's file lacks parameters"
    for name, tensor in state.items():
        assert tensor.numel() > 0 and torch.equal(again[name], tensor), (
            f"{name} is not in the adapter's file as it was trained"
        )


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with a trained adapter, for inference."""
    lean_imports.import_peft()
    from peft import PeftModel

    with naming(folder):
        return PeftModel.from_pretrained(model, str(folder))


def save_merged(
    engine: Engine,
    source: str,
    section: ModelSection,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Add the trained adapter to the model at `source` and write the sum as a model folder, in model.dtype.

    It is added to the original weights, also where training saw them in 4 bits (model.quantization nf4): the product
    does not carry the rounding, and is not exactly the model that was trained. An adapted head that shared the
    embedding's weight becomes one of its own.
    """
    gathered = engine.gather(engine.weights())
    if engine.rank != 0:
        return
    adapted: PeftModel = engine.module
    model, dtype = adapted.get_base_model(), resolve_dtype(section.dtype)
    files, config = weight_files(source, section.revision), adapted.peft_config["default"]
    updates, tied = _updates(gathered), _tied_weights(model)
    untie = tied is not None and tied[1] in updates
    base: Mapping[str, torch.Tensor] = files
    if tied is not None and untie and tied[0] in files and tied[1] not in files:
        # the head's own weight starts as the embedding's
        base = ChainMap({tied[1]: files[tied[0]]}, files)  # type: ignore[arg-type]  # read only
    if updates.keys() <= set(base) and (base is not files or not untie):
        write_sharded(merge(base, updates, config.lora_alpha / config.r, dtype), folder)
    else:
        _save_merged_whole(adapted, gathered, source, section, folder, untie)
    _describe(model, files.folder, dtype, folder, tokenizer, untie)


def _tied_weights(model: PreTrainedModel) -> tuple[str, str] | None:
    """Names of the embedding's and the head's weight where the two are one; None where they are not."""
    if not model.config.tie_word_embeddings:
        return None
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding, head = (
        next(f"{name}.weight" for name, module in model.named_modules() if module is end)
        for end in ends
    )
    return embedding, head


def _updates(gathered: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Names of the adapted weights, as the model without its adapter calls them -> (A, B)."""
    prefix, first, second = "base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight"
    modules = [name.removesuffix(first) for name in gathered if name.endswith(first)]
    assert 2 * len(modules) == len(gathered), (
        "an adapter holds A and B of every module, and nothing else"
    )
    return {
        f"{name.removeprefix(prefix)}.weight": (gathered[name + first], gathered[name + second])
        for name in modules
    }


def _save_merged_whole(
    module: PeftModel, gathered: dict[str, torch.Tensor], source: str, section: ModelSection, folder: Path, untie: bool
) -> None:  # fmt: skip
    warnings.warn(
        f"{source} is merged whole on rank 0, because its files give the weights other names than the model",
        stacklevel=3,
    )
    adapter = folder.with_name(f".{folder.name}.adapter")
    _write_adapter(module, gathered, source, adapter)
    # nothing is computed with it
    model = load_model(source, torch.float32, "eager", section.revision)
    if untie:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        _set_untied(model.config)
    whole = load_adapter(model, adapter).merge_and_unload()
    whole.to(resolve_dtype(section.dtype)).save_pretrained(folder)
    shutil.rmtree(adapter)


def save_model(
    engine: Engine,
    source: str,
    section: ModelSection,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the model all of whose weights were trained, starting from `source`, as a model folder in model.dtype.

    Tied weights are written once, as transformers does.
    """
    dtype = resolve_dtype(section.dtype)
    tensors = ((name, tensor.to(dtype)) for name, tensor in engine.gathered(engine.weights()))
    if engine.rank != 0:
        deque(tensors, maxlen=0)
        return
    files = weight_files(source, section.revision)
    buffers = _persistent_buffers(engine.module)
    if {
        name for name, parameter in engine.module.named_parameters() if parameter.requires_grad
    } <= set(files):
        write_sharded(_chained(tensors, buffers), folder)
    else:
        warnings.warn(
            f"the trained model is gathered whole on rank 0, because the files of {source} name its weights otherwise",
            stacklevel=2,
        )
        write_sharded(as_in_files(engine.module, {**dict(tensors), **buffers}).items(), folder)
    _describe(engine.module, files.folder, dtype, folder, tokenizer)


def _chained(
    tensors: Iterator[tuple[str, torch.Tensor]], buffers: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    yield from tensors
    yield from buffers.items()


def _persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to a checkpoint. No engine shards them."""
    kept = module.state_dict(keep_vars=True).keys()
    buffers = module.named_buffers(remove_duplicate=False)
    return {name: buffer.detach().cpu() for name, buffer in buffers if name in kept}


def _set_untied(config: PretrainedConfig) -> None:
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False


def _describe(
    model: PreTrainedModel,
    source: Path,
    dtype: torch.dtype,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    untie: bool = False,
) -> None:
    """What from_pretrained needs beside the weights. untie: whether the head has a weight of its own now."""
    config = copy.deepcopy(model.config)
    if untie:
        _set_untied(config)
    config.use_cache, config.dtype = True, dtype
    config.architectures = [
        next(
            kind.__name__
            for kind in type(model).__mro__
            if kind.__module__.startswith("transformers.")
        )
    ]
    config.save_pretrained(folder)
    if (source / "generation_config.json").is_file():
        shutil.copy(source / "generation_config.json", folder)
    tokenizer.save_pretrained(folder)
