"""The section `sap` of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.recipe.sections import DefenceSection

# What sap.speed sets where the recipe does not: how much of it is what, docs/performance.md.
SPEEDS: dict[str, dict[str, float]] = {
    "exact": {},
    "balanced": {"probe_share": 0.25, "correction_every": 20},
    "fast": {"probe_share": 0.125, "correction_every": 20, "noise_every": 0},
}


class SapSection(DefenceSection):
    """Safety-aware probing: the step, how V is made, and what of it is measured."""

    MOVED: ClassVar[dict[str, str]] = {
        "refresh_every": "safety_pairs.refresh_every",
        "safety_batch_size": "safety_pairs.batch_size",
        "safety_micro_batch_size": "safety_pairs.micro_batch_size",
    }
    enabled: bool = Field(
        False, description="Whether the training step is SAP (arXiv 2505.16737, Algorithm 1)"
    )
    speed: Literal["exact", "balanced", "fast"] = Field(
        "exact",
        description="Values of probe_share, correction_every and noise_every where they are not given: "
        "balanced, V from a quarter of the samples; fast, from an eighth; both measure the correction "
        "every 20 steps, fast no noise, and both lost safety that exact kept: docs/performance.md",
    )
    schedule: Literal["exact", "lagged"] = Field(
        "exact",
        description="exact: Algorithm 1, V found and used in one step; lagged: V of the step before, one pass fewer",
    )
    contrastive: Literal["difference", "logsigmoid"] = Field(
        "difference",
        description="Contrastive safety loss: Definition 3.1, or -logsigmoid of the margin",
    )
    direction: Literal["live", "precomputed"] = Field(
        "live",
        description="First safety direction: of this step's pairs, or the direction stage's over all pairs",
    )
    probe_share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Share of a step's samples that V is computed from, at least one sample; below 1 for "
        "schedule exact only",
    )
    eps: Annotated[float, Field(gt=0)] = Field(
        0.05, description="|dW| as a share of |W|, both global over the trainable parameters"
    )
    beta: Annotated[float, Field(gt=0)] = Field(
        0.05,
        description="Size of V: factor of the gradient (raw), RMS (rms), step per coordinate (adam), first "
        "scale tried (target_correction)",
    )
    probe_step: Literal["raw", "rms", "adam", "target_correction"] = Field(
        "target_correction", description="How grad_V L_su becomes V"
    )
    target_correction: Annotated[float, Field(gt=0)] = Field(
        0.7,
        description="|g(V) - g(0)| / |g(0)| to hold, for probe_step target_correction; how values were "
        "chosen: docs/defaults.md",
    )
    layers: str | list[int] | list[float] = Field(
        "0.33:0.66",
        description="Probed decoder layers: [10, 11] indices, [0.3, 0.5] fractions of the depth, '10:19' "
        "or '0.33:0.66' a half-open range",
    )
    noise_every: Annotated[int, Field(ge=0)] = Field(
        20, description="Steps between measurements of the probe's noise (one extra pass); 0: never"
    )
    correction_every: Annotated[int, Field(ge=0)] = Field(
        10, description="Steps between measurements of the correction (one extra pass); 0: never"
    )

    @model_validator(mode="before")
    @classmethod
    def _speed(cls, given: Any) -> Any:
        return (
            {**SPEEDS.get(str(given.get("speed")), {}), **given}
            if isinstance(given, dict)
            else given
        )

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        if isinstance(value, str) and not re.fullmatch(r"\s*[\d.]+\s*:\s*[\d.]+\s*", value):
            raise ValueError(f"'{value}' is not a range: write start:stop, e.g. 10:19 or 0.33:0.66")
        if isinstance(value, list) and not value:
            raise ValueError("must name at least one decoder layer")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SapSection:
        if self.schedule == "lagged" and self.probe_share < 1:
            set_by = f" (of speed {self.speed})" if self.speed != "exact" else ""
            raise ValueError(
                f"probe_share {self.probe_share:g}{set_by} needs schedule: exact; the lagged "
                "schedule has V's first gradient from its main pass, over all samples"
            )
        if self.probe_step == "target_correction" and self.correction_every == 0:
            raise ValueError(
                "correction_every must be at least 1 with probe_step: target_correction"
            )
        return self
