"""Weights in 4 bits: bitsandbytes' numbers in layers that can be sharded, and none of its traps."""

import contextlib
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from torch import nn

from pipeline.defences.sap.probe import Probe
from pipeline.engines.single import SingleEngine
from pipeline.model import quantization
from pipeline.model.model_outline import facts_of
from pipeline.model.models import add_lora
from pipeline.model.quantization import Nf4Linear, dequantised, quantise
from pipeline.model.weights import Sources, fill, placeholder, read, tensor_source
from pipeline.objectives.losses import useful_loss
from pipeline.recipe.sections import LoraSection, ModelSection, TrainSection
from pipeline.stages import checks
from pipeline.stages.checks import check_quantisable
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
    codes, state = bitsandbytes.functional.quantize_4bit(
        linear.weight.data, blocksize=64, quant_type="nf4"
    )
    layer = quantised(Holder(linear)).linear
    assert (
        isinstance(layer, Nf4Linear)
        and torch.equal(layer.weight, codes.view(-1))
        and torch.equal(layer.absmax, state.absmax)
    )
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
    values = table[torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], dim=1).flatten().long()][
        : shape[0] * shape[1]
    ]
    return (values * absmax.repeat_interleave(64)[: values.numel()]).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_computes_what_bitsandbytes_layer_computes(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(128, 64).to(dtype).requires_grad_(False)
    theirs = bitsandbytes.nn.Linear4bit(
        128, 64, compute_dtype=dtype, quant_type="nf4", compress_statistics=False
    )
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
    error = (
        dequantised(layer.weight, layer.absmax, (256, 256), torch.float32) - weight
    ).norm() / weight.norm()
    # of numbers that are evenly spread, nf4's worst case; normal ones lose 0.09
    assert error < 0.12


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
            bounds = [
                (min(rank * size, parameter.numel()), min((rank + 1) * size, parameter.numel()))
                for rank in range(parts)
            ]
            assert torch.equal(torch.cat([source(start, stop) for start, stop in bounds]), whole)


def read_by(source, parameter: nn.Parameter, rank: int, ranks: int) -> torch.Tensor:
    """The part of the parameter that an engine keeps on that rank."""
    size = -(-parameter.numel() // ranks)
    start, stop = (min(number * size, parameter.numel()) for number in (rank, rank + 1))
    part = torch.empty(stop - start, dtype=parameter.dtype)
    read(source, start, part, parameter.dtype)
    return part


def counted(weight: torch.Tensor, read_elements: list[tuple[int, int]]):
    def source(start: int, stop: int) -> torch.Tensor:
        read_elements.append((start, stop))
        return weight.reshape(-1)[start:stop]

    return source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [1, 63, 65, 7 * 64, 1001, 64 * 1024 + 33, 3 * 64 * 1024 + 1])
def test_ranks_have_the_bits_that_the_operator_gives_for_the_whole(numel, dtype, monkeypatch):
    """Cuts in the middle of a block, pieces of several threads, a weight in another dtype in its files."""
    monkeypatch.setattr("pipeline.model.weights._CHUNK", 5000)
    torch.manual_seed(0)
    weight = torch.randn(numel)
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight.to(dtype), blocksize=64, quant_type="nf4"
    )
    holder, seen = Holder(nn.Linear(numel, 1, bias=False, dtype=dtype)), []
    holder.linear.weight = placeholder((1, numel), dtype)
    sources = Sources({holder.linear.weight: counted(weight, seen)})
    quantise(holder, sources)
    for ranks in (1, 2, 3, 7):
        for parameter, expected in (
            (holder.linear.weight, codes.view(-1)),
            (holder.linear.absmax, state.absmax),
        ):
            parts = [read_by(sources[parameter], parameter, rank, ranks) for rank in range(ranks)]
            assert torch.equal(torch.cat(parts), expected)


