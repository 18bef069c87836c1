"""The section `saft` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.recipe.sections import DefenceSection, Fraction, Positive


class SaftSection(DefenceSection):
    """SAFT (arXiv 2410.10014): training samples that the model's hidden states give away as harmful are left out."""

    enabled: bool = Field(
        False,
        description="Whether to filter the training samples before training (arXiv 2410.10014)",
    )
    layer: Annotated[int, Field(ge=0, strict=True)] | Annotated[float, Field(ge=0, lt=1)] = Field(
        0.5,
        description="Decoder layer whose output is read: an index, or a fraction of the depth such as 0.5",
    )
    position: Literal["response_start", "response_mean", "response_end"] = Field(
        "response_mean",
        description="Tokens read: the one before the response (as published; it has not seen the "
        "response), all of the response, or its last",
    )
    components: Annotated[int, Field(ge=1, le=4)] | None = Field(
        None, description="Singular vectors k; null: the best of 1 to 4 on labelled samples"
    )
    labelled: Annotated[int, Field(ge=0)] = Field(
        100,
        description="Labelled samples on which k and threshold are chosen (best F1); 0: none. 40 others, "
        "at most half, are held out where there are fewer",
    )
    contamination: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Share of harmful samples expected: the threshold where no sample has a label",
    )
    min_auroc: Fraction = Field(
        0.7,
        description="AUROC on the labelled samples below which the filter refuses to drop anything",
    )
    min_precision: Fraction = Field(
        0.5,
        description="Of what would be dropped, the share that is harmful: lower end of its "
        "Wilson 95% interval on held-out labelled samples, below which the filter "
        "refuses to drop anything. 0.5: more harmful samples than harmless ones; 4 "
        "right of 4 reach it. 0: not asked",
    )
    max_dropped: Fraction = Field(
        0.5,
        description="Largest share of the samples that may be dropped: those with the highest scores",
    )
    keep_refusals: bool = Field(
        True,
        description="Whether samples whose response begins as a refusal are kept whatever their score",
    )
    micro_batch_size: Positive = Field(8, description="Samples per rank and forward pass")

    @model_validator(mode="after")
    def _consistent(self) -> SaftSection:
        if self.labelled == 0 and self.contamination is None:
            raise ValueError(
                "labelled 0 needs contamination: set saft.contamination to the share of harmful samples you expect"
            )
        return self
