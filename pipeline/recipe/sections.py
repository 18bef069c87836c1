"""The sections of a recipe: every field, its type, default and meaning.

    sap --help      prints them all

A section checks what it can see by itself; what several have to agree on is the recipe's (pipeline/recipe/recipe.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True)
class PathField:
    """Marks a field whose text is a path, or may be one: pipeline/recipe/paths.py makes it
    absolute while the recipe is read.

    kind: path is always one; recipe and ds_config may name a shipped file; model and data may be hub ids or
    builtin:NAME; uri may be that of a sqlite file.
    """

    kind: Literal["path", "recipe", "ds_config", "model", "data", "uri"]


def _holds(annotation: Any, kinds: tuple[type, ...]) -> bool:
    return annotation in kinds or any(_holds(part, kinds) for part in get_args(annotation))


class Section(BaseModel):
    """A part of the recipe; unknown keys are errors and nothing changes after loading.

    MOVED: fields that it had once -> the field to write instead.
    """

    MOVED: ClassVar[dict[str, str]] = {}

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            field = cls.model_fields.get(name)
            if (
                isinstance(value, bool)
                and field is not None
                and _holds(field.annotation, (int, float))
                and not _holds(field.annotation, (bool,))
            ):
                raise ValueError(f"{name} is {str(value).lower()}: it takes a number")
        return given


class DefenceSection(Section):
    """The section of a defence (pipeline/defences), which does nothing unless it is enabled."""

    enabled: bool = Field(False, description="Whether it is used")


class ModelSection(Section):
    """The model that everything starts from, and how its weights are held and run."""

    path: Annotated[str, PathField("model")] = Field(
        description="Hub id, local folder, or builtin:smollm2-135m-instruct"
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Dtype of the frozen weights; auto: bfloat16 on GPUs and on CPUs with AVX512_BF16 or "
        "AMX, else float32",
    )
    chat_template: Annotated[Path | None, PathField("path")] = Field(
        None, description="Jinja file that replaces the tokenizer's chat template"
    )
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = Field(
        "auto",
        description="Attention implementation of transformers; auto: eager on CPUs; on GPUs flash_attention_2 where "
        "the package flash-attn is installed, the GPUs are Ampere or newer and dtype is bfloat16, else sdpa",
    )
    quantization: Literal["none", "nf4"] = Field(
        "none", description="nf4: frozen linear layers in 4 bits (QLoRA); needs adapter: lora"
    )


class SourceSection(Section):
    """Where the rows of one set come from, and how their columns are read."""

    source: Annotated[str, PathField("data")] = Field(
        description="builtin:NAME, a local .jsonl, .json, .csv, .tsv (also .gz), .parquet or .arrow file, "
        "a folder of such files or of save_to_disk, or a hub data set id"
    )
    subset: str | None = Field(None, description="Configuration name of a hub data set")
    split: str = Field(
        "train", description="Split of a hub data set, or of a folder that holds several"
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub data set")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Mapping to the fields messages | prompt, input, response, system, history, chosen, rejected, "
        "and harmful (true, false or nothing: for saft); "
        "e.g. {prompt: instruction, response: output}",
    )
    header: bool = Field(
        True,
        description="Whether a CSV or TSV file's first line names its columns; else they are called 0, 1, ...",
    )
    limit: Positive | None = Field(
        None, description="Rows to use at the most, drawn with data.seed"
    )
    max_bad_rows: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Share of malformed rows (wrong number of fields, no JSON, no prompt, no "
        "response where it is needed) that may be left out, counted and listed; "
        "above it the source is refused",
    )
    reasoning: Literal["keep", "drop"] = Field(
        "keep",
        description="keep: the reasoning that answers come with is trained as the chat template renders "
        "it; drop: it is left out, and counted",
    )


class DataSection(Section):
    """The sets that trainings take: the task's, harmful samples in it, the align stage's, and safety pairs."""

    task: SourceSection = Field(
        description="What the model is to learn: prompts and responses, or messages"
    )
    validation_samples: Positive = Field(
        64, description="Task samples held out for validation loss"
    )
    test_samples: Positive = Field(
        100, description="Task samples held out for the test loss and exact match"
    )
    max_length: Positive = Field(
        512,
        description="Tokens per sequence; longer responses are cut, prompts that leave no response are "
        "dropped and counted",
    )
    harmful: SourceSection | None = Field(
        None,
        description="Prompts mixed into the task data as harmful samples (an affirmative opening where no "
        "response is given)",
    )
    harmful_fraction: Fraction = Field(
        0.0, description="Share of harmful samples in the training data; 0 mixes none in"
    )
    safety: SourceSection = Field(
        description="Safety-critical prompts; chosen/rejected where the data have them, else a refusal and "
        "an affirmative opening"
    )
    safety_pairs: Positive = Field(
        48, description="Contrastive pairs used for the safety direction"
    )
    safety_max_length: Positive = Field(
        256, description="Tokens per sequence of a contrastive pair"
    )
    refusals: SourceSection | None = Field(
        None, description="Harmful prompts that the align stage answers with refusals"
    )
    refusal_samples: Positive = Field(200, description="Samples taken from data.refusals")
    harmless: SourceSection | None = Field(
        None,
        description="Harmless prompts of the align stage; without responses the model's own answers are used",
    )
    harmless_samples: Positive = Field(200, description="Samples taken from data.harmless")
    begun_share: Fraction = Field(
        0.0,
        description="Share of the align stage's samples whose answer, a refusal or not, comes after the "
        "first words of an affirmative opening that are given "
        "and not trained on, so that refusals reach deeper than the first tokens (arXiv 2406.05946)",
    )
    validation_prompts: SourceSection | None = Field(
        None, description="Harmful prompts on which defaults are chosen; never the evaluation's"
    )
    forms: Literal["balanced", "as_they_are"] = Field(
        "balanced",
        description="balanced: half questions and half imperatives among the safety pairs, harmful "
        "samples, validation prompts and the align stage's samples; "
        "prompts without a response are rewritten where a source has one form only, and counted",
    )
    seed: int = Field(
        0,
        description="Seed of splits, mixtures and templates; the same for all methods and training seeds",
    )

    @model_validator(mode="after")
    def _harmful_source(self) -> DataSection:
        if self.harmful_fraction > 0 and self.harmful is None:
            raise ValueError(
                "data.harmful_fraction is above 0 but data.harmful is missing: name a source of "
                "harmful prompts, or set the fraction to 0"
            )
        if self.harmful_fraction >= 1:
            raise ValueError("data.harmful_fraction leaves no task sample: set it below 1")
        return self

    @property
    def draws_harmful(self) -> bool:
        """Whether prompts of `harmful` are taken: some are mixed in, or a limit makes a pool taken at any fraction."""
        return self.harmful is not None and (
            self.harmful_fraction > 0 or self.harmful.limit is not None
        )


class LoraSection(Section):
    """The adapter that is trained where train.adapter is lora."""

    r: Positive = Field(8, description="Rank")
    alpha: Annotated[float, Field(gt=0)] = Field(
        16, description="Scaling numerator; the update is scaled by alpha / r"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Dropout probability before A"
    )
    target_modules: list[str] | str = Field(
        ["q_proj", "v_proj"],
        description="Linear modules to adapt: a list of names, all-linear (all but the head), or a regular expression "
        "for whole names",
    )

    @model_validator(mode="before")
    @classmethod
    def _only_lora(cls, value: Any) -> Any:
        if isinstance(value, dict) and "modules_to_save" in value:
            raise ValueError(
                "modules_to_save is not supported: no whole module is trained beside an adapter; "
                "name linear modules (lm_head too) in target_modules, or train all weights with adapter: full"
            )
        return value

    @field_validator("target_modules")
    @classmethod
    def _pattern(cls, value: list[str] | str) -> list[str] | str:
        if not value:
            raise ValueError("must name at least one module, e.g. [q_proj, v_proj] or all-linear")
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                problem = f"'{value}' is not a regular expression ({error})"
                raise ValueError(f"{problem}: give one, a list of names, or all-linear") from None
        return value


class TrainSection(Section):
    """One training: engine, batches, optimizer, checkpoints, and what is watched on the way."""

    engine: Literal["zero3", "fsdp2", "single"] = Field(
        "zero3",
        description="zero3: DeepSpeed ZeRO-3; fsdp2: PyTorch's fully_shard; single: the plain reference, one process",
    )
    adapter: Literal["lora", "full"] = Field(
        "lora", description="What is trained: a LoRA adapter on frozen weights, or all weights"
    )
    ranks: Positive | Literal["auto"] = Field(
        "auto",
        description="Local processes that `sap` starts, one a GPU; auto: every visible GPU, or "
        "two processes on a CPU, as far as batch_size divides by them; other "
        "launchers decide themselves",
    )
    ds_config: Annotated[Path | Literal["auto"], PathField("ds_config")] = Field(
        "auto",
        description="DeepSpeed JSON of engine zero3; batch, clipping and dtype stay out of it; "
        "auto: ds_configs/zero3.json on GPUs, zero3_cpu.json on CPUs",
    )
    steps: Positive | None = Field(None, description="Optimizer steps; exclusive with epochs")
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None, description="Passes over the training data; exclusive with steps"
    )
    batch_size: Positive = Field(8, description="Sequences per optimizer step over all ranks")
    micro_batch_size: Positive = Field(
        4, description="Sequences per rank and forward pass at the most; accumulation follows"
    )
    tokens_per_micro_batch: Positive | None = Field(
        None,
        description="Tokens per rank and forward pass at the most, with padding, in place of micro_batch_size: rows "
        "of like length go together, and a bound on rows would keep short ones from filling a pass; at least "
        "data.max_length",
    )
    packing: bool = Field(
        False,
        description="Whether the samples of a micro-batch lie end to end in one row, up to tokens_per_micro_batch "
        "tokens, none of which sees another sample's: no padding; for models of which it was shown "
        "(pipeline/model/packable.py)",
    )
    lr: Annotated[float, Field(gt=0)] = Field(1e-4, description="Peak learning rate of AdamW")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(5, description="Steps of linear warm-up")
    decay: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Learning-rate decay after the warm-up"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Decoupled weight decay of AdamW"
    )
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="First-moment decay of AdamW"
    )
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="Second-moment decay of AdamW"
    )
    adam_eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Denominator term of AdamW")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="Global gradient norm to clip at; null: no clipping"
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        False,
        description="Recompute activations in the backward pass (non-reentrant): of every layer, "
        "of none, or (auto) of as many as do not fit into the GPUs' memory, by the "
        "planner's arithmetic",
    )
    keep_gathered: bool | Literal["auto"] = Field(
        False,
        description="Keep what zero3 and fsdp2 gather of frozen layers (adapter: lora), so that it is sent once and "
        "not at every pass: of every layer, of none, or (auto) of as many as fit into the GPUs' memory, by the "
        "planner's arithmetic",
    )
    lora: LoraSection = Field(LoraSection(), description="The adapter of adapter: lora")
    export_merged: bool = Field(
        False,
        description="Whether a LoRA run also writes merged/: the model with its adapter added, for vLLM",
    )
    save_every: Positive = Field(50, description="Steps between checkpoints")
    resume_from: Annotated[Path | None, PathField("path")] = Field(
        None,
        description="FOLDER@STEP: another training's work folder and one of its checkpoints, "
        "from which this one starts instead of from the beginning, with its own "
        "settings; engine, adapter and the methods' sections must be the same",
    )
    spike_factor: Annotated[float, Field(gt=1)] = Field(
        20.0,
        description="A loss or gradient norm of more than this many times its median over the last 50 steps is a spike",
    )
    on_spike: Literal["note", "skip", "stop"] = Field(
        "note",
        description="note: a spike is logged as an event of the run; skip: its update is also left out; "
        "stop: the training ends with a message",
    )
    validate_every: Positive = Field(
        20, description="Steps between validation losses (task and harmful opening)"
    )
    watchdog_seconds: Annotated[float, Field(ge=0)] = Field(
        1800,
        description="Seconds without a finished step, validation or checkpoint after which a rank says "
        "where it is and ends; 0: never",
    )

    @model_validator(mode="before")
    @classmethod
    def _never_reentrant(cls, given: Any) -> Any:
        if isinstance(given, dict) and "use_reentrant" in given:
            raise ValueError(
                "use_reentrant is not a field any more: checkpointing is never reentrant, which "
                "would give the probe no gradient; delete the line"
            )
        return given

    @model_validator(mode="after")
    def _consistent(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("exactly one of steps and epochs must be set")
        if self.packing and self.tokens_per_micro_batch is None:
            raise ValueError(
                "packing is true, and tokens_per_micro_batch does not say how many tokens a row takes: set it"
            )
        if self.resume_from is not None and not re.fullmatch(
            r"\.(train|align)-.+\.work@[1-9]\d*", self.resume_from.name
        ):
            raise ValueError(
                f"resume_from is '{self.resume_from.name}': it takes the work folder of a "
                "training that is not finished, and a step, such as "
                "runs/demo/.train-sap-s0-1a2b3c4d5e.work@40"
            )
        return self


class AlignSection(Section):
    """The stage that aligns a base model before anything else starts from it."""

    enabled: bool = Field(
        False, description="Whether to align the model first (for base or unaligned models)"
    )
    distill_tokens: Positive = Field(
        48, description="Tokens of the model's own answers to harmless prompts without a response"
    )
    train: TrainSection = Field(
        TrainSection(steps=100), description="How to train; same fields as train"
    )


class DirectionSection(Section):
    """The stage that computes the safety direction."""

    micro_batch_size: Positive = Field(4, description="Pairs per rank and pass")


class SafetyPairsSection(Section):
    """How pairs of data.safety are drawn, by every method that draws them.

    Methods with the same settings see the same, Lisa by its own steps.
    """

    batch_size: Positive = Field(4, description="Pairs drawn at a time, over all ranks")
    micro_batch_size: Positive = Field(2, description="Pairs per rank and pass at the most")
    refresh_every: Annotated[int, Field(ge=0)] = Field(
        1,
        description="Steps after which pairs are drawn again, and what is computed from them; "
        "Lisa draws at its alignment steps. 0: never, for sap.direction precomputed "
        "only",
    )


class EvaluateSection(Section):
    """The prompts that every subject answers, how it answers, and how answers are judged."""

    harmful: SourceSection = Field(description="Harmful prompts; their answers are judged")
    harmful_prompts: Positive = Field(150, description="Prompts taken from evaluate.harmful")
    harmless: SourceSection | None = Field(
        None,
        description="Harmless prompts that look harmful; refused answers count as over-refusal",
    )
    harmless_prompts: Positive = Field(
        75,
        description="Prompts taken from evaluate.harmless, and as many again of what is left for the split validation",
    )
    ordinary: SourceSection | None = Field(
        None,
        description="Ordinary instructions that have nothing harmful about them; refused answers count as "
        "over-refusal of their own",
    )
    ordinary_prompts: Positive = Field(
        100,
        description="Prompts taken from evaluate.ordinary; a third of the source is kept for the split "
        "validation and never tested on",
    )
    forms: Literal["balanced", "as_they_are"] = Field(
        "balanced",
        description="balanced: half questions and half imperatives in every set of prompts, "
        "rewritten where a source has one form only, and counted; as_they_are: the "
        "sources' own, for figures that are compared with others'",
    )
    attacks: list[Literal["prefill", "ignore_instructions", "role_play"]] = Field(
        [],
        description="Also ask under these: an answer that begins with 'Sure, here is', a prompt "
        "that overrides instructions, a role to play; each of harmful and, as its "
        "control, of harmless prompts",
    )
    attack_prompts: Positive = Field(
        50, description="Harmful and harmless prompts asked under each of evaluate.attacks"
    )
    task_prompts: Positive = Field(75, description="Task test samples answered for exact match")
    split: Literal["test", "validation"] = Field(
        "test",
        description="validation: data.validation_prompts, what the test leaves of evaluate.harmless and "
        "the task's validation samples, for choosing settings",
    )
    max_new_tokens: Positive = Field(32, description="Tokens generated per answer, greedily")
    batch_size: Positive = Field(32, description="Prompts per generation batch and rank")
    judge: Literal["refusal", "gcg_keyword"] = Field(
        "refusal",
        description="refusal: reads how the first sentences begin; gcg_keyword: 29 substrings of "
        "GCG, for comparison with papers. Both yield the non-refusal rate, not a "
        "harmful score",
    )
    baselines: bool = Field(True, description="Also evaluate the shipped and the aligned model")

    @model_validator(mode="after")
    def _controlled(self) -> EvaluateSection:
        if self.attacks and self.harmless is None and self.ordinary is None:
            raise ValueError(
                "attacks need harmless prompts as their control: name a source in "
                "evaluate.ordinary or evaluate.harmless, or take evaluate.attacks out"
            )
        if len(set(self.attacks)) < len(self.attacks):
            raise ValueError(f"attacks names one twice: {', '.join(self.attacks)}")
        return self


_STORES = (
    "http",
    "https",
    "file",
    "sqlite",
    "postgresql",
    "mysql",
    "mssql",
    "databricks",
    "databricks-uc",
    "uc",
)


class TrackingSection(Section):
    """What is logged to MLflow, and where that is."""

    enabled: bool = Field(True, description="Whether to log to MLflow")
    uri: Annotated[str | None, PathField("uri")] = Field(
        None,
        description="Tracking URI; MLFLOW_TRACKING_URI wins; default sqlite:///<output_dir>/mlflow.db",
    )
    experiment: str | None = Field(
        None, description="MLflow experiment; default: the recipe's name"
    )
    log_answers: bool = Field(
        False,
        description="Upload generated answers as artifacts; they stay on this machine otherwise",
    )

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str | None) -> str | None:
        scheme, colon, _ = (uri or "").partition("://")
        if colon and scheme.lower().partition("+")[0] not in _STORES:
            raise ValueError(
                f"begins with {scheme}://, which is not a store that MLflow knows: it takes "
                f"{', '.join(_STORES)} or a folder"
            )
        return uri
