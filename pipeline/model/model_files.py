"""Where a recipe's model is: a folder, a hub id or the built-in one.

Needs no torch, so that questions to a layout are answered at once.

from pipeline.model.model_files import model_location, resolve_model_path
"""

from __future__ import annotations

from pathlib import Path

from pipeline.data.builtin import builtin_model, builtin_model_folder
from pipeline.data.sources import check_hub_id
from pipeline.recipe.sections import ModelSection

BUILTIN = "builtin:smollm2-135m-instruct"


def model_location(section: ModelSection) -> str:
    """Local folder of a builtin or local model, or the hub id as it stands; nothing is fetched.

    ValueError for a name that is no model.
    """
    if section.path.startswith("builtin:"):
        if section.path != BUILTIN:
            raise ValueError(
                f"model.path '{section.path}' is no built-in model: the one there is is {BUILTIN}"
            )
        return str(builtin_model_folder())
    path = Path(section.path).expanduser()
    # a recipe's are absolute: pipeline/recipe/paths.py
    local = path.is_absolute() or section.path.startswith((".", "~"))
    if local and path.is_dir():
        return str(path)
    if local or section.path.count("/") != 1:
        raise ValueError(
            f"model.path '{section.path}' is not a folder: give a local model folder, a hub id "
            f"(owner/name) or {BUILTIN}"
        )
    check_hub_id(section.path, "model.path")
    return section.path


def resolve_model_path(section: ModelSection) -> str:
    """`model_location` after making sure that it can be read:
    a builtin model is fetched, a folder is checked (ValueError).
    """
    location = model_location(section)
    if section.path == BUILTIN:
        builtin_model()
    elif Path(location).is_dir():
        check_model_folder(Path(location))
    return location


def check_model_folder(path: Path) -> None:
    """ValueError where the folder lacks a config, weights or a tokenizer."""
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model.path {path} holds no config.json: give the folder of a saved transformers model"
        )
    if not any(path.glob("*.safetensors")):
        raise ValueError(
            f"model.path {path} holds no *.safetensors: save the model with save_pretrained "
            "(pickled weights are not read)"
        )
    if not any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise ValueError(
            f"model.path {path} holds no tokenizer: save it there with tokenizer.save_pretrained"
        )
