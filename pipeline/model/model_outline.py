"""A model's names and shapes, whether its files are here or not.

    facts = outlined(recipe.model)

Where the files are on this machine their headers say it, in milliseconds; else transformers builds the modules of a hub
model's config without memory, which takes seconds and the network.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.model.file_headers import Tensor
from pipeline.model.model_checks import local_folder
from pipeline.model.model_facts import ModelFacts, read_facts
from pipeline.model.tokenizer_facts import TokenizerFacts
from pipeline.recipe.sections import ModelSection

if TYPE_CHECKING:  # torch takes seconds to import
    from transformers import PreTrainedModel


def outlined(section: ModelSection) -> ModelFacts:
    """Config, tensors and tokenizer of a model; the tokenizer is unknown where the files are not here.

    ValueError where it could not be loaded.
    """
    folder = local_folder(section)
    if folder is not None and any(folder.glob("*.safetensors")):
        facts = read_facts(section, folder)
        if facts.layers:
            return facts
    return of_modules(section)


def of_modules(section: ModelSection) -> ModelFacts:
    """The same by the modules that transformers builds, whose names adapters go by:
    files may name weights otherwise.
    """
    from pipeline.model.models import outline

    return facts_of(outline(section), section.path)


def facts_of(model: PreTrainedModel, path: str) -> ModelFacts:
    """The same of modules. path: of the model, for messages."""
    tensors = {
        name: Tensor(str(p.dtype), tuple(p.shape), "", 0, 0) for name, p in model.named_parameters()
    }
    unknown = TokenizerFacts(vocabulary={}, added={}, named={}, chat_template=None)
    return ModelFacts(
        f"model.path {path}", Path(path), model.config.to_dict(), {}, tensors, unknown
    )
