"""The stage evaluate: answers, judgements and losses of one subject, whole or in shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

from torch import nn

from pipeline import artifacts
from pipeline.data.chat import Chat
from pipeline.evaluation.evaluate import Measured, conclude, measure
from pipeline.evaluation.sets import evaluation_sets
from pipeline.evaluation.shards import WHOLE, PromptSlice
from pipeline.generation.placement import place
from pipeline.model.loading import load_whole
from pipeline.model.model_checks import check_model
from pipeline.model.models import load_chat
from pipeline.recipe.recipe import Experiment
from pipeline.running import lean_imports
from pipeline.stages.layout import Layout, Subject
from pipeline.stages.on_ranks import verify_upstream
from pipeline.stages.prepare import check_lengths, make_prompts
from pipeline.tracking.run import open_run
from pipeline.training.product import load_adapter


def evaluate(experiment: Experiment, subject: Subject, shard: PromptSlice = WHOLE) -> bool:
    """Answers to harmful, harmless, ordinary and task prompts, also under attacks; refusals, exact match, test loss.

    One process.

    shard: do this share of the prompts only. Whoever then finds all shares done merges them, so True says that the
    share is done, not that the evaluation is complete. ValueError where there are more shards than harmful prompts.
    """
    layout = Layout(experiment)
    target = layout.evaluate(subject)
    if artifacts.complete(target):
        return True
    if shard.count == 1:
        checked = _check_evaluation(layout, subject, shard)
        _conclude(layout, subject, lambda: [_measure(layout, subject, shard, *checked)])
        return True
    part = layout.shard(target, shard.index, shard.count)
    if not artifacts.complete(part):
        checked = _check_evaluation(layout, subject, shard)
        claimed = artifacts.claim_incomplete(part)
        if claimed is None:
            return True
        with artifacts.building(part, _of_subject(layout, subject), claimed) as folder:
            _measure(layout, subject, shard, *checked).write(folder)
    _merge(layout, subject, shard.count)
    return True


def _check_evaluation(
    layout: Layout, subject: Subject, shard: PromptSlice
) -> tuple[Any, dict[str, list[dict[str, Any]]]]:
    """Chat and sets of the evaluation. ValueError for all that can be known to be wrong before a weight is read."""
    check_model(layout.base)
    verify_upstream(layout)
    if subject.trained is not None:
        artifacts.verify(subject.trained)
    artifacts.verify(make_prompts(layout))
    sets = evaluation_sets(layout.base.evaluate, layout.prepare(), layout.prompts())
    shard.check(len(sets["harmful"]))
    chat = load_chat(layout.base.model)
    check_lengths(layout, chat, sets)
    return chat, sets


def _measure(
    layout: Layout,
    subject: Subject,
    shard: PromptSlice,
    chat: Chat,
    sets: dict[str, list[dict[str, Any]]],
) -> Measured:
    """Load the subject and let it answer the shard's rows of the sets."""
    base = layout.base
    if subject.adapter is not None:
        lean_imports.import_peft()  # what it lacks is said before weights are read
    model: nn.Module = load_whole(base.model, subject.model)  # quantised as in training
    if subject.adapter is not None:
        model = load_adapter(model, subject.adapter)
    label = _run_name(subject) if shard.count == 1 else f"{_run_name(subject)} {shard}"
    return measure(place(model), chat, shard.of(sets), base.evaluate, label)


def _merge(layout: Layout, subject: Subject, count: int) -> None:
    """Make the evaluation of its `count` shards where all are complete,
    unless another process is at it; the work folder goes.
    """
    target = layout.evaluate(subject)
    work, parts = (
        layout.work(target),
        [layout.shard(target, index, count) for index in range(count)],
    )
    # The target may be complete, and the other shards gone: merged while this process repeated a shard.
    if not artifacts.complete(target) and not all(map(artifacts.complete, parts)):
        return
    try:
        release = artifacts.claim(work)
    except artifacts.Busy:
        return  # several finished at once, and another one merges
    try:
        if not artifacts.complete(target):  # it may have been merged since we looked
            _conclude(layout, subject, lambda: [Measured.read(part) for part in parts])
        shutil.rmtree(work, ignore_errors=True)
    finally:
        release()


def _conclude(layout: Layout, subject: Subject, measured: Callable[[], list[Measured]]) -> None:
    """Publish the evaluation of what `measured` returns (its shards, or the one that is the whole), and log it."""
    target = layout.evaluate(subject)
    cell = (
        None if subject.trained is None else layout.experiment.cell(subject.name, subject.seed or 0)
    )
    # a cell's scores stand beside its parameters
    key = target.name if subject.trained is None else subject.trained.name
    claimed = artifacts.claim_incomplete(target)
    if claimed is None:
        return
    with open_run(layout, _run_name(subject), key, cell=cell) as run:
        with artifacts.building(target, _of_subject(layout, subject), claimed) as folder:
            metrics = conclude(measured(), folder)
        run.log_evaluation(metrics)
        if layout.base.tracking.log_answers:
            run.log_artifact(target / "answers.jsonl")


def _run_name(subject: Subject) -> str:
    return subject.name if subject.seed is None else f"{subject.name}-s{subject.seed}"


def _of_subject(layout: Layout, subject: Subject) -> dict[str, Any]:
    """The same of an evaluation, and of its shards."""
    read = [
        layout.prepare(),
        layout.prompts(),
        *([] if subject.trained is None else [subject.trained]),
    ]
    return {"subject": subject.identity} | {
        folder.name.split("-")[0]: artifacts.source(folder) for folder in read
    }
