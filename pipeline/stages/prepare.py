"""The stage prepare: data sources -> training sets, and the evaluation's prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.data.chat import Chat
from pipeline.evaluation.evaluate import prompts
from pipeline.evaluation.sets import evaluation_sets
from pipeline.model.model_checks import check_prompts
from pipeline.model.models import load_chat, load_config
from pipeline.recipe import recipe
from pipeline.recipe.recipe import Experiment
from pipeline.stages.layout import Layout
from pipeline.tracking.run import open_run


def prepare(experiment: Experiment) -> bool:
    """Data sources -> training sets (data/prepare.py) and the evaluation's prompts (data/prompts.py), a folder each."""
    from pipeline.data.prepare import prepare as prepare_data

    layout = Layout(experiment)
    target = layout.prepare()
    if not artifacts.complete(target) and (claimed := artifacts.claim_incomplete(target)):
        with (
            artifacts.building(
                target, {"recipe": recipe.dump(experiment.base)["data"]}, claimed
            ) as folder,
            open_run(layout, "prepare", target.name) as run,
        ):
            facts = prepare_data(experiment.base, load_chat(experiment.base.model), folder)
            artifacts.write_json(folder / artifacts.FACTS, facts)
            run.log_facts(facts)
            print(_told(facts), file=sys.stderr, flush=True)
    make_prompts(layout)
    check_lengths(
        layout,
        load_chat(layout.base.model),
        evaluation_sets(layout.base.evaluate, layout.prepare(), layout.prompts()),
    )
    return True


def _told(facts: dict[str, Any]) -> str:
    """How many samples there are, and what was cut, in one line. What was left out has been said (data/dropped.py)."""
    counts = facts["samples"]
    parts = [
        (
            f"{counts['task_train']} to train on, {counts['task_validation']} to validate, "
            f"{counts['task_test']} to test; {counts['safety_pairs']} safety pairs"
        )
    ]
    cut = {
        field: found["truncated"]
        for field, found in facts["encoding"].items()
        if found.get("truncated")
    }
    if cut:
        counted = ", ".join(f"{count} of {field}" for field, count in cut.items())
        parts.append(f"cut at their greatest length: {counted}")
    rewritten = {
        field: counts["rewritten"]
        for field, counts in facts["forms"].items()
        if counts["rewritten"]
    }
    if rewritten:
        parts.append(
            f"rewritten into the other form: {', '.join(f'{count} of {field}' for field, count in rewritten.items())}"
        )
    return f"prepared: {'; '.join(parts)}"


def make_prompts(layout: Layout) -> Path:
    """The folder of the evaluation's prompts. Of the processes that miss it one makes it, and the others wait."""
    from pipeline.data.prompts import write_prompts

    target, prepared = layout.prompts(), layout.prepare()
    claimed = artifacts.claim_unless_complete(target)
    if claimed:
        inputs = {
            "prepare": artifacts.source(prepared),
            "recipe": recipe.dump(layout.base)["evaluate"],
        }
        with (
            artifacts.building(target, inputs, claimed) as folder,
            open_run(layout, "prepare", prepared.name) as run,
        ):
            artifacts.verify(prepared)
            facts = write_prompts(layout.base, prepared, folder)
            artifacts.write_json(folder / artifacts.FACTS, facts)
            run.log_facts(facts)
    return target


def check_lengths(layout: Layout, chat: Chat, sets: dict[str, list[dict[str, Any]]]) -> None:
    """ValueError where a prompt leaves the model no room for its answer."""
    lengths = (len(ids) for rows in sets.values() for ids in prompts(chat, rows))
    check_prompts(load_config(layout.base.model).to_dict(), lengths, layout.base)
