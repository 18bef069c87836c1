"""Where every stage writes: folders named by the hash of what decides their content.

    layout = Layout(experiment); layout.train(cell)   # runs/demo/train-sap-s0-1a2b3c4d

A stage's hash covers its recipe sections and its upstream stages' hashes, so a changed setting makes a new folder and everything below it,
and a folder that is complete never has to be made again. What cannot change a result (ranks, file of DeepSpeed settings, intervals of
checkpoints) is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.data import builtin, contrastive
from pipeline.evaluation import judges
from pipeline.filtering import keywords
from pipeline.model_files import model_location
from pipeline.recipe import Cell, Experiment, Recipe
from pipeline.sections import ModelSection, SourceSection

_REPORT = 3  # raise when the page shows something new
_FORMAT = 2  # raise when prepared data, checkpoints or products change shape
_NEUTRAL = {"ranks", "ds_config", "save_every", "watchdog_seconds"}


@dataclass(frozen=True)
class Subject:
    """Something to evaluate: a model folder or hub id, with or without an adapter. trained: folder of the stage whose product it is."""

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
        self._contents = _contents(self.base)

    def prepare(self) -> Path:
        return self.root / f"prepare-{self._prepare_hash()}"

    def align(self) -> Path:
        return self.root / f"align-{self._align_hash()}"

    def embeddings(self, cell: Cell) -> Path:
        """The training samples' embeddings: what is filtered by is not in the name, so another threshold reads them again."""
        return self.root / f"embeddings-{self._embeddings_hash(cell)}"

    def filter(self, cell: Cell) -> Path:
        return self.root / f"filter-{self._filter_hash(cell)}"

    def direction(self, cell: Cell) -> Path:
        return self.root / f"direction-s{cell.seed}-{self._direction_hash(cell)}"

    def train(self, cell: Cell) -> Path:
        return self.root / f"train-{cell.method}-s{cell.seed}-{self.train_hash(cell)}"

    def work(self, target: Path) -> Path:
        """Where an unfinished stage keeps its checkpoints and metrics."""
        return target.with_name(f".{target.name}.work")

    def evaluate(self, subject: Subject) -> Path:
        seed = "" if subject.seed is None else f"-s{subject.seed}"
        section = self.base.evaluate.model_dump(mode="json", exclude={"batch_size", "baselines"})
        return self.root / f"evaluate-{subject.name}{seed}-{_short([_FORMAT, subject.identity, self._prepare_hash(), section])}"

    def shard(self, target: Path, index: int, count: int) -> Path:
        """Where one of `count` processes that share an evaluation leaves its part until all are merged."""
        return self.work(target) / f"shard-{index}-of-{count}"

    def report(self) -> Path:
        folders = [self.evaluate(subject).name for subject in self.subjects()]
        return self.root / f"report-{_short([_REPORT, folders])}"

    def start_model(self) -> str:
        """What every method starts from: the aligned model, or the recipe's own."""
        return str(self.align() / "model") if self.base.align.enabled else model_location(self.base.model)

    def needs_direction(self, cell: Cell) -> bool:
        return cell.recipe.sap.enabled

    def needs_filter(self, cell: Cell) -> bool:
        return cell.recipe.saft.enabled

    def subjects(self) -> Iterator[Subject]:
        """Everything the report compares, in its order."""
        if self.base.evaluate.baselines:
            yield Subject("shipped", None, model_location(self.base.model), None, _short(self._weights()))
            if self.base.align.enabled:
                yield Subject("aligned", None, self.start_model(), None, self._align_hash())
        for cell in self.experiment.cells():
            yield self.subject(cell)

    def subject(self, cell: Cell) -> Subject:
        trained, full = self.train(cell), cell.recipe.train.adapter == "full"
        model, adapter = (str(trained / "model"), None) if full else (self.start_model(), trained / "adapter")
        return Subject(cell.method, cell.seed, model, adapter, self.train_hash(cell), trained)

    def train_hash(self, cell: Cell) -> str:
        recipe = cell.recipe
        parts: list[Any] = [
            _FORMAT,
            self._start_hash(),
            self._prepare_hash(),
            cell.seed,
            recipe.train.model_dump(mode="json", exclude=_NEUTRAL),
        ]
        if recipe.sap.enabled:
            parts.append(recipe.sap.model_dump(mode="json"))
            if recipe.sap.direction == "precomputed":
                parts.append(self._direction_hash(cell))
        elif recipe.draws_pairs:
            parts.append(recipe.sap.model_dump(mode="json", include={"safety_batch_size", "safety_micro_batch_size", "refresh_every"}))
        if recipe.saft.enabled:
            parts.append(self._filter_hash(cell))
        for name in ("ema", "safe_mix", "safety_gradient", "lisa"):  # named only where enabled: another method's new field changes no folder
            if getattr(recipe, name).enabled:
                parts.append({name: getattr(recipe, name).model_dump(mode="json")})
        return _short(parts)

    def _embeddings_hash(self, cell: Cell) -> str:
        saft = cell.recipe.saft
        return _short([_FORMAT, self._start_hash(), self._prepare_hash(), saft.layer, saft.position])

    def _filter_hash(self, cell: Cell) -> str:
        section = cell.recipe.saft.model_dump(mode="json", exclude={"enabled", "micro_batch_size"})
        texts = artifacts.digest([keywords.WORDS, judges.OPENINGS])  # what is counted, and what is kept
        return _short([_FORMAT, self._embeddings_hash(cell), section, texts])

    def _prepare_hash(self) -> str:
        recipe = self.base
        evaluated = recipe.evaluate.model_dump(
            mode="json", include={"harmful", "harmful_prompts", "harmless", "harmless_prompts", "task_prompts"}
        )
        return _short([_FORMAT, recipe.data.model_dump(mode="json"), evaluated, self._model, recipe.align.enabled, self._contents])

    def _align_hash(self) -> str:
        section = self.base.align.model_dump(mode="json", exclude={"train": _NEUTRAL})
        return _short([_FORMAT, self._prepare_hash(), self._weights(), section])

    def _start_hash(self) -> str:
        return self._align_hash() if self.base.align.enabled else _short(self._weights())

    def _weights(self) -> list[Any]:
        """The model and how it is computed: `dtype: auto` is another dtype on another machine."""
        model = self.base.model
        dtype = f"torch.{model.dtype}"
        if model.dtype == "auto":
            from pipeline.models import resolve_dtype  # here: it brings in torch and transformers, seconds that a named dtype need not cost

            dtype = str(resolve_dtype("auto"))
        quantized = [] if model.quantization == "none" else [model.quantization]
        return [*self._model, dtype, model.attention, *quantized]

    def _direction_hash(self, cell: Cell) -> str:
        recipe = cell.recipe
        trained = recipe.train.lora.model_dump() if recipe.train.adapter == "lora" else recipe.train.adapter
        parts = [_FORMAT, self._start_hash(), self._prepare_hash(), cell.seed, trained, recipe.sap.contrastive]
        return _short(parts)


