"""Products of the single process, also of a model whose files give its weights other names."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pipeline.engines.engine import Engine
from pipeline.engines.open import open_engine
from pipeline.model.loading import open_model
from pipeline.model.models import add_lora, check_targets, make_trainable
from pipeline.model.weights import WeightFiles
from pipeline.recipe.sections import LoraSection, ModelSection, TrainSection
from pipeline.training.product import load_adapter, save_model, save_product
from tests.project import make_tokenizer
from tests.tiny import family_model


@pytest.fixture(params=["own names", "other names"])
def model_folder(tmp_path, request) -> Path:
    """A saved model; other names: saved without its head, as `layers.0...` where the model has `model.layers.0...`."""
    model = family_model("llama", tied=True)
    (model if request.param == "own names" else model.model).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(folder: Path, train: TrainSection) -> tuple[Engine, ModelSection]:
    """An engine whose weights are not those it started with."""
    section = ModelSection(path=str(folder), dtype="float32", attention="sdpa")
    model, sources = open_model(section, str(folder), sharded=False)
    engine = open_engine(make_trainable(model, train, seed=0), train, sources)
    torch.manual_seed(5)
    for p in engine.parameters:
        p.data.add_(0.1 * torch.randn_like(p))
    return engine, section


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(torch.arange(12).view(2, 6)).logits.detach()


def test_adapter_and_merged_model_answer_alike(model_folder, tmp_path):
    train = TrainSection(
        engine="single",
        steps=1,
        export_merged=True,
        lora=LoraSection(r=5, target_modules=["q_proj", "down_proj"]),
    )
    engine, section = trained(model_folder, train)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        save_product(engine, train, section.path, section, tmp_path / "out", make_tokenizer())
    renamed = "model.norm.weight" not in WeightFiles(model_folder)
    assert renamed == any("is merged whole on rank 0" in str(w.message) for w in caught)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "merged"]
    expected = logits(engine.module)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    assert torch.equal(logits(load_adapter(base, tmp_path / "out" / "adapter")), expected)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert torch.allclose(logits(merged), expected, atol=1e-4) and merged.config.use_cache


@pytest.mark.parametrize(
    ("tied", "own_names", "stored"),
    [
        (True, True, "embedding"),
        (True, False, "embedding"),
        (True, True, "head"),
        (False, True, "both"),
    ],
    ids=["tied", "tied, other names", "tied, stored as the head", "untied"],
)
def test_an_adapted_head_merges_into_what_was_trained(tmp_path, tied, own_names, stored):
    """Where the head shares the embedding's weight, adding the adapter to it would change what the model reads."""
    model = family_model("llama", tied)
    (model if own_names else model.model).save_pretrained(tmp_path / "base")
    if stored == "head":
        state = load_file(tmp_path / "base" / "model.safetensors")
        state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
        save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    lora = LoraSection(r=5, target_modules=["q_proj", "lm_head"])
    train = TrainSection(engine="single", steps=1, export_merged=True, lora=lora)
    engine, section = trained(tmp_path / "base", train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        save_product(engine, train, section.path, section, tmp_path / "out", make_tokenizer())
    expected = logits(engine.module)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert (logits(base) - expected).abs().max() > 0.1, "the adapter does something"
    assert torch.equal(logits(load_adapter(base, tmp_path / "out" / "adapter")), expected)
    merged, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "merged", output_loading_info=True
    )
    assert not any(report.values()) and not merged.config.tie_word_embeddings
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    embeddings = (m.get_input_embeddings().weight for m in (merged, family_model("llama", tied)))
    assert torch.equal(*embeddings), "the adapter is the head's alone"


@pytest.mark.parametrize(
    ("targets", "count"),
    [("all-linear", 7 * 4), (r".*\.[1-2]\..*(q|k)_proj", 4), (["self_attn.q_proj", "lm_head"], 5)],
)
def test_the_modules_that_peft_adapts_are_those_that_were_checked(targets, count):
    model = family_model("llama", tied=False)
    lora = LoraSection(r=2, target_modules=targets)
    names = check_targets(model, lora, "train")
    adapted = add_lora(model, lora, seed=0)
    found = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert found == [f"base_model.model.{name}" for name in names] and len(names) == count


def test_transposed_weights_are_not_adapted():
    """GPT-2's: PEFT's all-linear would take them, and B A be added the wrong way round when merged."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    cases = {
        "all-linear": "matches no linear module",
        ("c_attn",): "names 'c_attn'",
        ".*c_attn": "is not a linear module",
    }
    for targets, expected in cases.items():
        with pytest.raises(ValueError, match=expected):
            lora = LoraSection(target_modules=targets if isinstance(targets, str) else [*targets])
            check_targets(model, lora, "train")


def test_a_fully_trained_model_is_what_was_trained(model_folder, tmp_path):
    train = TrainSection(engine="single", adapter="full", steps=1)
    engine, section = trained(model_folder, train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        save_product(engine, train, section.path, section, tmp_path / "out", make_tokenizer())
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "model", output_loading_info=True
    )
    assert not any(report.values()) and torch.equal(logits(model), logits(engine.module))
    assert "lm_head.weight" not in WeightFiles(tmp_path / "out" / "model"), (
        "tied weights are written once"
    )
    assert (tmp_path / "out" / "model" / "tokenizer.json").is_file()


def test_a_weight_that_is_not_finite_is_not_a_product(model_folder, tmp_path):
    engine, section = trained(model_folder, TrainSection(engine="single", adapter="full", steps=1))
    engine.parameters[0].data.view(-1)[3] = float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(AssertionError, match="is not finite"):
            save_model(engine, section.path, section, tmp_path / "out", make_tokenizer())
