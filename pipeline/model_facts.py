"""What the files of a model folder say, read in a fraction of a second: no torch, no transformers, no weight.

    facts = read_facts(recipe.model, Path("models/llama"))
    facts.tensors["model.norm.weight"].shape        # from the safetensors headers
    facts.embedding, facts.layers, facts.tokenizer.largest_id

Whatever is wrong with the files themselves is a ValueError of one sentence; whether they go with a recipe is model_checks.py's to say.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.model_files import check_model_folder
from pipeline.sections import ModelSection

_LFS = b"version https://git-lfs"
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")  # how decoders name the input embedding
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Tensor(NamedTuple):
    """A tensor of a safetensors file: dtype as the file names it (BF16), shape, file name, and its bytes start..stop there."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class TokenizerFacts:
    """What the tokenizer's files say. vocabulary: token -> id of the model itself; empty where no file that is read here has it.

    added: token -> id of what was added to it. named: bos_token, eos_token, pad_token, ... -> token; also those of other modalities
    (image_token). chat_template: its source, with `template_field` for messages; None where there is none.
    """

    vocabulary: Mapping[str, int]
    added: Mapping[str, int]
    named: Mapping[str, str]
    chat_template: str | None
    template_field: str

    def id_of(self, name: str) -> int | None:
        """Id of a named token such as `eos_token`."""
        token = self.named.get(name)
        return None if token is None else self.added.get(token, self.vocabulary.get(token))

    @cached_property
    def largest_id(self) -> int | None:
        """The largest id there is; None where the vocabulary is not known."""
        return max([*self.vocabulary.values(), *self.added.values()]) if self.vocabulary else None

    @cached_property
    def other_modalities(self) -> frozenset[str]:
        """Placeholders of images and sounds, which no text holds: a text-only model may share its family's tokenizer and lack their rows."""
        return frozenset(token for name, token in self.named.items() if name not in _SPECIAL)


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
        """Name of the input embedding's tensor (vocabulary, hidden); None where no tensor has one of the usual names."""
        found = [name for name in self.tensors if name.endswith(tuple(f"{word}.weight" for word in _EMBEDDINGS)) and self._rank(name) == 2]
        found = [name for name in found if name.removesuffix(".weight").rpartition(".")[2] in _EMBEDDINGS]
        return min(found, key=lambda name: ("vision" in name or "audio" in name, "language" not in name, len(name)), default=None)

    @cached_property
    def layers(self) -> dict[int, list[str]]:
        """Decoder layer -> the names of its tensors; empty where the embedding is not known (it stands beside the list of layers)."""
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
    def head(self) -> str | None:
        """Name of the module that turns hidden states into logits, tied or not, as transformers calls it."""
        stored = next((name for name in self.tensors if re.fullmatch(r"(.*\.)?(lm_head|embed_out)\.weight", name)), None)
        return stored.removesuffix(".weight") if stored else "lm_head"

    @cached_property
    def tied(self) -> bool:
        """Whether the head's weight is the input embedding. Files that hold no head are tied, whatever the config leaves unsaid."""
        flag = self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings"))
        return bool(flag) if flag is not None else f"{self.head}.weight" not in self.tensors

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name of every linear module, head included -> (out, in), as far as names and shapes tell (no experts, no embeddings)."""
        found = {
            name.removesuffix(".weight"): tensor.shape
            for name, tensor in self.tensors.items()
            if name.endswith(".weight") and len(tensor.shape) == 2 and ".experts." not in name
        }
        names = {name for name in found if name.rpartition(".")[2] in (*_EMBEDDINGS, "wpe", "embed_positions", "position_embeddings")}
        linear = {name: shape for name, shape in found.items() if name not in names}
        if self.head not in linear and self.embedding:
            linear[self.head or "lm_head"] = self.tensors[self.embedding].shape
        return linear  # type: ignore[return-value]  # two sizes: ranks were looked at

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which generation stops, by the config's and the generation config's eos_token_id."""
        found: set[int] = set()
        for place in (self.text_config, self.config, self.generation):
            value = place.get("eos_token_id")
            found |= {token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)}
        return frozenset(found)

    def _rank(self, name: str) -> int:
        return len(self.tensors[name].shape)


