"""Everything that can be known to be wrong before any weight is read: what `sap` and the launch scripts look at first.

    facts, notes = checks.check(experiment, cell)      # of a recipe, its data sources, its model's files
    checks.check_upstream(experiment, STAGES["train"], cell)   # of the stages before

Needs no torch where the model's files are on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

from pipeline import artifacts
from pipeline.data import check as data_check
from pipeline.defences import DEFENCES
from pipeline.engines.ds_config import check_engine
from pipeline.model.model_checks import check_lora, check_model, check_positions
from pipeline.model.model_facts import ModelFacts
from pipeline.model.model_outline import facts_of, of_modules, outlined
from pipeline.model.packable import check_packing
from pipeline.model.tokenizer_facts import check_loads
from pipeline.objectives.sharing import check_shares, fillers
from pipeline.recipe.recipe import Cell, Experiment, Recipe
from pipeline.recipe.sections import TrainSection
from pipeline.running import devices
from pipeline.stages.layout import Layout
from pipeline.stages.stage import Stage
from pipeline.system.system_errors import reading_input
from pipeline.training.checkpoint_folders import checkpoints, start_checkpoint

# torch's version from which fully_shard takes frozen weights that are no floating point
_SHARDS_INTEGERS = (2, 12)


@dataclass(frozen=True)
class Checked:
    """What was found on the way: the model's outline, and sentences that are no errors.

    facts: None where the model is not on this machine, and was not fetched. rows: usable ones of data.task; None where
    its source was not read.
    """

    facts: ModelFacts | None
    notes: tuple[str, ...]
    rows: int | None = None


@reading_input()
def check(
    experiment: Experiment,
    here: Cell | Literal["align"] | None = None,
    light: bool = False,
    starts: bool = True,
) -> Checked:
    """Everything that can be known to be wrong before any weight is read. Raises ValueError, one sentence.

    here: what this process runs, under its launcher's world size: checked are the model, the data and that. Without it,
    every cell of the recipe on this machine's devices; methods left out by `sap --methods` must not stop the others.
    light: fetch nothing and do without torch; what the model lacks here is a note, and its weights are held against its
    config by the sizes that the config names only. starts: whether ranks are to be started here; `sap prepare` may run
    on a node that has fewer GPUs than the training's.
    """
    base = experiment.base
    if here is not None or starts:
        devices.check_attention(base.model)
    artifacts.check_writable(base.output_dir / base.name, "output_dir")
    notes, rows = data_check.look(base)
    facts = _files(base, notes) if light else _modules(base)
    trainings = _trainings(experiment, here)
    for field, train, cell in trainings:
        ranks = devices.ranks(train) if here is None else devices.environment()[1]
        if here is None and starts:
            devices.check_ranks(field, train)
        check_training(field, train, base, facts, ranks)
        check_start(field, train, experiment, cell)
        if train.packing and (attention := devices.attention(base.model)) != devices.FLASH:
            notes.append(
                f"{field}.packing: attention {attention} works through a packed row whole; "
                "FlashAttention (docs/performance.md) does not"
            )
        if cell is not None:
            notes += _check_cell(cell, base, facts, ranks)
    return Checked(facts, tuple(dict.fromkeys(notes)), rows)


def _files(base: Recipe, notes: list[str]) -> ModelFacts | None:
    """The model by its files; None, and a note, where they are not here."""
    facts = check_model(base)
    if facts is None:
        notes.append(
            f"model.path {base.model.path} is not on this machine yet: what depends on it is checked once it is fetched"
        )
        return None
    check_loads(facts.label, facts.folder)
    return facts if facts.layers else outlined(base.model)


def _modules(base: Recipe) -> ModelFacts:
    """The model by its files, held against the modules that transformers builds;
    fetched where it is not here (a hub model: its config).
    """
    from pipeline.model.models import check_attention, check_weights, load_tokenizer, outline

    here = check_model(base)
    if here is not None:
        check_loads(here.label, here.folder)
    # first: load_tokenizer would take a broken config for a broken tokenizer
    model = outline(base.model)
    check_attention(model, base.model)
    load_tokenizer(base.model)
    facts = check_model(base)  # once more: the built-in model was fetched
    if facts is None:
        # the config is here now, the rest comes with the weights
        check_positions(model.config.to_dict(), base)
    else:
        check_weights(model, facts.tensors, facts.label)
    return facts if facts is not None and facts.layers else facts_of(model, base.model.path)


def _trainings(
    experiment: Experiment, here: Cell | Literal["align"] | None
) -> list[tuple[str, TrainSection, Cell | None]]:
    """(field, section, cell) of what is to be checked; the alignment has no cell."""
    align = (
        [("align.train", experiment.base.align.train, None)]
        if experiment.base.align.enabled
        else []
    )
    cells = list(experiment.cells()) if here is None else [] if here == "align" else [here]
    return [*align, *(("train", cell.recipe.train, cell) for cell in cells)]


def _check_cell(cell: Cell, base: Recipe, facts: ModelFacts | None, ranks: int) -> list[str]:
    """ValueError where a method does not go with the model or the data; sentences about what it does on these ranks."""
    resolved, notes = cell.recipe, []
    for name in resolved.parts:
        defence, section = DEFENCES[name], getattr(resolved, name)
        if facts is not None:
            defence.fits(section, len(facts.layers))
        notes += defence.notes(section, resolved, ranks)
    train, pairs = resolved.train, resolved.safety_pairs
    if train.steps is not None and train.warmup_steps >= train.steps:
        notes.append(
            f"train.warmup_steps {train.warmup_steps} is not over within {train.steps} steps, so "
            "train.lr is never reached"
        )
    notes = [f"method {cell.method}: {note}" for note in notes]
    note = (
        fillers("safety_pairs.batch_size", pairs.batch_size, pairs.micro_batch_size, ranks)
        if resolved.draws_pairs
        else None
    )
    return [*notes, note] if note else notes


def check_start(field: str, train: TrainSection, experiment: Experiment, cell: Cell | None) -> None:
    """ValueError where the training is to start from a checkpoint that is not there or does not fit.

    Once it has its own, that may go.
    """
    if train.resume_from is None:
        return
    layout = Layout(experiment)
    target = layout.align() if cell is None else layout.train(cell)
    if artifacts.complete(target) or checkpoints(layout.work(target) / "checkpoints"):
        return
    try:
        start_checkpoint(train.resume_from, layout.basis(cell), train.steps, ("state.json",))
    except ValueError as error:
        raise ValueError(f"{field}.{error}") from None


def check_upstream(experiment: Experiment, stage: Stage, cell: Cell | None = None) -> None:
    """ValueError where a folder that the stage reads is not complete (its files are verified when they are read)."""
    layout = Layout(experiment)
    if "prepare" in stage.needs:
        artifacts.require(layout.prepare())
    if "align" in stage.needs and experiment.base.align.enabled:
        artifacts.require(layout.align())
    for name, folder in layout.read_by(cell).items() if cell is not None else ():
        if name in stage.needs:
            artifacts.require(folder)
            if name == "filter":
                from pipeline.defences.saft.filter import check_not_refused

                check_not_refused(folder)


def check_training(
    field: str, train: TrainSection, base: Recipe, facts: ModelFacts | None, ranks: int
) -> None:
    """ValueError where a training section does not go with the model, its quantization or the number of ranks.

    facts: None where not known.
    """
    check_engine(field, train, ranks)
    check_shares(f"{field}.batch_size", train.batch_size, ranks)
    if base.model.quantization == "nf4":
        if train.adapter == "full":
            raise ValueError(
                f"{field}.adapter full cannot train weights in 4 bits: set model.quantization to "
                f"none, or {field}.adapter to lora"
            )
        if not shards_4_bit(train.engine):
            raise ValueError(
                f"{field}.engine fsdp2 cannot shard 4-bit weights with torch {version('torch')}: "
                f"install torch {'.'.join(map(str, _SHARDS_INTEGERS))} or newer, or set "
                f"{field}.engine to zero3"
            )
        if facts is not None:
            check_quantisable(facts)
    if facts is not None:
        check_packing(facts.config, field, train, base.data.max_length, facts.label)
    if train.adapter == "lora":
        _check_lora(field, train, base, facts)
    elif train.engine == "single" and devices.dtype(base.model.dtype) != "float32":
        raise ValueError(
            f"{field}.adapter full with engine single has no float32 master for "
            f"{devices.dtype(base.model.dtype)} weights: set model.dtype to float32, or use "
            "engine zero3 or fsdp2"
        )


def shards_4_bit(engine: str) -> bool:
    """Whether the engine takes 4-bit weights with the torch that is installed."""
    return (
        engine != "fsdp2"
        or tuple(int(part) for part in version("torch").split(".")[:2]) >= _SHARDS_INTEGERS
    )


def check_quantisable(facts: ModelFacts) -> None:
    """ValueError for a model whose weights nf4 would not reach, or that are quantised already."""
    if facts.config.get("quantization_config") is not None:
        raise ValueError(
            f"model.quantization nf4 needs unquantised weights, but those of {facts.label} are "
            "quantised: give the original model"
        )
    expert = next((name for name in facts.tensors if ".experts." in name), None)
    if expert:  # files may hold them one by one: transformers stacks them while it loads
        raise ValueError(
            f"model.quantization nf4 reaches linear layers only, and {facts.label} keeps experts "
            f"in one tensor ({expert}): set it to none"
        )


def _check_lora(field: str, train: TrainSection, base: Recipe, facts: ModelFacts | None) -> None:
    if facts is None:
        return
    try:
        check_lora(facts, train, field)
    except ValueError:
        # files may name weights otherwise than the modules: ask those before refusing
        check_lora(of_modules(base.model), train, field)
