"""What a model's config and tensors say: what is stored, and the sizes that activations and FLOPs depend on.

Reads no weights, needs no torch.

counted = count_model(read_facts(section, folder), train, dtype_bytes=2, nf4=False, eager=False)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from pipeline.model.model_checks import check_lora
from pipeline.model.model_facts import ModelFacts
from pipeline.objectives.logits import touches_logits
from pipeline.recipe.sections import TrainSection

NF4_BLOCK = 64  # weights that share a float32 scale


@dataclass(frozen=True)
class Weight:
    """A tensor as it is stored: shape, bytes per element, whether it belongs to a decoder layer,
    whether it is trained.
    """

    shape: tuple[int, ...]
    width: float
    in_layer: bool
    trained: bool

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)

    def held(self, engine: str, ranks: int) -> int:
        """Elements on the rank that holds the most: ZeRO-3 cuts the flat tensor, FSDP2 its rows."""
        if engine == "single":
            return self.numel
        return (
            -(-self.numel // ranks)
            if engine == "zero3"
            else -(-self.shape[0] // ranks) * prod(self.shape[1:])
        )


@dataclass(frozen=True)
class ModelCounts:
    """What a config says: stored tensors, and the sizes that activations and FLOPs depend on."""

    weights: tuple[Weight, ...]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    queries: int  # heads x dimension of a head
    keys: int  # the same of the key heads, which several queries may share
    vocabulary: int
    # whether a pass computes the logits of all its tokens at once (objectives/head.py)
    whole_logits: bool
    linears: tuple[tuple[int, int], ...]  # (out, in) of one decoder layer's
    adapted: tuple[tuple[int, int], ...]
    eager: bool


def count_model(
    facts: ModelFacts, train: TrainSection, dtype_bytes: int, nf4: bool, eager: bool
) -> ModelCounts:
    """Count a model's tensors as they will be stored. nf4: whether linear weights are in 4 bits.

    eager: whether attention keeps its scores.

    Raises ValueError where the model is none of a decoder with attention and a gated MLP,
    or adapter and quantization do not go with it.
    """
    names = ("hidden_size", "intermediate_size", "num_attention_heads")
    sizes = {name: size for name in names if (size := facts.number(name))}
    lacking = next(
        (name for name in names if name not in sizes),
        "decoder layers" if not facts.layers else None,
    )
    if lacking or facts.embedding is None:
        raise ValueError(
            f"the model's config has no {lacking}: the planner knows decoders with attention and a gated MLP only"
        )
    if nf4 and train.adapter == "full":
        raise ValueError(
            "train.adapter full cannot train weights in 4 bits: set model.quantization to none, or "
            "train.adapter to lora"
        )
    targets = set(check_lora(facts, train, "train"))
    first = {
        name: shape
        for name, shape in facts.linears.items()
        if facts.layer_of(f"{name}.weight") == min(facts.layers)
    }
    heads = sizes["num_attention_heads"]
    projection = next(
        (shape[0] for name, shape in first.items() if name.endswith(".q_proj")),
        sizes["hidden_size"],
    )
    dimension = facts.number("head_dim") or projection // heads
    return ModelCounts(
        weights=tuple(_weights(facts, targets, train, dtype_bytes, nf4)),
        layers=len(facts.layers),
        hidden=sizes["hidden_size"],
        intermediate=sizes["intermediate_size"],
        heads=heads,
        queries=heads * dimension,
        keys=(facts.number("num_key_value_heads") or heads) * dimension,
        vocabulary=facts.tensors[facts.embedding].shape[0],
        whole_logits=facts.head in targets or touches_logits(facts.text_config),
        linears=tuple(first.values()),
        adapted=tuple(shape for name, shape in first.items() if name in targets),
        eager=eager,
    )


def _weights(
    facts: ModelFacts, targets: set[str], train: TrainSection, width: int, nf4: bool
) -> list[Weight]:
    full, found = train.adapter == "full", []
    for name, tensor in facts.tensors.items():
        in_layer, module, numel = (
            facts.layer_of(name) is not None,
            name.removesuffix(".weight"),
            prod(tensor.shape),
        )
        if name == f"{facts.head}.weight" and facts.tied:
            continue  # stored twice, loaded once
        if nf4 and module in facts.linears and module != facts.head:
            # As quantization.py stores them: codes of half a byte, and a float32 scale for every block.
            found += [
                Weight((-(-numel // 2),), 1, in_layer, False),
                Weight((-(-numel // NF4_BLOCK),), 4, in_layer, False),
            ]
        else:
            found.append(Weight(tuple(tensor.shape), width, in_layer, full))
    for module in targets:
        out, into = facts.linears[module]
        in_layer = facts.layer_of(f"{module}.weight") is not None
        found += [
            Weight((train.lora.r, into), 4, in_layer, True),
            Weight((out, train.lora.r), 4, in_layer, True),
        ]
    return found
