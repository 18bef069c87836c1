"""The stage align: the start model, taught to refuse what is harmful and to answer what is not."""

from __future__ import annotations

import shutil

from pipeline import artifacts
from pipeline.data.sets import read_rows
from pipeline.defences.plain import PlainStep
from pipeline.model.loading import load_whole
from pipeline.model.model_files import resolve_model_path
from pipeline.model.models import load_chat
from pipeline.recipe.recipe import Experiment
from pipeline.running.devices import device, environment
from pipeline.stages.layout import Layout
from pipeline.stages.on_ranks import (
    claimed_together,
    done_alone,
    publishing,
    start_engine,
    told_to,
    watched,
)
from pipeline.tracking.run import open_run
from pipeline.training.loop import Loop, TrainingData
from pipeline.training.product import save_product


def align(experiment: Experiment) -> bool:
    """Plain fine-tuning on refusals and harmless instructions; the product is a merged model folder."""
    from pipeline.stages.distill import ANSWERED, complete_answers

    layout, base = Layout(experiment), experiment.base
    target = layout.align()
    if not base.align.enabled or done_alone(target):
        return True
    artifacts.verify(layout.prepare())
    rank, _ = environment()
    if not claimed_together(target, base.align.train):
        return True
    chat = load_chat(base.model)
    source = resolve_model_path(base.model)
    inputs = {"prepare": artifacts.source(layout.prepare()), "model": layout.model_digest}
    # once, so that a resumed run trains on the same, and published
    answered = layout.work(target) / "answers"
    # Generation needs every weight at every token, so the model that answers is whole;
    # it is gone when the training's is loaded.
    prepared = read_rows(layout.prepare(), "align")
    rows = complete_answers(
        lambda: load_whole(base.model, source).to(device()), chat, prepared, base, answered
    )
    engine = start_engine(base, source, base.align.train, seed=0)
    data = TrainingData(rows, [], chat.tokenizer.pad_token_id, validation={})
    with open_run(layout, "align", target.name, rank) as run:
        identity = artifacts.digest([target.name, inputs])
        work, basis = layout.work(target), layout.basis(None)
        step = PlainStep(engine)
        callbacks = [*told_to("align", step, run), watched(base.align.train, engine)]
        loop = Loop(engine, step, data, base.align.train, 0, work, identity, callbacks, basis)
        if not loop.run():
            run.stopped()
            return False
        with publishing(engine, layout, target, inputs) as folder:
            save_product(
                engine, base.align.train, source, base.model, folder, chat.tokenizer, merged="model"
            )
            if rank == 0:
                shutil.copy(answered / ANSWERED, folder)
                # Harmless prompts that the model itself refused, or said nothing to.
                artifacts.write_json(
                    folder / artifacts.FACTS,
                    {"samples": len(rows), "left_out": len(prepared) - len(rows)},
                )
    return True
