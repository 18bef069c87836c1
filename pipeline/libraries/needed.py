"""Whether a library, as installed, has the names that are not its public ones and that this project needs.

    need("transformers", "transformers>=5.0,<6", ["transformers:PreTrainedModel._no_split_modules"])

Such names may be gone with any release. Said at the start, that is one sentence; met in a step, it is a traceback after
hours.
"""

from __future__ import annotations

import dis
import importlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from types import CodeType
from typing import Any


def need(library: str, requirement: str, names: Sequence[str]) -> None:
    """ValueError, one sentence, for the first of `names` that the library lacks: what, which version, what to install.

    names: MODULE:NAME or MODULE:CLASS.NAME. A name that only instances have, or what instances are about, is looked for
    among the attributes that the class's functions set. requirement: as pip takes it, and as pyproject.toml has it.
    """
    for name in names:
        if not _is_there(name):
            raise ValueError(
                f"{library} {_version(library)} has no {name.replace(':', '.')}, which this project needs of its "
                f"insides: pip install '{requirement}'"
            )


def _is_there(name: str) -> bool:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    for part in path.split("."):
        if not hasattr(found, part):
            return isinstance(found, type) and _is_set_inside(found, part)
        found = getattr(found, part)
    return True


def _is_set_inside(owner: type, name: str) -> bool:
    """Whether a class's functions set an attribute of this name, on whatever: behind decorators, in functions, too."""
    waiting = [
        value for base in owner.__mro__ if base is not object for value in vars(base).values()
    ]
    waiting.reverse()  # most are set in __init__, which comes first
    seen = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        cells = (cell.cell_contents for cell in getattr(value, "__closure__", None) or ())
        waiting += [content for content in cells if callable(content)]
        code = value if isinstance(value, CodeType) else getattr(value, "__code__", None)
        if isinstance(code, CodeType):
            steps = dis.get_instructions(code) if name in code.co_names else ()
            if any(step.opname == "STORE_ATTR" and step.argval == name for step in steps):
                return True
            waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return False


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "(no version)"