def sources(recipe: Recipe) -> Iterator[SourceSection]:
    """Every data source the recipe names."""
    for section in (recipe.data, recipe.evaluate):
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, SourceSection):
                yield value


def _contents(recipe: Recipe) -> dict[str, str]:
    """Digests of what the sources hold: local files, built-in data, and the texts that pairs are made of. A hub data set is its revision's."""
    digests = {"texts": artifacts.digest([contrastive.REFUSALS, contrastive.SAFETY_OPENINGS, contrastive.MIX_OPENINGS, contrastive.VALIDATION_OPENINGS])}
    for source in sources(recipe):
        path = Path(source.source).expanduser()
        if source.source.startswith("builtin:"):
            digests[source.source] = builtin.identity(source.source.removeprefix("builtin:"))
        elif path.is_file():
            digests[source.source] = artifacts.file_digest(path)
    return digests


def _short(value: Any) -> str:
    return artifacts.digest(value)[:10]


def _model_identity(model: ModelSection) -> list[Any]:
    """What the weights are: the id of a built-in or hub model, names and sizes of a folder's files and its configuration's bytes."""
    folder = Path(model.path).expanduser()
    files: list[Any] = [builtin.ARCHIVES["smollm2"].sha256] if model.path.startswith("builtin:") else []
    if folder.is_dir():
        files = [(path.name, path.stat().st_size) for path in sorted(folder.glob("*.safetensors"))]
        files += [artifacts.file_digest(path) for path in sorted(folder.glob("*.json"))]
    template = artifacts.file_digest(model.chat_template) if model.chat_template and model.chat_template.is_file() else None
    return [model.path, model.revision, template, files]
