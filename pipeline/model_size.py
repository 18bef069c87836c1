"""What a model's config says: its stored tensors, and the sizes that activations and FLOPs depend on. Reads no weights.

    counted = count_model(AutoConfig.from_pretrained(path), train, dtype_bytes=2, nf4=False)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from pipeline.models import check_targets, decoder_layers
from pipeline.quantization import BLOCK, check_quantisable
from pipeline.sections import TrainSection


@dataclass(frozen=True)
class Weight:
    """A tensor as it is stored: shape, bytes per element, whether it belongs to a decoder layer, whether it is trained."""

    shape: tuple[int, ...]
    width: float
    in_layer: bool
    trained: bool

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def held(self, engine: str, ranks: int) -> int:
        """Elements on the rank that holds the most: ZeRO-3 cuts the flat tensor, FSDP2 its rows."""
        if engine == "single":
            return self.numel
        return -(-self.numel // ranks) if engine == "zero3" else -(-self.shape[0] // ranks) * prod(self.shape[1:])


@dataclass(frozen=True)
class Counted:
    """What a config says: stored tensors, and the sizes that activations and FLOPs depend on."""

    weights: tuple[Weight, ...]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    queries: int  # heads x dimension of a head
    keys: int  # the same of the key heads, which several queries may share
    vocabulary: int
    linears: tuple[tuple[int, int], ...]  # (out, in) of one decoder layer's
    adapted: tuple[tuple[int, int], ...]
    eager: bool


def count_model(config: PretrainedConfig, train: TrainSection, dtype_bytes: int, nf4: bool) -> Counted:
    """Build the modules without memory and count them. nf4: whether linear weights are in 4 bits.

    Raises ValueError where the config is none of a decoder with attention and a gated MLP, or adapter and quantization do not go with the model.
    """
    text = config.get_text_config()
    lacking = next((name for name in ("intermediate_size", "num_attention_heads") if getattr(text, name, None) is None), None)
    if lacking:
        raise ValueError(f"the model's config has no {lacking}: the planner knows decoders with attention and a gated MLP only")
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if nf4 and train.adapter == "full":
        raise ValueError("train.adapter full cannot train weights in 4 bits: set model.quantization to none, or train.adapter to lora")
    if nf4:
        check_quantisable(module, config.name_or_path)
    layers = decoder_layers(module)
    targets = set(check_targets(module, train.lora, "train")) if train.adapter == "lora" else set()
    first = {id(part) for part in layers[0].modules() if isinstance(part, nn.Linear)}
    linears = {name: (m.out_features, m.in_features) for name, m in module.named_modules() if id(m) in first}
    dimension = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Counted(
        weights=tuple(_weights(module, layers, train, targets, dtype_bytes, nf4)),
        layers=len(layers),
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        queries=text.num_attention_heads * dimension,
        keys=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * dimension,
        vocabulary=text.vocab_size,
        linears=tuple(linears.values()),
        adapted=tuple(shape for name, shape in linears.items() if name in targets),
        eager=module.config._attn_implementation == "eager",
    )


def _weights(
    module: nn.Module, layers: Sequence[nn.Module], train: TrainSection, targets: set[str], width: int, nf4: bool
) -> list[Weight]:  # fmt: skip
    inside, head, full = {id(part) for layer in layers for part in layer.modules()}, module.get_output_embeddings(), train.adapter == "full"
    seen: set[nn.Parameter] = set()
    found: list[Weight] = []
    for path, owner in module.named_modules():
        in_layer, linear = id(owner) in inside, isinstance(owner, nn.Linear)
        for name, parameter in owner.named_parameters(recurse=False):
            numel = parameter.numel()
            if nf4 and linear and owner is not head and name == "weight":
                # As quantization.py stores them: codes of half a byte, and a float32 scale for every block.
                found += [Weight((-(-numel // 2),), 1, in_layer, False), Weight((-(-numel // BLOCK),), 4, in_layer, False)]
            elif parameter not in seen:  # else tied
                found.append(Weight(tuple(parameter.shape), width, in_layer, full))
            seen.add(parameter)
        if path in targets:
            found += [Weight((train.lora.r, owner.in_features), 4, in_layer, True), Weight((owner.out_features, train.lora.r), 4, in_layer, True)]
    return found
