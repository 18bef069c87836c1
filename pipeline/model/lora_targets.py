"""Which modules a LoRA adapts: lora.target_modules against the names of a model's modules, by PEFT's rules. No torch.

adapted_modules(train.lora.target_modules, ["model.layers.0.self_attn.q_proj", ..., "lm_head"], "lm_head", "train")
"""

from __future__ import annotations

import re
from collections.abc import Collection

ALL_LINEAR = "all-linear"


def adapted_modules(
    targets: list[str] | str, linears: Collection[str], head: str | None, field: str, others: Collection[str] = ()
) -> list[str]:  # fmt: skip
    """Names of the adapted modules, in the order of `linears`.

    targets: a list of names or of their last parts, `all-linear` (all but the head), or a regular expression for whole
    names. linears, others: names of the linear modules, and of the rest. head: the linear one that gives logits.
    field: whose targets these are, e.g. `train`. Raises ValueError, one sentence, where a target is not a linear
    module.
    """
    where = f"{field}.lora.target_modules"
    last_parts = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
    if isinstance(targets, list):
        for target in targets:
            if not any(_named(target, name) for name in linears):
                hint = (
                    " (all-linear stands alone, not in a list)"
                    if target.lower() == ALL_LINEAR
                    else ""
                )
                lack = (
                    "is not a linear module"
                    if any(_named(target, name) for name in others)
                    else "this model lacks"
                )
                raise ValueError(
                    f"{where} names '{target}'{hint}, which {lack}: it has {last_parts}"
                )
        found, stray = (
            [name for name in names if any(_named(target, name) for target in targets)]
            for names in (linears, others)
        )
    elif targets.lower() == ALL_LINEAR:
        found, stray = [name for name in linears if name != head], []
    else:
        found, stray = (
            [name for name in names if re.fullmatch(targets, name)] for names in (linears, others)
        )
    if not found and not stray:
        example = next(iter(linears), "model.layers.0.self_attn.q_proj")
        raise ValueError(
            f"{where} '{targets}' matches no linear module: as a string it is all-linear, for all but the head, "
            f"or a regular expression for whole names such as {example}; "
            f"give a list to name their last parts, which are {last_parts}"
        )
    if stray:
        raise ValueError(
            f"{where} takes in {stray[0]}, which is not a linear module: leave it out; linear ones are {last_parts}"
        )
    return found


def _named(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")