def test_a_short_block_of_zeros_has_the_scale_zero():
    linear = nn.Linear(100, 1, bias=False)
    linear.weight.data[:, 64:] = 0
    assert quantised(Holder(linear)).linear.absmax[1] == 0


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_weight_is_read_once_for_codes_and_scales(ranks, monkeypatch):
    """But for a block or two where a rank's codes and scales are cut at different ones."""
    monkeypatch.setattr("pipeline.model.weights._CHUNK", 1000)
    torch.manual_seed(0)
    shapes = {"first": (100, 641), "second": (50, 64)}
    model, seen = Holder(nn.Linear(1, 1)), {name: [] for name in shapes}
    sources = Sources()
    for name, shape in shapes.items():
        linear = nn.Linear(*reversed(shape), bias=False)
        linear.weight = placeholder(shape, torch.float32)
        sources[linear.weight] = counted(torch.randn(shape), seen[name])
        setattr(model, name, linear)
    quantise(model, sources)
    for rank in range(ranks):
        for parameter, source in sources.items():
            read_by(source, parameter, rank, ranks)
    for name, shape in shapes.items():
        numel = shape[0] * shape[1]
        # Pieces of codes that end in a block's middle are read to its end, and from its start.
        inner = 2 * 64 * -(-numel // 2 // 1000)
        assert (
            numel
            <= sum(stop - start for start, stop in seen[name])
            <= numel + inner + 4 * 64 * ranks
        )


def test_scales_are_kept_of_the_latest_weight_alone():
    latest = quantization._Latest()
    given = torch.float32, 640, torch.device("cpu"), latest
    first, second = (
        quantization._Blocks(tensor_source(torch.randn(640)), *given) for _ in range(2)
    )
    first.codes(0, 64)
    assert len(latest.of(first)) == 1
    expected = first.scales(0, 10)
    second.codes(0, 320)
    known = torch.cat([scales for _, scales in latest.of(second)])
    assert not latest.of(first) and torch.equal(second.scales(3, 10), known[3:])
    assert torch.equal(first.scales(0, 10), expected), "what is forgotten is read again"


def test_it_is_quantised_where_it_is_asked_to_be_in_pieces(monkeypatch):
    """Meta stands for a GPU: bitsandbytes has an operator there that computes nothing."""
    operator, seen = quantization._operator, []
    monkeypatch.setattr(quantization, "_ON_GPU", 64 * 10)

    def recorded(weights: torch.Tensor):
        seen.append((weights.device.type, weights.numel(), weights.dtype))
        return operator(weights)

    monkeypatch.setattr(quantization, "_operator", recorded)
    for device in ("meta", "cpu"):
        holder = Holder(nn.Linear(641, 3, bias=False))
        weight = placeholder((3, 641), torch.bfloat16)
        holder.linear.weight = weight
        sources = Sources({weight: tensor_source(torch.randn(3, 641))})
        quantise(holder, sources, device)
        for parameter, source in sources.items():
            part = source(3, parameter.numel())
            assert part.device.type == device and part.dtype == parameter.dtype
            assert part.numel() == parameter.numel() - 3
        sizes = [640, 640, 640, 3] if device == "meta" else [1923]
        assert seen == [(device, size, torch.bfloat16) for size in sizes]
        seen.clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_only_embeddings_norms_and_head_stay_in_full_precision(family):
    model = quantised(family_model(family, tied=False))
    full = {
        name
        for name, p in model.named_parameters()
        if p.dtype == torch.float32 and "absmax" not in name and p.ndim > 1
    }
    assert full == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_gradient_is_the_same_after_a_validation(dtype):
    """bitsandbytes' Linear4bit repacks its weights in eval mode on CPUs with AVX512_BF16;
    backward then gives no gradient.
    """
    model = add_lora(
        quantised(family_model("qwen2", tied=True).to(dtype)), LoraSection(r=5, dropout=0.1), seed=0
    )
    engine = SingleEngine(
        model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), 1.0
    )
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
    model = add_lora(
        quantised(family_model("llama", tied=True).to(torch.bfloat16)),
        LoraSection(r=5, target_modules=["q_proj"]),
        seed=0,
    )
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
    with pytest.raises(
        ValueError,
        match=r"model.quantization nf4 .* model.path m keeps experts in one tensor "
        r"\(mlp.experts.gate_up_proj\): set it to none",
    ):
        check_quantisable(facts_of(model, "m"))
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(
        ValueError,
        match=r"model.quantization nf4 needs unquantised weights, but those of model.path m are "
        r"quantised: give the original",
    ):
        check_quantisable(facts_of(model, "m"))


@pytest.mark.parametrize(
    ("torch_version", "engine", "refused"),
    [("2.11.0+cu130", "fsdp2", True), ("2.11.0", "zero3", False), ("2.12.0", "fsdp2", False)],
)
def test_fsdp2_takes_4_bits_from_the_torch_on_that_can(monkeypatch, torch_version, engine, refused):
    """On a GPU with torch 2.11: "only Tensors of floating point dtype can require gradients", with a traceback."""
    monkeypatch.setattr(checks, "version", lambda name: torch_version)
    base = SimpleNamespace(model=ModelSection(path="m", quantization="nf4", dtype="float32"))
    sentence = (
        "train.engine fsdp2 cannot shard 4-bit weights with torch 2.11.0.*: install torch 2.12 or "
        "newer, or set train.engine to zero3"
    )
    with pytest.raises(ValueError, match=sentence) if refused else contextlib.nullcontext():
        checks.check_training("train", TrainSection(steps=1, engine=engine, ranks=1), base, None, 1)
