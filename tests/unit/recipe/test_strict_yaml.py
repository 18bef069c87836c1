"""A recipe is a page of text: what would take gigabytes or never end is refused in a sentence, at once."""

from pathlib import Path

import pytest
import yaml

from pipeline.defences import recipes
from pipeline.recipe.strict_yaml import (
    MOST_BYTES,
    MOST_DEPTH,
    MOST_FILES,
    expanded,
    parse_overrides,
    read,
)


def taken(folder: Path, text: str) -> dict:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return read(path, lambda raw, _: raw)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
LADDER = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 2000))
HOSTILE = {
    "aliases that multiply": (LAUGHS, "holds more than 20,000 values, its aliases written out"),
    "aliases that pile up": (LADDER, "nests values more than 50 deep, its aliases written out"),
    "an alias of itself": ("name: x\na: &a [1, *a]\n", "holds itself, by an alias of line 2"),
    "a mapping of itself": ("a: &a {b: *a}\n", "holds itself, by an alias of line 1"),
    "a merge of itself": ("a: &a {<<: *a, b: 1}\n", "holds itself, by an alias of line 1"),
    "lists in lists": ("a: " + "[" * 5000 + "]" * 5000, "nests values more than 50 deep"),
    "mappings in mappings": (
        "".join(f"{' ' * i}a:\n" for i in range(800)),
        "nests values more than 50 deep",
    ),
    "keys without end": (
        "".join(f"k{i}: 1\n" for i in range(30_000)),
        "holds more than 20,000 values",
    ),
    "a file of another kind": ("# " + "x" * MOST_BYTES, "and a recipe has at most 1,048,576"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_recipe_is_refused_in_a_sentence(tmp_path, kind):
    text, sentence = HOSTILE[kind]
    with pytest.raises(ValueError, match=sentence) as refused:
        taken(tmp_path, text)
    assert str(tmp_path / "recipe.yaml") in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize("value", ["[" * 5000, "&a [*a]", "[" + "x, " * 30_000 + "]"])
def test_an_override_of_that_kind_is_refused_and_no_text(value):
    with pytest.raises(ValueError, match=r"^--sap.layers (nests|holds) "):
        parse_overrides(["--sap.layers", value])


def test_a_field_deeper_than_there_is_any_is_refused():
    with pytest.raises(ValueError, match="names 5000 sections within each other"):
        parse_overrides(["--" + ".".join("a" * 5000), "1"])


def test_aliases_that_a_person_writes_are_taken(tmp_path):
    found = taken(
        tmp_path,
        "base: &base {lr: 1e-3, lora: {r: 8}}\nmore: {<<: *base, steps: 5}\nlist: &l [1, 2]\nagain: [*l, *l]\n",
    )
    assert found["more"] == {"lr": 1e-3, "lora": {"r": 8}, "steps": 5} and found["again"] == [
        [1, 2],
        [1, 2],
    ]
    deep = "a: " + "[" * (MOST_DEPTH - 2) + "]" * (MOST_DEPTH - 2)
    assert taken(tmp_path, deep)


def test_a_chain_of_files_ends(tmp_path):
    def chain(length: int) -> Path:
        for number in range(length):
            extends = f"extends: r{number + 1}.yaml\n" if number + 1 < length else ""
            (tmp_path / f"r{number}.yaml").write_text(f"{extends}k{number}: 1\n")
        return tmp_path / "r0.yaml"

    def resolve(raw, path):
        return raw | ({"extends": str(path.parent / raw["extends"])} if "extends" in raw else {})

    assert len(read(chain(MOST_FILES), resolve)) == MOST_FILES + 1
    with pytest.raises(ValueError, match=r"extends of .*r0.yaml leads through more than 20 files"):
        read(chain(3000), resolve)


def test_a_grid_has_an_end():
    grid = {f"train.f{i}": list(range(10)) for i in range(6)}
    with pytest.raises(
        ValueError, match="the grid of method 'sap' has 1,000,000 cells, and takes at most 10,000"
    ):
        expanded("sap", {"grid": grid})


def test_grids_have_an_end_together(tmp_path):
    grid = {
        "grid": {
            f"train.{field}": [i + 1 for i in range(10)]
            for field in ("lr", "steps", "batch_size", "weight_decay")
        }
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"extends": "demo.yaml", "methods": {"a": grid, "b": {}}}))
    with pytest.raises(
        ValueError, match=r"methods: these are 10,00[0-9] methods, and a recipe has at most 10,000"
    ):
        recipes.load(path)
