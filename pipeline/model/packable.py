"""Whether samples can share a row without a token of one touching another's: told from a model's config alone.

    check_packing(facts.config, "train", recipe.train, recipe.data.max_length, facts.label)

Not every decoder can: some carry a state from token to token (Mamba, linear attention, short convolutions), some have
attention biases by distance in the row (ALiBi) or masks of their own, some take no positions. What a config does not
say, a comparison does: loss and gradient of each type below, in float32, packed and with a row for each sample
(tests/unit/objectives/test_packed.py). Needs no torch.
"""

from __future__ import annotations

from typing import Any

from pipeline.model.model_facts import decoder_config
from pipeline.recipe.sections import TrainSection

PACKABLE = frozenset(
    (
        "apertus", "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text",
        "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite", "granitemoe", "helium",
        "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "mixtral", "nanochat", "nemotron", "olmo",
        "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss",
        "smollm3", "stablelm", "starcoder2", "vaultgemma",
    )
)  # fmt: skip
# Masks that transformers builds from positions which begin anew.
_LAYER_TYPES = frozenset(("full_attention", "sliding_attention", "chunked_attention"))
# Rotations that depend on the longest sequence of a micro-batch, once it is beyond what the model began with.
_BY_LENGTH = frozenset(("dynamic", "longrope"))


def check_packing(
    config: dict[str, Any], field: str, train: TrainSection, max_length: int, label: str
) -> None:
    """ValueError, one sentence, where a training section packs samples for a model that cannot keep them apart.

    config: config.json's content. field: of the recipe, e.g. train. max_length: tokens of the longest sample.
    label: how messages name the model.
    """
    reason = _reason(config, max_length) if train.packing else None
    if reason:
        raise ValueError(
            f"{field}.packing is true, but {label} {reason}: set {field}.packing to false"
        )


def _reason(config: dict[str, Any], max_length: int) -> str | None:
    text = decoder_config(config)
    strange = next(
        (kind for kind in text.get("layer_types") or () if kind not in _LAYER_TYPES), None
    )
    if strange:
        return f"has layers of the type '{strange}', in which packed samples would reach each other"
    kinds = dict.fromkeys(
        (config.get("model_type"), text.get("model_type", config.get("model_type")))
    )
    unknown = next((kind for kind in kinds if kind not in PACKABLE), None)
    if unknown is not None or None in kinds:
        return f"is of the type '{unknown}', for which it was not shown that packed samples do not reach each other"
    if text.get("alibi"):
        return "has attention biases by distance (alibi), which packed samples would reach each other's with"
    if text.get("use_bidirectional_attention"):
        return "has attention in both directions (use_bidirectional_attention)"
    return _rotation(text, max_length)


def _rotation(text: dict[str, Any], max_length: int) -> str | None:
    """The reason, where rotary embeddings depend on which samples share a micro-batch."""
    ropes = [text.get(name) for name in ("rope_parameters", "rope_scaling")]
    ropes += [inner for outer in ropes if isinstance(outer, dict) for inner in outer.values()]
    for rope in (rope for rope in ropes if isinstance(rope, dict)):
        kind = rope.get("rope_type", rope.get("type"))
        original = rope.get("original_max_position_embeddings") or text.get(
            "original_max_position_embeddings"
        )
        limit = original or text.get("max_position_embeddings")
        if kind in _BY_LENGTH and not (isinstance(limit, int) and max_length <= limit):
            return (
                f"turns positions by the longest sample of a micro-batch (rope type {kind}) where data.max_length "
                f"{max_length} is beyond {limit}, and packing decides which samples those are"
            )
    return None
