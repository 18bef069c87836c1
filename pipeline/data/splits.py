"""The task's test, validation and training samples: rows that share a conversation stay together.

    splits = split(recipe.data, rows)                     # rows in the order in which they are drawn
    splits.test, splits.validation, splits.train

Rows with the same conversation up to the answer (overlap.py) are one group, and a group is never parted: many answers
to one prompt are all tested on, or all trained on. A conversation that longer ones begin with is trained on, for its
answer is one of theirs. Sizes are counted in rows. Groups come in the order of their first rows, and one that would be
too many is passed over. Where each is too many, the smallest is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.data.overlap import beginnings, conversation
from pipeline.recipe.sections import DataSection

Row = dict[str, Any]
Group = list[Row]


@dataclass(frozen=True)
class Splits:
    """Rows of each split, and a sentence for each that has more or fewer than was asked for."""

    test: list[Row]
    validation: list[Row]
    train: list[Row]
    notes: tuple[str, ...]


def check_split(data: DataSection, usable: int, what: str = "usable samples") -> None:
    """ValueError where the task's usable samples leave none for training."""
    if usable - data.validation_samples - data.test_samples < 1:
        raise ValueError(
            f"data.task: {data.task.source} has {usable} {what} and leaves none for training after "
            f"{data.test_samples} test and {data.validation_samples} validation samples: use more data, or lower "
            "data.test_samples and data.validation_samples"
        )


def split(data: DataSection, rows: list[Row]) -> Splits:
    """Rows, no two alike, in their order, into data.test_samples, data.validation_samples and the rest.

    Raises ValueError naming data.task where a split would have none.
    """
    groups: dict[bytes, Group] = {}
    for row in rows:
        groups.setdefault(conversation(row), []).append(row)
    begun = {key for row in rows for key in beginnings(row)}
    apart = [group for key, group in groups.items() if key not in begun]
    _check_groups(data, len(groups), len(apart))
    check_split(data, len(rows))
    trained = len(groups) - len(apart)
    test = _filled(apart, data.test_samples, leave=1 if trained else 2)
    taken = {id(group) for group in test}
    rest = [group for group in apart if id(group) not in taken]
    validation = _filled(rest, data.validation_samples, leave=0 if trained else 1)
    tested = [row for group in test for row in group]
    validated = [row for group in validation for row in group]
    found = {"test_samples": tested, "validation_samples": validated}
    held_out = {id(row) for split_rows in found.values() for row in split_rows}
    notes = (
        f"data.{field}: {len(split_rows)} instead of {getattr(data, field)}, for rows of one conversation stay "
        "together, and one that longer ones begin with is trained on"
        for field, split_rows in found.items()
        if len(split_rows) != getattr(data, field)
    )
    trained_on = [row for row in rows if id(row) not in held_out]
    return Splits(tested, validated, trained_on, tuple(notes))


def _check_groups(data: DataSection, groups: int, apart: int) -> None:
    """ValueError where the groups are too few for three splits."""
    needed = "data.test_samples, data.validation_samples and training need one each: use data of more prompts"
    if groups < 3:
        prompts = "1 different prompt" if groups == 1 else f"{groups} different prompts"
        raise ValueError(
            f"data.task: {data.task.source} has {prompts}, and all answers to one prompt stay in one split; {needed}"
        )
    if apart < 2:
        raise ValueError(
            f"data.task: {data.task.source} has {apart} conversations that are not the beginning of a longer one, "
            f"which is trained on; {needed}"
        )


def _filled(groups: list[Group], asked: int, leave: int) -> list[Group]:
    """Groups of `asked` rows at the most, or the smallest alone; `leave` of them are left."""
    taken: list[Group] = []
    room = asked
    for group in groups:
        if len(groups) - len(taken) <= leave or room == 0:
            break
        if len(group) <= room:
            taken.append(group)
            room -= len(group)
    return taken or [min(groups, key=len)]
