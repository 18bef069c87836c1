"""What can be known of the data before anything is prepared:
files, columns, every row of local files, and whether the splits can be filled.

    notes = check_sources(recipe)      # ValueError for what is wrong; sentences about what was not looked at

Needs no tokenizer and no torch.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from pipeline.data import files
from pipeline.data.malformed import Skipped
from pipeline.data.overlap import Claims
from pipeline.data.rows import Row, ordered_rows, task_rows
from pipeline.data.sources import check_source, local_path, read_source
from pipeline.data.splits import check_split, split
from pipeline.recipe.recipe import Recipe, sources
from pipeline.recipe.sections import DataSection, SourceSection

_READ_WHOLE = 200e6  # bytes of unpacked data up to which every row is looked at: seconds


def check_sources(recipe: Recipe) -> list[str]:
    """Paths, mappings, built-in names and the rows of local files.

    Raises ValueError; returns sentences that are no errors.
    """
    return look(recipe)[0]


def look(recipe: Recipe) -> tuple[list[str], int | None]:
    """As check_sources, and how many usable rows the task has; None where its source was not read."""
    data, notes, skipped, task = recipe.data, [], Skipped(), None
    for field, source in sources(recipe):
        check_source(source, field)
    if recipe.align.enabled and (data.refusals is None or data.harmless is None):
        raise ValueError(
            "align.enabled needs data.refusals and data.harmless: name both sources, or set align.enabled to false"
        )
    if recipe.evaluate.split == "validation" and data.validation_prompts is None:
        raise ValueError(
            "evaluate.split validation needs data.validation_prompts: name a source of harmful prompts"
        )
    unused = {"data.refusals", "data.harmless"} if not recipe.align.enabled else set()
    unused |= set() if data.draws_harmful else {"data.harmful"}
    for field, source in sources(recipe):
        path = local_path(source)
        if path is not None and _size(path, source, field) > _READ_WHOLE:
            large = "is large, so its columns and rows are looked at when they are prepared"
            notes.append(f"{field}: {source.source} {large}")
        elif path is not None and field in unused:
            # what cannot be read or mapped is wrong whether or not it is used
            read_source(source, field, ())
        elif path is not None:
            count = _check_rows(field, source, recipe, skipped)
            task = count if field == "data.task" else task
        elif field not in unused and not source.source.startswith("builtin:"):
            notes.append(
                f"{field}: {source.source} is taken for a data set of the hub, and looked at when it is prepared"
            )
    return [*notes, *skipped.sentences()], task


def _size(path: Path, source: SourceSection, field: str) -> int:
    try:
        return files.unpacked_bytes(path, source.split)
    except files.NotReadable as error:
        raise ValueError(f"{field}.source {source.source} {error}") from None


def _check_rows(field: str, source: SourceSection, recipe: Recipe, skipped: Skipped) -> int:
    """How many rows there are; those that may be left out are kept in `skipped`.

    ValueError for one that cannot be used, and where none can.
    """
    if field == "data.task":
        rows = task_rows(recipe.data, skipped)
        _check_splits(rows, recipe.data)
    else:
        rows = ordered_rows(
            field, source, recipe.data.seed, pairs=field == "data.safety", skipped=skipped
        )
    return len(rows)


def _check_splits(rows: list[Row], data: DataSection) -> None:
    """ValueError where the task's rows cannot be split. What earlier sets hold of them is not known yet."""
    check_split(data, len(rows))
    # More rows than can be split can be split as well, and comparing all of a large file takes a minute.
    some = rows[: 4 * (data.test_samples + data.validation_samples + 1)]
    with contextlib.suppress(ValueError):
        split(data, Claims().free("data.task", some))
        return
    split(data, Claims().free("data.task", rows))
