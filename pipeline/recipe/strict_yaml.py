"""Recipe files and overrides as mappings: YAML without its traps, files that extend each other,
and how layers are merged.

A recipe is a page of text. What would make a program of it, or gigabytes, is refused: aliases that multiply, lists
within lists without end, files that are no recipe's size, grids of more cells than anybody trains.

    overrides = parse_overrides(["--train.lr", "2e-4", "--sap.layers=10:19"])
    merge(read(Path("launch/recipes/demo.yaml"), resolve), overrides)
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from pipeline import shipped
from pipeline.recipe.redaction import redact
from pipeline.system.system_errors import naming

Resolve = Callable[[dict[str, Any], Path], dict[str, Any]]

MOST_BYTES, MOST_VALUES, MOST_DEPTH, MOST_FILES, MOST_CELLS = 2**20, 20_000, 50, 20, 10_000


def read(path: Path, resolve: Resolve) -> dict[str, Any]:
    """The file's mapping, over that of the file its `extends` names. ValueError, one sentence, where there is none.

    resolve: makes the paths of a file's mapping absolute, given the file: they are relative to it, whatever extends it.
    """
    return _read(path, resolve, ())


def _read(path: Path, resolve: Resolve, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"extends of {seen[-1]} names {path}, which does not exist: give a path relative to that file"
            if seen
            else f"no recipe at {path.absolute()}: give the path of a YAML file, or the name of one that ships with "
            f"the package ({', '.join(shipped.recipes())})"
        )
    if len(seen) >= MOST_FILES:
        raise ValueError(
            f"extends of {seen[0]} leads through more than {MOST_FILES} files: put them together"
        )
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(
            f"{path} is {path.stat().st_size:,} bytes, and a recipe has at most {MOST_BYTES:,}: "
            "give the path of a recipe"
        )
    try:
        with naming(path):
            text = path.read_text()
        raw = _load(text)
    except _TooMuch as error:
        raise ValueError(f"{path} {error}: give the path of a recipe") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date like 2024-13-01
        raise ValueError(f"{path} is not valid YAML: {_reason(error)}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a mapping of sections, e.g. 'name: demo'")
    raw = resolve(raw, path)
    if not isinstance(raw.get("extends"), str):
        return raw
    if path.resolve() in seen:
        raise ValueError(f"extends of {path} leads back to itself: take one of them out")
    return merge(_read(Path(raw["extends"]), resolve, (*seen, path.resolve())), raw)


def mapping_of(path: Path) -> dict[str, Any]:
    """The mapping of a file that `read` has read, without what it extends, and with its paths as they stand."""
    return _load(path.read_text())


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`['--train.lr', '2e-4', '--sap.layers=[3,9]']` as a nested mapping; values are YAML.

    ValueError where two contradict.
    """
    result: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--") or key == "--":
            raise ValueError(
                f"unexpected argument '{redact(key)}': overrides look like --train.lr 2e-4"
            )
        key, equals, text = key[2:].partition("=")
        if not equals:
            if not rest:
                raise ValueError(f"--{key} needs a value")
            text = rest.pop(0)
        try:
            value = _load(text)
        except _TooMuch as error:
            raise ValueError(f"--{key} {error}") from None
        except (yaml.YAMLError, ValueError):
            value = text
        _put(result, key.replace("-", "_").split("."), value)
    return result


def as_arguments(overrides: dict[str, Any], prefix: str = "") -> list[str]:
    """The inverse of `parse_overrides`, for the launch scripts."""
    result = []
    for key, value in overrides.items():
        # a grid's fields are names with dots
        if isinstance(value, dict) and value and not any("." in name for name in value):
            result += as_arguments(value, f"{prefix}{key}.")
        else:
            # quoted strings too: "10:19" and "1e5" stay strings
            result.append(f"--{prefix}{key}={json.dumps(value)}")
    return result


