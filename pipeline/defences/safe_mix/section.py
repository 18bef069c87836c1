"""The section `safe_mix` of a recipe."""

from __future__ import annotations

from pydantic import Field

from pipeline.recipe.sections import DefenceSection


class SafeMixSection(DefenceSection):
    """SafeInstr, the control that SAP's reviewers asked for: safety_pairs.batch_size safe responses every
    safety_pairs.refresh_every steps.
    """

    enabled: bool = Field(
        False,
        description="Whether the safe responses of the safety pairs are mixed into the task's batches",
    )
