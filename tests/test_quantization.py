"""Weights in 4 bits: bitsandbytes' numbers in layers that can be sharded, and none of its traps."""

import bitsandbytes
import pytest
import torch
from torch import nn

from pipeline.checks import check_quantisable
from pipeline.model_outline import facts_of
from pipeline.models import add_lora
from pipeline.quantization import Nf4Linear, dequantised, quantise
from pipeline.sap.losses import useful_loss
from pipeline.sap.probe import Probe
from pipeline.sections import LoraSection
from pipeline.sharding.single import SingleEngine
from pipeline.weights import Sources, fill
from tests.tiny import FAMILIES, FAMILY_HIDDEN, StepBatches, family_model


def quantised(model: nn.Module) -> nn.Module:
    """A copy of the model in 4 bits, filled from the weights in memory."""
    sources: Sources = {}
    quantise(model, sources)
    fill(sources)
    return model


class Holder(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 32), (10, 96), (48, 20), (33, 35), (1, 7), (6, 128)])
def test_the_layer_computes_what_nf4_means(shape, dtype):
    """Rows of 32 and 96 weights: there bitsandbytes' own kernel for CPUs is wrong."""
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0]).to(dtype).requires_grad_(False)
    codes, state = bitsandbytes.functional.quantize_4bit(linear.weight.data, blocksize=64, quant_type="nf4")
    layer = quantised(Holder(linear)).linear
    assert isinstance(layer, Nf4Linear) and torch.equal(layer.weight, codes.view(-1)) and torch.equal(layer.absmax, state.absmax)
    x = torch.randn(3, 4, shape[1], dtype=dtype, requires_grad=True)
    found = layer(x)
    found.sum().backward()
    gradient, x.grad = x.grad, None
    expected = nn.functional.linear(x, looked_up(codes, state.absmax, shape).to(dtype), linear.bias)
    expected.sum().backward()
    assert torch.equal(found, expected) and torch.equal(gradient, x.grad)


def looked_up(codes: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The weight by the format's definition: the code's value times its block's scale."""
    table = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    values = table[torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], dim=1).flatten().long()][: shape[0] * shape[1]]
    return (values * absmax.repeat_interleave(64)[: values.numel()]).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_computes_what_bitsandbytes_layer_computes(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(128, 64).to(dtype).requires_grad_(False)
    theirs = bitsandbytes.nn.Linear4bit(128, 64, compute_dtype=dtype, quant_type="nf4", compress_statistics=False)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to(dtype).to("cpu")
    x = torch.randn(3, 128, dtype=dtype, requires_grad=True)
    theirs(x).sum().backward()
    gradient, x.grad = x.grad, None
    ours = quantised(Holder(linear)).linear(x)
    ours.sum().backward()
    assert torch.equal(ours, theirs(x)) and torch.equal(x.grad, gradient)


def test_it_is_close_to_the_weight():
    torch.manual_seed(0)
    linear = nn.Linear(256, 256, bias=False)
    weight = linear.weight.detach().clone()
    layer = quantised(Holder(linear)).linear
    error = (dequantised(layer.weight, layer.absmax, (256, 256), torch.float32) - weight).norm() / weight.norm()
    assert error < 0.12  # of numbers that are evenly spread, nf4's worst case; normal ones lose 0.09


@pytest.mark.parametrize("numel", [64, 1000, 1001, 64 * 64])
def test_a_rank_quantises_its_part_alone(numel):
    """Any part of codes and scales comes out as the same part of the whole."""
    torch.manual_seed(0)
    linear = nn.Linear(numel, 1, bias=False)
    sources: Sources = {}
    quantise(Holder(linear), sources)
    for parameter, source in sources.items():
        whole = source(0, parameter.numel())
        assert whole.dtype == parameter.dtype and whole.numel() == parameter.numel()
        for parts in (2, 3, 5):
            size = -(-parameter.numel() // parts)
            bounds = [(min(rank * size, parameter.numel()), min((rank + 1) * size, parameter.numel())) for rank in range(parts)]
            assert torch.equal(torch.cat([source(start, stop) for start, stop in bounds]), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_embeddings_norms_and_head_stay_in_full_precision(family):
    model = quantised(family_model(family, tied=False))
    full = {name for name, p in model.named_parameters() if p.dtype == torch.float32 and "absmax" not in name and p.ndim > 1}
    assert full == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_gradient_is_the_same_after_a_validation(dtype):
    """bitsandbytes' Linear4bit repacks its weights in eval mode on CPUs with AVX512_BF16; backward then gives no gradient."""
    model = add_lora(quantised(family_model("qwen2", tied=True).to(dtype)), LoraSection(r=5, dropout=0.1), seed=0)
    engine = SingleEngine(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), 1.0)
    batches = StepBatches().useful(0)
    probe = Probe(model.get_base_model().model.layers, [1, 2], FAMILY_HIDDEN)

    def probe_gradient() -> torch.Tensor:
        with probe.active(probe.zeros()) as rows:
            return engine.probe_gradient(useful_loss, batches, rows)[1]

    before = probe_gradient()
    losses = [engine.loss(useful_loss, batches) for _ in range(2)]
    assert losses[0] == losses[1]
    assert before.abs().min(dim=1).values.gt(0).all() and torch.equal(probe_gradient(), before)


def test_an_adapted_layer_keeps_its_adapter_in_float32():
    model = add_lora(quantised(family_model("llama", tied=True).to(torch.bfloat16)), LoraSection(r=5, target_modules=["q_proj"]), seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 8 and {p.dtype for p in trained} == {torch.float32}


def test_models_that_nf4_would_not_reach_are_refused():
    model = family_model("llama", tied=True)
    check_quantisable(facts_of(model, "m"))
    model.model.conv = nn.Parameter(torch.ones(2, 3, 4))  # a convolution is no expert
    check_quantisable(facts_of(model, "m"))
    model.mlp = nn.Module()
    model.mlp.experts = nn.Module()
    model.mlp.experts.gate_up_proj = nn.Parameter(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"model.quantization nf4 .* model.path m keeps experts in one tensor \(mlp.experts.gate_up_proj\): set it to none"):
        check_quantisable(facts_of(model, "m"))
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match=r"model.quantization nf4 needs unquantised weights, but those of model.path m are quantised: give the original"):
        check_quantisable(facts_of(model, "m"))
