"""The stages: what each reads, what it writes. Every function returns True when its folder is complete afterwards.

    prepare -> [align] -> [filter] -> direction -> train -> evaluate -> report

Present and complete: return at once (docs/stages.md says what a change of the recipe runs again). Interrupted: nothing
half-written is ever read. Upstream folders are verified by manifest.
The functions for align, filter, direction and train are entered by all ranks together.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import artifacts
from pipeline.data.chat import Chat
from pipeline.data.sets import read_rows
from pipeline.defences.callback import Callback
from pipeline.defences.making import make_callbacks, make_step
from pipeline.defences.plain import PlainStep
from pipeline.defences.saft.embeddings import embed
from pipeline.defences.saft.filter import check_labels, decide, highest_scored, kept
from pipeline.defences.saft.filter import write as write_decision
from pipeline.defences.sap.diagnostics import safety_direction
from pipeline.defences.step import Step
from pipeline.engines import engine as engines
from pipeline.engines.engine import Engine
from pipeline.engines.exchange import from_first
from pipeline.engines.open import init_distributed, largest_of_ranks, open_engine
from pipeline.evaluation.evaluate import Measured, conclude, measure, prompts
from pipeline.evaluation.sets import evaluation_sets
from pipeline.evaluation.shards import WHOLE, Shard
from pipeline.generation.placement import place
from pipeline.model.loading import load_whole, open_model
from pipeline.model.model_checks import check_model, check_prompts
from pipeline.model.model_files import resolve_model_path
from pipeline.model.models import decoder_layers, load_chat, load_config, load_tokenizer, make_trainable
from pipeline.model.weights import WeightFiles
from pipeline.objectives.batches import micro_batches, pair_batches
from pipeline.recipe import recipe
from pipeline.recipe.layer_choice import read_layer
from pipeline.recipe.recipe import Cell, Experiment, Recipe
from pipeline.recipe.sections import TrainSection
from pipeline.running.devices import device, environment
from pipeline.stages.capacity import recomputed_layers
from pipeline.stages.layout import Layout, Subject
from pipeline.system.system_errors import naming
from pipeline.tracking.run import Run, open_run
from pipeline.training.callbacks import Console, Tracked, Watched
from pipeline.training.checkpoint import ORIGIN
from pipeline.training.loop import Loop, TrainingData
from pipeline.training.product import load_adapter, save_gathered, save_product

_USEFUL_FOR_SUMMARY = 24  # samples behind the direction's cosine with the useful gradient


def prepare(experiment: Experiment) -> bool:
    """Data sources -> training sets (data/prepare.py) and the evaluation's prompts (data/prompts.py), a folder each."""
    from pipeline.data.prepare import prepare as prepare_data

    layout = Layout(experiment)
    target = layout.prepare()
    if not artifacts.complete(target) and (claimed := artifacts.claim_incomplete(target)):
        with (
            artifacts.building(target, {"recipe": recipe.dump(experiment.base)["data"]}, claimed) as folder,
            open_run(layout, "prepare", target.name) as run,
        ):
            facts = prepare_data(experiment.base, load_chat(experiment.base.model), folder)
            artifacts.write_json(folder / artifacts.FACTS, facts)
            run.log_facts(facts)
            print(_told(facts), file=sys.stderr, flush=True)
    _prompts(layout)
    _check_lengths(layout, load_chat(layout.base.model), evaluation_sets(layout.base.evaluate, layout.prepare(), layout.prompts()))
    return True


def _told(facts: dict[str, Any]) -> str:
    """How many samples there are, and what was cut, in one line. What was left out has been said (data/dropped.py)."""
    counts = facts["samples"]
    parts = [f"{counts['task_train']} to train on, {counts['task_validation']} to validate, {counts['task_test']} to test; {counts['safety_pairs']} safety pairs"]
    cut = {field: found["truncated"] for field, found in facts["encoding"].items() if found.get("truncated")}
    if cut:
        counted = ", ".join(f"{count} of {field}" for field, count in cut.items())
        parts.append(f"cut at their greatest length: {counted}")
    rewritten = {field: counts["rewritten"] for field, counts in facts["forms"].items() if counts["rewritten"]}
    if rewritten:
        parts.append(f"rewritten into the other form: {', '.join(f'{count} of {field}' for field, count in rewritten.items())}")
    return f"prepared: {'; '.join(parts)}"


