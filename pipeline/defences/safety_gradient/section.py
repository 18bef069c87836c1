"""The section `safety_gradient` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.recipe.sections import DefenceSection


class SafetyGradientSection(DefenceSection):
    """The control without a probe: the safety gradient itself."""

    enabled: bool = Field(
        False, description="Whether lambda * grad L_safety is added to the task's gradient"
    )
    contrastive: Literal["difference", "logsigmoid"] = Field(
        "logsigmoid",
        description="Contrastive safety loss; difference has no lower bound, and here nothing but the "
        "steps' number limits it",
    )
    correction: Annotated[float, Field(gt=0)] = Field(
        0.7,
        description="|lambda * grad L_safety| / |task gradient|, as sap.target_correction measures SAP's; "
        "lambda follows at every step",
    )
