"""Where every stage writes: folders named by the hash of what decides their content.

    layout = Layout(experiment); layout.train(cell)   # runs/demo/train-sap-s0-1a2b3c4d

A stage's hash covers the fields of the recipe that decide its result and its upstream stages' hashes, so a changed
setting makes a new folder and everything below it, and a folder that is complete never has to be made again. Files
count by what is in them, not by where they are. What cannot change a result (ranks, file of DeepSpeed settings,
intervals of checkpoints, settings of what is switched off) is left out. docs/stages.md says for every field of the
recipe what runs again, and tests/unit/stages/test_stages_doc.py holds it against this module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.attacks.attacks import ATTACKS
from pipeline.data import builtin, contrastive, files, forms
from pipeline.data.digests import content_digest
from pipeline.data.fingerprint import fingerprint
from pipeline.data.sources import local_path
from pipeline.defences import DEFENCES
from pipeline.defences.saft import SAFT, keywords
from pipeline.defences.sap import SAP
from pipeline.judges import judges, refusal
from pipeline.model.model_files import model_location
from pipeline.recipe.file_endings import suffix
from pipeline.recipe.recipe import Cell, Experiment, Recipe, sources
from pipeline.recipe.sections import ModelSection, SourceSection, TrainSection
from pipeline.running import devices

_REPORT = 5  # raise when the page shows something new
_FORMAT = 7  # raise when prepared data, checkpoints or products change shape
# Of a training section, what changes no result: gradient checkpointing computes the same activations again, and what is
# gathered is the same however long it is kept.
_NEUTRAL = {
    "ranks",
    "ds_config",
    "save_every",
    "watchdog_seconds",
    "gradient_checkpointing",
    "keep_gathered",
}
_ALIGN_DATA = {"refusals", "refusal_samples", "harmless", "harmless_samples", "begun_share"}


@dataclass(frozen=True)
class Subject:
    """Something to evaluate: a model folder or hub id, with or without an adapter.

    trained: folder of the stage whose product it is.
    """

    name: str
    seed: int | None
    model: str
    adapter: Path | None
    identity: str
    trained: Path | None = None


class Layout:
    """Folders and hashes of one experiment."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.base = experiment, experiment.base
        self.root = self.base.output_dir / self.base.name
        # Once: files that change while a stage runs must not change where it writes.
        self._model = _model_identity(self.base.model)
        self._sources = _source_identities(self.base)

    @property
    def model_digest(self) -> str:
        """What the recipe's model is, by its content: hex."""
        return artifacts.digest(self._model)

    @functools.cached_property
    def _cells(self) -> list[Cell]:
        return list(self.experiment.cells())  # each is validated as it is made

    def prepare(self) -> Path:
        """Every set that is trained on, validated on, or tested on as a task; the stage prepare makes `prompts` too."""
        return self.root / f"prepare-{self._prepare_hash()}"

    def prompts(self) -> Path:
        """The evaluation's prompts: those of its sources that no set of `prepare` holds."""
        return self.root / f"prompts-{self._prompts_hash()}"

    def align(self) -> Path:
        """The aligned model's folder."""
        return self.root / f"align-{self._align_hash()}"

    def embeddings(self, cell: Cell) -> Path:
        """The training samples' embeddings: what is filtered by is not in the name,
        so another threshold reads them again.
        """
        return self.root / f"embeddings-{self._embeddings_hash(cell)}"

    def filter(self, cell: Cell) -> Path:
        """The folder of what a defence's filter leaves of the task, with its facts."""
        return self.root / f"filter-{self._filter_hash(cell)}"

    def direction(self, cell: Cell) -> Path:
        """The safety direction's folder."""
        return self.root / f"direction-s{cell.seed}-{self._direction_hash(cell)}"

    def train(self, cell: Cell) -> Path:
        """The folder of the cell's trained weights."""
        return self.root / f"train-{cell.method}-s{cell.seed}-{self.train_hash(cell)}"

    def work(self, target: Path) -> Path:
        """Where an unfinished stage keeps its checkpoints and metrics."""
        return target.with_name(f".{target.name}.work")

    def evaluate(self, subject: Subject) -> Path:
        """The folder of a subject's answers and measures."""
        seed = "" if subject.seed is None else f"-s{subject.seed}"
        evaluate = self.base.evaluate
        # in the prompts' hash
        elsewhere = {
            "harmful",
            "harmful_prompts",
            "harmless",
            "harmless_prompts",
            "ordinary",
            "ordinary_prompts",
            "forms",
        }
        without = elsewhere if evaluate.attacks else {*elsewhere, "attack_prompts"}
        section = evaluate.model_dump(mode="json", exclude={"batch_size", "baselines", *without})
        texts = [
            refusal.PATTERNS if evaluate.judge == "refusal" else judges.REFUSAL_SUBSTRINGS,
            *(asdict(ATTACKS[name]) for name in evaluate.attacks),
        ]
        digest = _short(
            [_FORMAT, subject.identity, self._prompts_hash(), section, artifacts.digest(texts)]
        )
        return self.root / f"evaluate-{subject.name}{seed}-{digest}"

    def shard(self, target: Path, index: int, count: int) -> Path:
        """Where one of `count` processes that share an evaluation leaves its part until all are merged."""
        return self.work(target) / f"shard-{index}-of-{count}"

    def report(self) -> Path:
        """The report's folder, named by the evaluations that it shows."""
        folders = [self.evaluate(subject).name for subject in self.subjects()]
        return self.root / f"report-{_short([_REPORT, folders])}"

    def start_model(self) -> str:
        """What every method starts from: the aligned model, or the recipe's own."""
        return (
            str(self.align() / "model")
            if self.base.align.enabled
            else model_location(self.base.model)
        )

    def needs_direction(self, cell: Cell) -> bool:
        """Whether the cell's training reads a direction that a stage makes."""
        return _made(cell, "direction")

    def needs_filter(self, cell: Cell) -> bool:
        """Whether the cell's training reads a filter that a stage makes."""
        return _made(cell, "filter")

    def of_defences(self, stage: str) -> bool:
        """Whether a stage is there for defences only."""
        return any(stage in defence.stages for defence in DEFENCES.values())

    def read_by(self, cell: Cell) -> dict[str, Path]:
        """Folders of the stages whose product a cell's training reads for its defences, by the stage's name."""
        names = (
            name
            for part in cell.recipe.parts
            for name in DEFENCES[part].reads(getattr(cell.recipe, part))
        )
        return {name: getattr(self, name)(cell) for name in dict.fromkeys(names)}

    def subjects(self) -> Iterator[Subject]:
        """Everything the report compares, in its order."""
        if self.base.evaluate.baselines:
            yield Subject(
                "shipped", None, model_location(self.base.model), None, _short(self._weights())
            )
            if self.base.align.enabled:
                yield Subject("aligned", None, self.start_model(), None, self._align_hash())
        for cell in self._cells:
            yield self.subject(cell)

    def subject(self, cell: Cell) -> Subject:
        """What is evaluated of a cell: its trained weights, on what they started from."""
        trained, full = self.train(cell), cell.recipe.train.adapter == "full"
        model, adapter = (
            (str(trained / "model"), None) if full else (self.start_model(), trained / "adapter")
        )
        return Subject(cell.method, cell.seed, model, adapter, self.train_hash(cell), trained)

    def train_hash(self, cell: Cell) -> str:
        """The hash of all that decides the cell's trained weights."""
        recipe = cell.recipe
        parts: list[Any] = [
            _FORMAT,
            self._start_hash(),
            self._prepare_hash(),
            cell.seed,
            _training(recipe.train),
        ]
        if recipe.draws_pairs:
            parts.append(_drawing(recipe))
        parts += [_hash_of(folder) for folder in self.read_by(cell).values()]
        # Named only where enabled: another defence's new field changes no folder.
        parts += [{name: decided} for name, decided in _decided(recipe).items()]
        return _short(parts)

    def basis(self, cell: Cell | None) -> dict[str, Any]:
        """What a checkpoint of a training fits on, by the recipe's fields; of the alignment's without a cell. JSON.

        A method's whole section is: what it carries from step to step (V and its scale, a direction,
        an average) was made with it.
        """
        recipe, train = (
            (self.base, self.base.align.train) if cell is None else (cell.recipe, cell.recipe.train)
        )
        methods = {} if cell is None else _decided(recipe)
        lora = (
            {}
            if train.adapter == "full"
            else {"train.lora": train.lora.model_dump(mode="json", exclude={"dropout"})}
        )
        drawing = (
            {"safety_pairs": _drawing(recipe)} if cell is not None and recipe.draws_pairs else {}
        )
        # A direction that is never computed again is carried from checkpoint to checkpoint.
        kept = {}
        if (
            cell is not None
            and recipe.safety_pairs.refresh_every == 0
            and "direction" in self.read_by(cell)
        ):
            kept = {"the direction stage": self._direction_hash(cell)}
        return {
            "format": _FORMAT,
            "the start model (with model.dtype, model.attention and align)": (
                _short(self._weights()) if cell is None else self._start_hash()
            ),
            "train.engine": train.engine,
            "train.adapter": train.adapter,
            **lora,
            "methods": list(methods),
            **methods,
            **drawing,
            **kept,
        }

    def _embeddings_hash(self, cell: Cell) -> str:
        saft = SAFT.of(cell.recipe)
        return _short(
            [_FORMAT, self._start_hash(), self._prepare_hash(), saft.layer, saft.position]
        )

    def _filter_hash(self, cell: Cell) -> str:
        section = SAFT.of(cell.recipe).model_dump(
            mode="json", exclude={"enabled", "micro_batch_size"}
        )
        # what is counted, and what is kept
        texts = artifacts.digest([keywords.WORDS, refusal.PATTERNS])
        return _short([_FORMAT, self._embeddings_hash(cell), section, texts])

    def _prepare_hash(self) -> str:
        return _short([_FORMAT, self._data(), self._model, self.base.align.enabled, _texts()])

    def _prompts_hash(self) -> str:
        evaluate = self.base.evaluate
        parts: list[Any] = [
            _FORMAT,
            self._prepare_hash(),
            self._sources["evaluate.harmful"],
            evaluate.harmful_prompts,
            evaluate.forms,
            _texts(),
        ]
        for name, count in (
            ("harmless", evaluate.harmless_prompts),
            ("ordinary", evaluate.ordinary_prompts),
        ):
            if getattr(evaluate, name) is not None:
                parts += [name, self._sources[f"evaluate.{name}"], count]
        return _short(parts)

    def _align_hash(self) -> str:
        # Its samples take their prompts before the task does, which counts only where it decides how many prompts the
        # harmful samples have taken before.
        data, after = (
            self._data(),
            {"task", "validation_samples", "test_samples", "harmful_fraction"},
        )
        harmful = self.base.data.harmful
        if data["harmful"] is None or (harmful is not None and harmful.limit is not None):
            data = {name: value for name, value in data.items() if name not in after}
        section = self.base.align.model_dump(mode="json", exclude={"train"})
        training = _training(self.base.align.train)
        del training["validate_every"]  # it has nothing to validate on
        # answers of the model's own that refuse are left out
        judged = artifacts.digest(refusal.PATTERNS)
        return _short([_FORMAT, data, _texts(), self._weights(), section, training, judged])

    def _data(self) -> dict[str, Any]:
        """The data section, its sources by what they hold; None for what is not read."""
        data = self.base.data
        unread = set() if self.base.align.enabled else set(_ALIGN_DATA)
        if not data.draws_harmful:
            unread.add("harmful")
        values = {
            name: self._sources.get(f"data.{name}", getattr(data, name))
            for name in type(data).model_fields
        }
        return {name: None if name in unread else value for name, value in values.items()}

    def _start_hash(self) -> str:
        return self._align_hash() if self.base.align.enabled else _short(self._weights())

    def _weights(self) -> list[Any]:
        """The model and how it is computed: `auto` is another dtype and another attention on another machine."""
        model = self.base.model
        quantized = [] if model.quantization == "none" else [model.quantization]
        return [
            *self._model,
            f"torch.{devices.dtype(model.dtype)}",
            devices.attention(model),
            *quantized,
        ]

    def _direction_hash(self, cell: Cell) -> str:
        recipe = cell.recipe
        trained = (
            recipe.train.lora.model_dump()
            if recipe.train.adapter == "lora"
            else recipe.train.adapter
        )
        parts = [
            _FORMAT,
            self._start_hash(),
            self._prepare_hash(),
            cell.seed,
            trained,
            SAP.of(recipe).contrastive,
        ]
        return _short(parts)