def _prompts(layout: Layout) -> Path:
    """The folder of the evaluation's prompts. Of the processes that miss it one makes it, and the others wait."""
    from pipeline.data.prompts import write_prompts

    target, prepared = layout.prompts(), layout.prepare()
    claimed = artifacts.claim_unless_complete(target)
    if claimed:
        inputs = {"prepare": artifacts.source(prepared), "recipe": recipe.dump(layout.base)["evaluate"]}
        with artifacts.building(target, inputs, claimed) as folder, open_run(layout, "prepare", prepared.name) as run:
            artifacts.verify(prepared)
            facts = write_prompts(layout.base, prepared, folder)
            artifacts.write_json(folder / artifacts.FACTS, facts)
            run.log_facts(facts)
    return target


def align(experiment: Experiment) -> bool:
    """Plain fine-tuning on refusals and harmless instructions; the product is a merged model folder."""
    from pipeline.stages.distill import ANSWERED, complete_answers

    layout, base = Layout(experiment), experiment.base
    target = layout.align()
    if not base.align.enabled or _done(target):
        return True
    artifacts.verify(layout.prepare())
    rank, _ = environment()
    if not _claimed(target, base.align.train):
        return True
    chat = load_chat(base.model)
    source = resolve_model_path(base.model)
    inputs = {"prepare": artifacts.source(layout.prepare()), "model": layout.model_digest}
    answered = layout.work(target) / "answers"  # once, so that a resumed run trains on the same, and published
    # Generation needs every weight at every token, so the model that answers is whole; it is gone when the training's is loaded.
    prepared = read_rows(layout.prepare(), "align")
    rows = complete_answers(lambda: load_whole(base.model, source).to(device()), chat, prepared, base, answered)
    engine = start_engine(base, source, base.align.train, seed=0)
    data = TrainingData(rows, [], chat.tokenizer.pad_token_id, validation={})
    with open_run(layout, "align", target.name, rank) as run:
        identity = artifacts.digest([target.name, inputs])
        work, basis = layout.work(target), layout.basis(None)
        step = PlainStep(engine)
        callbacks = [*_told_to("align", step, run), _watched(base.align.train, engine)]
        loop = Loop(engine, step, data, base.align.train, 0, work, identity, callbacks, basis)
        if not loop.run():
            run.stopped()
            return False
        with _publishing(engine, layout, target, inputs) as folder:
            save_product(engine, base.align.train, source, base.model, folder, chat.tokenizer, merged="model")
            if rank == 0:
                shutil.copy(answered / ANSWERED, folder)
                # Harmless prompts that the model itself refused, or said nothing to.
                artifacts.write_json(folder / artifacts.FACTS, {"samples": len(rows), "left_out": len(prepared) - len(rows)})
    return True


def filter_data(experiment: Experiment, cell: Cell) -> bool:
    """SAFT: which training samples to leave out, by the start model's hidden states. Where it refuses, it says so; training on it is an error."""
    layout, saft = Layout(experiment), cell.recipe.saft
    target = layout.filter(cell)
    if _done(target):
        return True
    _verify_upstream(layout)
    rows = read_rows(layout.prepare(), "task_train")
    check_labels(rows, saft)
    embeddings = _embeddings(layout, cell, rows)
    if environment()[0] == 0 and (claimed := artifacts.claim_incomplete(target)):
        decision = decide(rows, embeddings, saft, experiment.base.data.seed)
        with open_run(layout, "filter", target.name) as run:
            inputs = {"prepare": artifacts.source(layout.prepare()), "embeddings": artifacts.source(layout.embeddings(cell))}
            with artifacts.building(target, inputs, claimed) as folder:
                write_decision(decision, rows, folder)
            run.log_facts(decision.facts)
            run.log_artifact(target / "scores.png")
        for sentence in decision.warnings:
            print(f"warning: {sentence} (every score is in {target}, with a picture)", file=sys.stderr, flush=True)
        for line in highest_scored(decision):
            print(line, file=sys.stderr, flush=True)
    return True