def _put(tree: dict[str, Any], names: list[str], value: Any) -> None:
    """Set tree[names[0]][names[1]]...; a part and its whole cannot both be given, or one would silently win."""
    *parents, leaf = names
    node = tree
    if len(names) > MOST_DEPTH:
        raise ValueError(
            f"--{'.'.join(names)[:80]}... names {len(names)} sections within each other: no field lies so deep"
        )
    for depth, name in enumerate(parents, 1):
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            whole = ".".join(parents[:depth])
            raise ValueError(
                f"--{'.'.join(names)} sets a part of {whole}, but --{whole} gives it a single "
                "value: leave one of them out"
            )
    before = node.get(leaf)
    if isinstance(before, dict) and before and not isinstance(value, dict):
        whole, part = ".".join(names), next(iter(before))
        raise ValueError(
            f"--{whole} gives a single value, but --{whole}.{part} sets a part of it: leave one of them out"
        )
    node[leaf] = merge(before, value) if isinstance(before, dict) and leaf != "columns" else value


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of base in which overrides win, mapping by mapping (lists and mappings of columns are replaced)."""
    result = copy.deepcopy(base)
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict) and key != "columns":
            result[key] = merge(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    # A recipe gives steps or epochs; an override of one replaces the other.
    for mine, other in (("steps", "epochs"), ("epochs", "steps")):
        if overrides.get(mine) is not None and other not in overrides:
            result.pop(other, None)
    return result


def expanded(name: str, overrides: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A method and its grid as methods: {grid: {train.lr: [1e-3, 1e-4]}} makes NAME.lr_0.001 and NAME.lr_0.0001.

    ValueError for what is no grid.
    """
    if "grid" not in overrides:
        return {name: overrides}
    grid, rest = (
        overrides["grid"],
        {key: value for key, value in overrides.items() if key != "grid"},
    )
    if (
        not isinstance(grid, dict)
        or not grid
        or not all(
            isinstance(field, str) and isinstance(values, list) and values
            for field, values in grid.items()
        )
    ):
        raise ValueError(
            f"the grid of method '{name}' must map fields to lists of values, e.g. {{train.lr: [1e-3, 1e-4]}}"
        )
    cells = math.prod(map(len, grid.values()))
    if cells > MOST_CELLS:
        raise ValueError(
            f"the grid of method '{name}' has {cells:,} cells, and takes at most {MOST_CELLS:,}: leave values out"
        )
    result = {}
    for values in product(*grid.values()):
        tree: dict[str, Any] = {}
        for field, value in zip(grid, values, strict=True):
            _put(tree, field.split("."), value)
        label = ".".join(
            f"{field.rpartition('.')[2]}_{_short(value)}"
            for field, value in zip(grid, values, strict=True)
        )
        if f"{name}.{label}" in result:
            raise ValueError(
                f"the grid of method '{name}' names two cells {label}: give each a method of its own"
            )
        result[f"{name}.{label}"] = merge(rest, tree)
    return result


def _short(value: Any) -> str:
    """A value as part of a name: letters, digits, _ and . only; m stands for minus."""
    if isinstance(value, str) and value.startswith("/"):  # a path: the same name on every machine
        value = Path(value).name
    return re.sub(
        r"[^A-Za-z0-9_.]",
        "",
        (f"{value:g}" if isinstance(value, float) else str(value)).replace("-", "m"),
    )


def _reason(error: Exception) -> str:
    """What is wrong and where, without the lines themselves: they may hold a secret."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        text = f"{f'{error.context}, ' if error.context else ''}{error.problem}, line {error.problem_mark.line + 1}"
    else:
        text = str(error)
    return redact(" ".join(text.split()))


class _TooMuch(ValueError):
    """What is written is YAML, and no recipe: half a sentence that goes on after the file's or the argument's name."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, reads 2e-4 as a number (YAML 1.1 wants 2.0e-4)
    and 10:19 as text (not as base 60).
    """

    depth = count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth, self.count = self.depth + 1, self.count + 1
        _check_size(self.count, self.depth)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _written_out(node, {}, set())
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, because `<<: *anchor` later puts another mapping's keys into this node, which its own may repeat.
        node = super().compose_mapping_node(anchor)
        keys = Counter(
            (key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)
        )
        for (_, text), times in keys.items():
            if times > 1:
                raise yaml.YAMLError(f"key '{text}' appears twice, line {node.start_mark.line + 1}")
        return node


def _written_out(
    node: yaml.Node, known: dict[int, tuple[int, int]], within: set[int]
) -> tuple[int, int]:
    """Values and depth of a node with its aliases written out.

    known: of nodes seen before; within: those that hold this one.
    """
    if id(node) in within:
        raise _TooMuch(f"holds itself, by an alias of line {node.start_mark.line + 1}")
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inner = (
            [part for pair in parts for part in pair]
            if isinstance(node, yaml.MappingNode)
            else parts
        )
        within.add(id(node))
        found = [_written_out(part, known, within) for part in inner]
        within.remove(id(node))
        known[id(node)] = (
            1 + sum(values for values, _ in found),
            1 + max((depth for _, depth in found), default=0),
        )
        _check_size(*known[id(node)])
    return known[id(node)]


def _check_size(values: int, depth: int) -> None:
    if values > MOST_VALUES:
        raise _TooMuch(f"holds more than {MOST_VALUES:,} values, its aliases written out")
    if depth > MOST_DEPTH:
        raise _TooMuch(f"nests values more than {MOST_DEPTH} deep, its aliases written out")


def _load(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_INT_TEXT = re.compile(r"^[-+]?(?:0b[01_]+|0[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
_FLOAT_TEXT = re.compile(
    r"^(?:[-+]?(?:\d[\d_]*(?:\.[\d_]*)?[eE][-+]?\d+|\d[\d_]*\.[\d_]*|\.\d[\d_]*(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN))$"
)
_Loader.add_implicit_resolver(_INT, _INT_TEXT, list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT, _FLOAT_TEXT, list("-+0123456789."))
