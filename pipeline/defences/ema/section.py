"""The section `ema` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.recipe.sections import DefenceSection, Positive


class EmaSection(DefenceSection):
    """What arXiv 2508.12531 calls EMA momentum in parameter space;
    its update rule is not published, so both readings are here.
    """

    enabled: bool = Field(
        False,
        description="Whether to average the trained weights over the steps (arXiv 2508.12531)",
    )
    mode: Literal["shadow", "momentum"] = Field(
        "shadow",
        description="shadow: training goes on untouched, validation and product are the average; momentum: "
        "training goes on from the average",
    )
    decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="Weight of the average so far in the next: s = decay * s + (1 - decay) * w"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Steps after which averaging begins, with the weights of that moment; until then the "
        "average is the weights",
    )
    every: Positive = Field(1, description="Steps between updates of the average")

    def check_steps(self, steps: int) -> None:
        """ValueError where a training of so many steps would end before the first update:
        its product would be the start, or no average.
        """
        if self.warmup_steps + self.every > steps:
            raise ValueError(
                f"ema.warmup_steps {self.warmup_steps} and ema.every {self.every} leave no step of "
                f"{steps} to average: lower them, or set ema.enabled to false"
            )
