"""How many logits may be there at once, and which models need all of them. No torch: the planner asks, too."""

from __future__ import annotations

from typing import Any

MOST_LOGITS = 2**27  # elements that a loss computes at a time (head.py): half a gigabyte in float32
# What some configs set to have logits scaled or capped after the head (Gemma 2, Cohere, Granite, Falcon-H1).
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")


def touches_logits(config: dict[str, Any]) -> bool:
    """Whether a decoder with this config does something to its logits after the head: they are computed whole then."""
    return config.get("final_logit_softcapping") is not None or any(
        config.get(name) not in (None, 1) for name in _SCALES
    )