def decoder_config(config: dict[str, Any]) -> dict[str, Any]:
    """The decoder's part of config.json's content: all of it, but for models that also read images or sounds."""
    for name in ("text_config", "llm_config", "language_config", "thinker_config"):
        if isinstance(config.get(name), dict):
            return decoder_config(config[name])
    return config


def whole_number(config: dict[str, Any], *names: str) -> int | None:
    """The first of these fields that is a whole number: families name the same size differently."""
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


def read_facts(section: ModelSection, folder: Path) -> ModelFacts:
    """All that the files of a folder say. ValueError, one sentence, for the first thing that is wrong with them."""
    label = f"model.path {section.path}"
    if (folder / "adapter_config.json").is_file():
        # transformers would load the adapter too, or instead: the model that is named there, which need not be this one.
        raise ValueError(f"{label} holds an adapter (adapter_config.json): merge it into its model, and give the folder of the merged model")
    _whole(label, folder / "config.json")
    pickled = any(next(folder.glob(pattern), None) for pattern in _PICKLED)
    if (folder / "config.json").is_file() and pickled and not any(folder.glob("*.safetensors")):
        raise ValueError(f"{label} holds pickled weights only: load the model and save it with save_pretrained, which writes *.safetensors")
    check_model_folder(folder)
    config = _object(label, folder / "config.json")
    generation = _object(label, folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    return ModelFacts(label, folder, config, generation, _tensors(label, folder), _tokenizer(label, section, folder))


def _tensors(label: str, folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of model.safetensors, or of the files of model.safetensors.index.json, from their headers."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _header(label, single)
    if not index.is_file():
        first = min(path.name for path in folder.glob("*.safetensors"))
        raise ValueError(f"{label} holds {first} but neither model.safetensors nor model.safetensors.index.json: copy the missing file too")
    listed = _object(label, index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise ValueError(f"{label}: {index.name} has no weight_map of tensors to files: copy or download it again")
    found: dict[str, Tensor] = {}
    for file in sorted(set(listed.values())):
        if not (folder / file).is_file():
            raise ValueError(f"{label} lacks {file}, which {index.name} lists: copy or download it too")
        held = _header(label, folder / file)
        twice = next((name for name in held if name in found), None)
        if twice:
            raise ValueError(f"{label} holds {twice} twice, in {found[twice].file} and in {file}: copy the model again into an empty folder")
        found |= held
    gone = next((name for name, file in listed.items() if name not in found or found[name].file != file), None)
    if gone:
        raise ValueError(f"{label}: {index.name} lists {gone} in {listed[gone]}, which does not hold it: copy or download both again")
    return found


def _header(label: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, after its length was held against what its header says."""
    _whole(label, path)
    size = path.stat().st_size
    broken = f"{label}: {path.name} is no safetensors file (its header cannot be read): copy or download it again"
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= 100 * 10**6:  # what the format allows
            raise ValueError(broken)
        text = stream.read(length)
    if len(text) < length:
        raise ValueError(f"{label}: {path.name} is cut short, within its header: copy or download it again")
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        found = {name: _tensor(entry, path.name, 8 + length) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(broken) from None
    end = max((tensor.stop for tensor in found.values()), default=8 + length)
    if size != end:
        what = "cut short" if size < end else "too long"
        raise ValueError(f"{label}: {path.name} is {what} ({size:,} bytes, its header says {end:,}): copy or download it again")
    return found


def _tensor(entry: dict[str, Any], file: str, offset: int) -> Tensor:
    shape, (start, stop) = tuple(map(int, entry["shape"])), entry["data_offsets"]
    width = _BYTES.get(entry["dtype"])  # None: a dtype newer than this table, or one of parts of bytes
    if not 0 <= start <= stop or (width and math.prod(shape) * width != stop - start):
        raise ValueError
    return Tensor(entry["dtype"], shape, file, offset + start, offset + stop)


def _tokenizer(label: str, section: ModelSection, folder: Path) -> TokenizerFacts:
    given = {name: _object(label, folder / name) for name in _tokenizer_files(folder)}
    config, special = given.get("tokenizer_config.json", {}), given.get("special_tokens_map.json", {})
    vocabulary = given.get("vocab.json", {})
    added = {token: number for token, number in given.get("added_tokens.json", {}).items() if isinstance(number, int)}
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        added[_text(token) or ""] = int(number)
    if "tokenizer.json" in given:
        model = given["tokenizer.json"].get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocabulary, dict | list) or not vocabulary:
            raise ValueError(f"{label}: tokenizer.json has no vocabulary (model.vocab): save it again with tokenizer.save_pretrained")
        if isinstance(vocabulary, list):  # Unigram: [token, score], in the order of ids
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added |= {token["content"]: token["id"] for token in given["tokenizer.json"].get("added_tokens") or []}
    named = {name: text for name in (*_SPECIAL, *_modalities(config)) if (text := _text(config.get(name) or special.get(name)))}
    extra = config.get("extra_special_tokens") or {}
    if isinstance(extra, dict):
        named |= {name: text for name, token in extra.items() if (text := _text(token))}
    more = [config.get("additional_special_tokens") or special.get("additional_special_tokens"), extra]
    listed = [text for tokens in more if isinstance(tokens, list) for token in tokens if (text := _text(token))]
    if vocabulary:
        # As transformers does: a special token that the vocabulary lacks gets the next id.
        for token in dict.fromkeys([*named.values(), *listed]):
            if token not in vocabulary and token not in added:
                added[token] = max([*vocabulary.values(), *added.values()]) + 1
    return TokenizerFacts(vocabulary, added, named, *_template(label, section, folder, config))


def _tokenizer_files(folder: Path) -> Iterator[str]:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    if not (folder / "tokenizer.json").is_file():
        names += ("vocab.json",)
    return (name for name in names if (folder / name).is_file())


def _modalities(config: dict[str, Any]) -> list[str]:
    return [name for name in config if re.fullmatch(r"\w+_token", name) and name not in _SPECIAL]


def _text(token: Any) -> str | None:
    """A token as its files write it: a string, or an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _template(label: str, section: ModelSection, folder: Path, config: dict[str, Any]) -> tuple[str | None, str]:
    """Source of the chat template and how messages name it, after a look at its syntax."""
    saved = folder / "chat_template.jinja"
    path = section.chat_template or (saved if saved.is_file() else None)
    if section.chat_template is not None and not section.chat_template.is_file():
        raise ValueError(f"model.chat_template {section.chat_template} does not exist: give the path of a Jinja file")
    if path is not None:
        field = f"model.chat_template {path}" if section.chat_template else f"{label}: {path.name}"
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{field} is no UTF-8 text: save the chat template as UTF-8") from None
    else:
        field, source = f"{label}: the chat template of tokenizer_config.json", config.get("chat_template")
        if isinstance(source, list):  # several by name
            source = next((one.get("template") for one in source if isinstance(one, dict) and one.get("name") == "default"), None)
    if source:
        check_template(source, field)
    return source or None, field


def check_template(source: str, field: str) -> None:
    """ValueError where a chat template is no Jinja that transformers can read."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """transformers' own tag: what the assistant says."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    try:
        environment.parse(source)
    except TemplateSyntaxError as error:
        raise ValueError(f"{field} has a syntax error in line {error.lineno}: {error.message}") from None


def _whole(label: str, path: Path) -> None:
    """ValueError for a file that is empty, or Git's stand-in for one."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        start = stream.read(len(_LFS))
    if not start:
        raise ValueError(f"{label}: {path.name} is empty: copy or download it again")
    if start == _LFS:
        raise ValueError(f"{label}: {path.name} is a Git LFS pointer, not the file itself: run `git lfs pull` in the model's repository")


def _object(label: str, path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    _whole(label, path)
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # also bytes that are no UTF-8
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "it is no UTF-8 text"
        raise ValueError(f"{label}: {path.name} is no valid JSON ({where}): copy or download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{label}: {path.name} holds no JSON object: copy or download it again")
    return value
