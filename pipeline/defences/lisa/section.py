"""The section `lisa` of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.recipe.sections import DefenceSection, Positive


class LisaSection(DefenceSection):
    """Lisa (arXiv 2405.18641): steps on the safe responses and on the task in turns,
    each near where the other left off.
    """

    enabled: bool = Field(
        False, description="Whether to alternate alignment steps and task steps (arXiv 2405.18641)"
    )
    alignment_steps: Positive = Field(
        1, description="Steps in a row on the safe responses of safety_pairs.batch_size pairs each"
    )
    task_steps: Positive = Field(
        4, description="Steps in a row on the task, after them; train.steps counts both"
    )
    rho: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="Weight of rho / 2 * |w - w_last|^2, w_last being the weights at the last switch",
    )