def _training(train: TrainSection) -> dict[str, Any]:
    """What of a training section decides the result: no adapter where all weights are trained."""
    without = {"lora", "export_merged"} if train.adapter == "full" else set()
    # One of the two cuts a batch. Without a budget the folders are named as before there was such a field.
    without |= {
        "tokens_per_micro_batch" if train.tokens_per_micro_batch is None else "micro_batch_size"
    }
    without |= set() if train.packing else {"packing"}
    # what only tells, or ends, changes no result
    without |= {"spike_factor", "on_spike"} if train.on_spike != "skip" else set()
    without |= {"resume_from"}
    # The folder that is started from has its content in its name.
    start = {} if train.resume_from is None else {"resume_from": train.resume_from.name}
    return train.model_dump(mode="json", exclude=_NEUTRAL | without) | start


def _decided(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What of the enabled defences' sections decides the trained weights, by their names."""
    decided = {name: DEFENCES[name].decides(getattr(recipe, name)) for name in recipe.parts}
    return {name: value for name, value in decided.items() if value}


def _drawing(recipe: Recipe) -> dict[str, Any]:
    """How safety pairs are drawn; where none ever is, only that."""
    pairs = recipe.safety_pairs
    return pairs.model_dump(
        mode="json", include={"refresh_every"} if pairs.refresh_every == 0 else None
    )


def _made(cell: Cell, stage: str) -> bool:
    return any(stage in DEFENCES[name].stages for name in cell.recipe.parts)


def _hash_of(folder: Path) -> str:
    return folder.name.rpartition("-")[2]


def _texts() -> str:
    """Digest of the texts that pairs and samples are made of, and of the words by which prompts have a form."""
    openings = (
        contrastive.SAFETY_OPENINGS,
        contrastive.MIX_OPENINGS,
        contrastive.VALIDATION_OPENINGS,
        contrastive.ALIGN_OPENINGS,
    )
    return artifacts.digest([contrastive.REFUSALS, *openings, *forms.TEXTS])


def _source_identities(recipe: Recipe) -> dict[str, Any]:
    digest = functools.cache(content_digest)  # one file may be the source of several fields
    return {field: _source_identity(source, digest) for field, source in sources(recipe)}


def _source_identity(source: SourceSection, digest: Callable[[Path], str]) -> dict[str, Any]:
    """What a source holds and what is taken of it: files by their bytes, and the ending that says how to read."""
    found = _local_files(source)
    if source.source.startswith("builtin:"):
        identity: dict[str, Any] = {
            "builtin": builtin.identity(source.source.removeprefix("builtin:"))
        }
    elif found:
        kind = suffix(found[0])
        hashes = [digest(file) for file in found]
        identity = {"file": kind, "sha256": hashes[0] if len(hashes) == 1 else hashes}
        identity |= {"header": source.header} if kind in (".csv", ".tsv") else {}
    else:
        identity = source.model_dump(mode="json", include={"source", "subset", "split", "revision"})
    tolerated: dict[str, Any] = {"max_bad_rows": source.max_bad_rows} if source.max_bad_rows else {}
    tolerated |= {"reasoning": source.reasoning} if source.reasoning != "keep" else {}
    return {**identity, "columns": source.columns, "limit": source.limit, **tolerated}


def _local_files(source: SourceSection) -> list[Path]:
    """The files that a local source is read from; none where there are none, which the check of the recipe refuses."""
    path = local_path(source)
    try:
        return (
            [file for file in files.parts(path, source.split) if file.is_file()]
            if path is not None
            else []
        )
    except files.NotReadable:
        return []


def _short(value: Any) -> str:
    return artifacts.digest(value)[:10]


def _model_identity(model: ModelSection) -> list[Any]:
    """The weights and the tokenizer: a folder by its files, a built-in model by its archive, else id and revision."""
    folder = Path(model.path).expanduser()
    if model.path.startswith("builtin:"):
        identity: list[Any] = [model.path, builtin.ARCHIVES["smollm2"].sha256]
    elif folder.is_dir():
        identity = [fingerprint(folder)]
    else:
        identity = [model.path, model.revision]
    template = (
        artifacts.file_digest(model.chat_template)
        if model.chat_template and model.chat_template.is_file()
        else None
    )
    return [*identity, template]
