"""What a model folder says of its tokenizer, without loading it: tokens and their ids, special ones, the chat template.

facts = read_tokenizer("model.path models/llama", Path("models/llama"), chat_template=None)
facts.id_of("pad_token"), facts.chat_template
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.model.file_headers import json_object
from pipeline.system.system_errors import passes

# in names like image_token
_OF_OTHER_MODALITIES = re.compile(r"image|img|audio|video|vision|speech|sound|boi|eoi|boa|eoa")
_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True)
class TokenizerFacts:
    """What the tokenizer's files say.

    vocabulary: token -> id of the model itself; empty where no file that is read here has it. added: token -> id of
    what was added to it. named: bos_token, eos_token, pad_token, ... -> token, and those of other modalities
    (image_token). chat_template: its source; None where there is none.
    """

    vocabulary: Mapping[str, int]
    added: Mapping[str, int]
    named: Mapping[str, str]
    chat_template: str | None

    def id_of(self, name: str) -> int | None:
        """Id of a named token such as `eos_token`."""
        token = self.named.get(name)
        return None if token is None else self.added.get(token, self.vocabulary.get(token))

    @cached_property
    def other_modalities(self) -> frozenset[str]:
        """Placeholders of images and sounds: a text-only model may share its family's tokenizer and lack their rows."""
        return frozenset(
            token for name, token in self.named.items() if _OF_OTHER_MODALITIES.search(name)
        )


def read_tokenizer(label: str, folder: Path, chat_template: Path | None) -> TokenizerFacts:
    """What a folder says of its tokenizer. chat_template: file that replaces the folder's.

    ValueError for broken files.
    """
    given = {name: json_object(label, folder / name) for name in _tokenizer_files(folder)}
    config = given.get("tokenizer_config.json", {})
    template = _template(label, folder, config, chat_template)
    try:
        vocabulary, added = _tokens(given)
        named, listed = _special_tokens(config, given.get("special_tokens_map.json", {}))
        if vocabulary:
            # As transformers does: a special token that the vocabulary lacks gets the next id.
            for token in dict.fromkeys([*named.values(), *listed]):
                if token not in vocabulary and token not in added:
                    added[token] = max([*vocabulary.values(), *added.values()]) + 1
    except (TypeError, KeyError, AttributeError, ValueError):
        raise ValueError(
            f"{label}: {' or '.join(given)} is not as a tokenizer's files are: save it again with "
            "tokenizer.save_pretrained"
        ) from None
    if "tokenizer.json" in given and not vocabulary:
        raise ValueError(
            f"{label}: tokenizer.json has no vocabulary (model.vocab): save it again with tokenizer.save_pretrained"
        )
    return TokenizerFacts(vocabulary, added, named, template)


def check_loads(label: str, folder: Path) -> None:
    """ValueError where the library that transformers reads tokenizer.json with does not take it."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no more than that
        if found := passes(error):
            raise found from None
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the tokenizer of {label} cannot be read ({path.name}: {first}): save it again with "
            "tokenizer.save_pretrained"
        ) from None


def _tokens(given: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Token -> id of the vocabulary, and of what was added to it."""
    vocabulary = given.get("vocab.json", {})
    added = {token: int(number) for token, number in given.get("added_tokens.json", {}).items()}
    for number, token in (
        given.get("tokenizer_config.json", {}).get("added_tokens_decoder") or {}
    ).items():
        added[_text(token) or ""] = int(number)
    if "tokenizer.json" in given:
        vocabulary = (given["tokenizer.json"].get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, list):  # Unigram: [token, score], in the order of ids
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added |= {
            token["content"]: int(token["id"])
            for token in given["tokenizer.json"].get("added_tokens") or []
        }
    return vocabulary, added


def _special_tokens(
    config: dict[str, Any], special: dict[str, Any]
) -> tuple[dict[str, str], list[str]]:
    """Named special tokens, and those in lists. config and special: tokenizer_config.json, special_tokens_map.json."""
    names = (
        *_SPECIAL,
        *(name for name in config if re.fullmatch(r"\w+_token", name) and name not in _SPECIAL),
    )
    named = {name: text for name in names if (text := _text(config.get(name) or special.get(name)))}
    extra = config.get("extra_special_tokens") or {}
    if isinstance(extra, dict):
        named |= {name: text for name, token in extra.items() if (text := _text(token))}
    lists = [
        config.get("additional_special_tokens") or special.get("additional_special_tokens"),
        extra,
    ]
    return named, [
        text
        for tokens in lists
        if isinstance(tokens, list)
        for token in tokens
        if (text := _text(token))
    ]


def _tokenizer_files(folder: Path) -> Iterator[str]:
    names = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ]
    if not (folder / "tokenizer.json").is_file():
        names.append("vocab.json")
    return (name for name in names if (folder / name).is_file())


def _text(token: Any) -> str | None:
    """A token as its files write it: a string, or an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _template(label: str, folder: Path, config: dict[str, Any], given: Path | None) -> str | None:
    """Source of the chat template, after a look at its syntax."""
    saved = folder / "chat_template.jinja"
    if given is not None and not given.is_file():
        raise ValueError(
            f"model.chat_template {given} does not exist: give the path of a Jinja file"
        )
    if given is not None or saved.is_file():
        path = given or saved
        source: Any
        field = f"model.chat_template {path}" if given else f"{label}: {path.name}"
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(
                f"{field} is not UTF-8 text: save the chat template as UTF-8"
            ) from None
    else:
        field, source = (
            f"{label}: the chat template of tokenizer_config.json",
            config.get("chat_template"),
        )
        if isinstance(source, list):  # several by name
            named = {
                one.get("name"): one.get("template") for one in source if isinstance(one, dict)
            }
            source = named.get("default")
    if source:
        check_template(source, field)
    return source or None


def check_template(source: str, field: str) -> None:
    """ValueError where a chat template is no Jinja that transformers can read."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """transformers' own tag: what the assistant says."""

        tags = {"generation"}  # noqa: RUF012  jinja2 declares it for instances

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    try:
        environment.parse(source)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"{field} has a syntax error in line {error.lineno}: {error.message}"
        ) from None
