"""What the files of a model folder say, read in a fraction of a second: no torch, no transformers, no weight.

    facts = read_facts(recipe.model, Path("models/llama"))
    facts.tensors["model.norm.weight"].shape        # from the safetensors headers
    facts.embedding, facts.layers, facts.tokenizer.chat_template

Whatever is wrong with the files themselves is a ValueError of one sentence; whether they go with a recipe is for
model_checks.py to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.model.file_headers import Tensor, check_whole, json_object, safetensors_header
from pipeline.model.model_files import check_model_folder
from pipeline.model.tokenizer_facts import TokenizerFacts, read_tokenizer
from pipeline.recipe.sections import ModelSection

# How decoders name the input embedding.
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ModelFacts:
    """Config, tensors and tokenizer of a model folder. label: how messages name the model, `model.path ...`."""

    label: str
    folder: Path
    config: dict[str, Any]
    generation: dict[str, Any]
    tensors: Mapping[str, Tensor]
    tokenizer: TokenizerFacts

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """See `decoder_config`."""
        return decoder_config(self.config)

    def number(self, *names: str) -> int | None:
        """A field of the decoder's config, by any of its names."""
        return whole_number(self.text_config, *names)

    @cached_property
    def embedding(self) -> str | None:
        """Name of the input embedding's tensor (vocabulary, hidden); None where none has one of the usual names."""
        pattern = re.compile(rf"(.*\.)?({'|'.join(_EMBEDDINGS)})\.weight")
        found = [
            name
            for name, tensor in self.tensors.items()
            if pattern.fullmatch(name) and len(tensor.shape) == 2
        ]

        def unlikely(name: str) -> tuple[bool, bool, int]:
            return "vision" in name or "audio" in name, "language" not in name, len(name)

        return min(found, key=unlikely, default=None)

    @cached_property
    def layers(self) -> dict[int, list[str]]:
        """Decoder layer -> names of its tensors; empty where the embedding, which stands beside them, is not known."""
        return self._numbered[1]

    def layer_of(self, name: str) -> int | None:
        """The decoder layer that a tensor belongs to; None for embedding, head and final norm."""
        prefix = self._numbered[0]
        match = re.match(rf"{re.escape(prefix)}(\d+)\.", name) if prefix else None
        return int(match[1]) if match else None

    @cached_property
    def _numbered(self) -> tuple[str, dict[int, list[str]]]:
        parent = (self.embedding or "").removesuffix(".weight").rpartition(".")[0]
        lists: dict[str, dict[int, list[str]]] = {}
        for name in self.tensors if self.embedding else ():
            match = re.match(rf"({re.escape(parent)}\.?\w+\.)(\d+)\.", name)
            if match:
                lists.setdefault(match[1], {}).setdefault(int(match[2]), []).append(name)
        return max(lists.items(), key=lambda item: len(item[1]), default=("", {}))

    @cached_property
    def head(self) -> str:
        """Name of the module that turns hidden states into logits, tied or not, as transformers calls it."""
        pattern = re.compile(r"(.*\.)?(lm_head|embed_out)\.weight")
        stored = next((name for name in self.tensors if pattern.fullmatch(name)), None)
        return stored.removesuffix(".weight") if stored else "lm_head"

    @cached_property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's: where the config does not say, that of files without one is."""
        flag = self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings"))
        return bool(flag) if flag is not None else f"{self.head}.weight" not in self.tensors

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name of every linear module -> (out, in), the head last, by names and shapes. Experts are left out."""
        tables = (*_EMBEDDINGS, "wpe", "embed_positions", "position_embeddings")
        found: dict[str, tuple[int, int]] = {}
        for name, tensor in self.tensors.items():
            module, _, last = name.rpartition(".")
            if last != "weight" or len(tensor.shape) != 2 or ".experts." in name:
                continue
            if module.rpartition(".")[2] not in tables:
                found[module] = (tensor.shape[0], tensor.shape[1])
        shape = found.pop(self.head, self.tensors[self.embedding].shape if self.embedding else None)
        return found if shape is None else found | {self.head: (shape[0], shape[1])}

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which generation stops, by the config's and the generation config's eos_token_id."""
        found: set[int] = set()
        for place in (self.text_config, self.config, self.generation):
            value = place.get("eos_token_id")
            found |= {
                token
                for token in (value if isinstance(value, list) else [value])
                if isinstance(token, int)
            }
        return frozenset(found)


def decoder_config(config: dict[str, Any]) -> dict[str, Any]:
    """The decoder's part of config.json's content: all of it, but for models that also read images or sounds."""
    for name in ("text_config", "llm_config", "language_config", "thinker_config"):
        if isinstance(config.get(name), dict):
            return decoder_config(config[name])
    return config


def whole_number(config: dict[str, Any], *names: str) -> int | None:
    """The first of these fields that is a whole number: families name the same size differently."""
    found = (config.get(name) for name in names)
    return next(
        (value for value in found if isinstance(value, int) and not isinstance(value, bool)), None
    )


def read_facts(section: ModelSection, folder: Path) -> ModelFacts:
    """All that the files of a folder say. ValueError, one sentence, for the first thing that is wrong with them."""
    label = f"model.path {section.path}"
    if (folder / "adapter_config.json").is_file():
        # transformers would load the adapter with the model that it names, which need not be the one here.
        raise ValueError(
            f"{label} holds an adapter (adapter_config.json): "
            "merge it into its model, and give the merged model's folder"
        )
    check_whole(label, folder / "config.json")
    pickled = any(next(folder.glob(pattern), None) for pattern in _PICKLED)
    if (folder / "config.json").is_file() and pickled and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{label} holds pickled weights only: load the model and save it with save_pretrained as *.safetensors"
        )
    check_model_folder(folder)
    config = json_object(label, folder / "config.json")
    described = folder / "generation_config.json"
    generation = json_object(label, described) if described.is_file() else {}
    tokenizer = read_tokenizer(label, folder, section.chat_template)
    return ModelFacts(label, folder, config, generation, _tensors(label, folder), tokenizer)


def _tensors(label: str, folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of model.safetensors, or of the files of model.safetensors.index.json, from their headers."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return safetensors_header(label, single)
    if not index.is_file():
        first = min(path.name for path in folder.glob("*.safetensors"))
        raise ValueError(
            f"{label} holds {first} but neither model.safetensors nor model.safetensors.index.json: "
            "copy the missing file too"
        )
    listed = json_object(label, index).get("weight_map")
    if (
        not isinstance(listed, dict)
        or not listed
        or not all(isinstance(file, str) for file in listed.values())
    ):
        raise ValueError(
            f"{label}: {index.name} has no weight_map of tensors to files: copy or download it again"
        )
    found: dict[str, Tensor] = {}
    for file in sorted(set(listed.values())):
        if not (folder / file).is_file():
            raise ValueError(
                f"{label} lacks {file}, which {index.name} lists: copy or download it too"
            )
        held = safetensors_header(label, folder / file)
        twice = next((name for name in held if name in found), None)
        if twice:
            raise ValueError(
                f"{label} holds {twice} twice, in {found[twice].file} and in {file}: "
                "copy the model again into an empty folder"
            )
        found |= held
    gone = next(
        (name for name, file in listed.items() if name not in found or found[name].file != file),
        None,
    )
    if gone:
        raise ValueError(
            f"{label}: {index.name} lists {gone} in {listed[gone]}, which does not hold it: copy or download both again"
        )
    return found