def _embeddings(layout: Layout, cell: Cell, rows: list[dict[str, Any]]) -> torch.Tensor:
    """The rows' embeddings (N, D), from their folder, or computed into it."""
    target, saft = layout.embeddings(cell), cell.recipe.saft
    if _claimed(target, cell.recipe.train):
        engine, tokenizer = _open_start(layout, cell, target)
        layer = read_layer(saft.layer, len(decoder_layers(engine.module)))
        found = embed(engine, rows, layer, saft.position, saft.micro_batch_size, tokenizer.pad_token_id)
        with _publishing(engine, layout, target, _inputs(layout)) as folder:
            if engine.rank == 0:
                save_file({"embeddings": found}, folder / "embeddings.safetensors")
    else:
        artifacts.verify(target)
    with naming(target):
        return load_file(target / "embeddings.safetensors")["embeddings"]


def direction(experiment: Experiment, cell: Cell) -> bool:
    """g_s over all contrastive pairs at the initial weights, and its per-layer summary; with the initial adapter, where one is trained."""
    layout = Layout(experiment)
    target = layout.direction(cell)
    if _done(target):
        return True
    _verify_upstream(layout)
    resolved = cell.recipe
    if not _claimed(target, resolved.train):
        return True
    engine, tokenizer = _open_start(layout, cell, target)
    pairs, useful = read_rows(layout.prepare(), "safety_pairs"), read_rows(layout.prepare(), "task_train")[:_USEFUL_FOR_SUMMARY]
    sharing = (engine.rank, engine.world_size, tokenizer.pad_token_id, cell.seed, 0)
    size = resolved.direction.micro_batch_size
    # Halves of the pairs, not of this rank's batches: they must not depend on the number of ranks.
    halves = [pair_batches(pairs, list(range(start, len(pairs), 2)), size, *sharing) for start in (0, 1)]
    first, second = ([replace(batch, global_pairs=len(pairs)) for batch in half] for half in halves)
    rows, cut = list(range(len(useful))), resolved.train
    most = -(-cut.batch_size // engine.world_size)
    how = (cut.tokens_per_micro_batch, most, cut.packing)
    useful_batches = micro_batches(useful, rows, cut.micro_batch_size, *sharing, *how)
    with open_run(layout, f"direction-s{cell.seed}", target.name, engine.rank) as run:
        _say(engine, f"[direction s{cell.seed}] {len(pairs)} pairs, {len(useful)} task samples")
        vector, summary = safety_direction(engine, (first, second), useful_batches, resolved.sap.contrastive)
        summary["weights_checksum"] = engine.checksum(engine.weights())
        vectors = {"direction": vector} | ({"adapter": engine.weights()} if resolved.train.adapter == "lora" else {})
        with _publishing(engine, layout, target, _inputs(layout)) as folder:
            for name, shard in vectors.items():
                save_gathered(engine, engine.gathered(shard), folder, name)
            if engine.rank == 0:
                artifacts.write_json(folder / "summary.json", summary)
        run.log_facts({key: value for key, value in summary.items() if key not in ("layers", "weights_checksum")})
    return True


def train(experiment: Experiment, cell: Cell) -> bool:
    """Fine-tune one cell; the product is a PEFT adapter, or a model folder. False when a stop was requested first (run it again to go on)."""
    layout = Layout(experiment)
    target = layout.train(cell)
    if _done(target):
        return True
    _verify_upstream(layout)
    read = layout.read_by(cell)
    for folder in read.values():
        artifacts.verify(folder)
    resolved, prepared = cell.recipe, layout.prepare()
    inputs = _inputs(layout, *read.values())
    rows = read_rows(prepared, "task_train", kept(read["filter"]) if "filter" in read else None)
    if not _claimed(target, resolved.train):
        return True
    engine, tokenizer = _open_start(layout, cell, target)
    step = make_step(resolved, engine, _given_direction(read["direction"], engine) if "direction" in read else None)
    data = TrainingData(
        rows, read_rows(prepared, "safety_pairs"), tokenizer.pad_token_id,
        resolved.safety_pairs.batch_size, resolved.safety_pairs.micro_batch_size, _validation_rows(prepared),
    )  # fmt: skip
    label = f"{cell.method} s{cell.seed}"
    with open_run(layout, f"{cell.method}-s{cell.seed}", target.name, engine.rank, cell) as run:
        # Its checkpoints are another run's where what it was made from has become another: the start model, aligned again on a GPU.
        identity = artifacts.digest([target.name, inputs])
        work, basis = layout.work(target), layout.basis(cell) | {"the start model's content": inputs.get("align", inputs["model"])}
        callbacks = [*make_callbacks(resolved, engine), *_told_to(label, step, run), _watched(resolved.train, engine)]
        loop = Loop(engine, step, data, resolved.train, cell.seed, work, identity, callbacks, basis)
        if not loop.run():
            run.stopped()
            return False
        with loop.counted_weights(), _publishing(engine, layout, target, inputs) as folder:
            save_product(engine, resolved.train, layout.start_model(), resolved.model, folder, tokenizer)
            if engine.rank == 0:
                artifacts.write_json(folder / "recipe.json", recipe.dump(resolved))
    return True


def evaluate(experiment: Experiment, subject: Subject, shard: Shard = WHOLE) -> bool:
    """Answers to harmful, harmless, ordinary and task prompts, also under attacks; refusals, exact match, test loss. One process.

    shard: do this share of the prompts only. Whoever then finds all shares done merges them, so True says that the share is done, not that the
    evaluation is complete. ValueError where there are more shards than harmful prompts.
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


def _check_evaluation(layout: Layout, subject: Subject, shard: Shard) -> tuple[Any, dict[str, list[dict[str, Any]]]]:
    """Chat and sets of the evaluation. ValueError for all that can be known to be wrong before a weight is read."""
    check_model(layout.base)
    _verify_upstream(layout)
    if subject.trained is not None:
        artifacts.verify(subject.trained)
    artifacts.verify(_prompts(layout))
    sets = evaluation_sets(layout.base.evaluate, layout.prepare(), layout.prompts())
    shard.check(len(sets["harmful"]))
    chat = load_chat(layout.base.model)
    _check_lengths(layout, chat, sets)
    return chat, sets


def _check_lengths(layout: Layout, chat: Chat, sets: dict[str, list[dict[str, Any]]]) -> None:
    """ValueError where a prompt leaves the model no room for its answer."""
    lengths = (len(ids) for rows in sets.values() for ids in prompts(chat, rows))
    check_prompts(load_config(layout.base.model).to_dict(), lengths, layout.base)


def _measure(layout: Layout, subject: Subject, shard: Shard, chat: Chat, sets: dict[str, list[dict[str, Any]]]) -> Measured:
    """Load the subject and let it answer the shard's rows of the sets."""
    base = layout.base
    model: nn.Module = load_whole(base.model, subject.model)  # quantised as in training
    if subject.adapter is not None:
        model = load_adapter(model, subject.adapter)
    label = _run_name(subject) if shard.count == 1 else f"{_run_name(subject)} {shard}"
    return measure(place(model), chat, shard.of(sets), base.evaluate, label)


def _merge(layout: Layout, subject: Subject, count: int) -> None:
    """Make the evaluation of its `count` shards where all are complete, unless another process is at it; the work folder goes."""
    target = layout.evaluate(subject)
    work, parts = layout.work(target), [layout.shard(target, index, count) for index in range(count)]
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
    cell = None if subject.trained is None else layout.experiment.cell(subject.name, subject.seed or 0)
    key = target.name if subject.trained is None else subject.trained.name  # a cell's scores stand beside its parameters
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


def _validation_rows(prepared: Path) -> dict[str, list[dict[str, Any]]]:
    sets = {"task": "task_validation", "harmful": "harmful_validation"}
    return {name: read_rows(prepared, file) for name, file in sets.items() if (prepared / f"{file}.parquet").is_file()}


def _inputs(layout: Layout, *folders: Path) -> dict[str, Any]:
    """What a training stage records of what it was made from: the prepared data, the start model, and these folders."""
    read = [layout.prepare(), *([layout.align()] if layout.base.align.enabled else []), *folders]
    return {folder.name.split("-")[0]: artifacts.source(folder) for folder in read} | {"model": layout.model_digest}


def _of_subject(layout: Layout, subject: Subject) -> dict[str, Any]:
    """The same of an evaluation, and of its shards."""
    read = [layout.prepare(), layout.prompts(), *([] if subject.trained is None else [subject.trained])]
    return {"subject": subject.identity} | {folder.name.split("-")[0]: artifacts.source(folder) for folder in read}


def _verify_upstream(layout: Layout) -> None:
    artifacts.verify(layout.prepare())
    if layout.base.align.enabled:
        artifacts.verify(layout.align())


def _done(target: Path) -> bool:
    """Whether a process alone finds it complete. Ranks decide together (`_claimed`): on two nodes a shared folder may look different for a while."""
    return environment()[1] == 1 and artifacts.complete(target)


def _claimed(target: Path, train_section: TrainSection) -> bool:
    """Let the ranks meet, and hold `target` until this process ends. False where it is complete by now: another run was faster.

    All ranks raise Busy where another run holds it.
    """
    init_distributed(train_section)
    found: str | bool = True
    if environment()[0] == 0:
        try:
            release = artifacts.claim_incomplete(target)
            found = release is not None
            if release is not None:
                atexit.register(release)
        except artifacts.Busy as error:
            found = str(error)
    found = from_first(found)
    if isinstance(found, str):
        raise artifacts.Busy(found)
    return found


def _open_start(layout: Layout, cell: Cell, target: Path) -> tuple[Engine, Any]:
    """Engine and tokenizer of a cell at its start: the same weights (and fresh adapter) for every method of a seed."""
    base, train_section = layout.base, cell.recipe.train
    tokenizer = load_tokenizer(base.model)
    if target != layout.train(cell) and train_section.gradient_checkpointing == "auto":
        # Other passes than the training's, which are what is planned: their pairs may be longer, or more.
        train_section = train_section.model_copy(update={"gradient_checkpointing": True})
    return start_engine(base, layout.start_model(), train_section, cell.seed, cell.recipe), tokenizer


def start_engine(base: Recipe, location: str, train_section: TrainSection, seed: int, of_cell: Recipe | None = None) -> Engine:
    """The engine of a training that starts from the model at `location`; adapter and dropout are drawn from `seed`.

    of_cell: whose memory is planned; None for the alignment's. Entered by all ranks together.
    """
    again = recomputed_layers(base, train_section, of_cell, environment()[1])
    again = None if again is None else largest_of_ranks(again)
    if again is not None and environment()[0] == 0:
        print(f"{again} decoder layers recompute their activations (gradient_checkpointing auto)", file=sys.stderr, flush=True)
    model, sources = open_model(base.model, location, sharded=train_section.engine != "single")
    return open_engine(make_trainable(model, train_section, seed, again), train_section, sources)


def _given_direction(folder: Path, engine: Engine) -> engines.Shard:
    """The direction stage's product as the engine's shard."""
    if json.loads((folder / "summary.json").read_text())["weights_checksum"] != engine.checksum(engine.weights()):
        raise ValueError(f"the direction in {folder} belongs to other initial weights: delete the folder and run its stage again")
    return engine.shard(WeightFiles(folder, "direction"))


def _told_to(label: str, step: Step, run: Run) -> list[Callback]:
    return [Console(label, step.summary_keys), Tracked(run)]


def _watched(train_section: TrainSection, engine: Engine) -> Callback:
    return Watched(train_section.watchdog_seconds, engine.rank)


@contextlib.contextmanager
def _publishing(engine: Engine, layout: Layout, target: Path, inputs: dict[str, Any]) -> Iterator[Path]:
    """artifacts.building for a stage of several ranks: all enter and leave together, rank 0 publishes and clears the work folder."""
    folder, work = target.with_name(f".{target.name}.tmp"), layout.work(target)
    try:
        with naming(target):
            if engine.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            engine.barrier()
            yield folder
            engine.barrier()
            if engine.rank == 0:
                if (work / "metrics.jsonl").is_file():
                    shutil.copy(work / "metrics.jsonl", folder)
                origin = work / ORIGIN
                started = {"resume_from": json.loads(origin.read_text())} if origin.is_file() else {}
                artifacts.publish(folder, target, inputs | started, world_size=engine.world_size)
                shutil.rmtree(work, ignore_errors=True)
            engine.barrier()
    except OSError:
        if engine.rank == 0:  # gigabytes, perhaps on a full disk; after any other error the next attempt removes it
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _say(engine: Engine, text: str) -> None:
    if engine.rank == 0:
        print(text, file=sys.stderr, flush=True)
