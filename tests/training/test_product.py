"""Products of the single process, also of a model whose files give its weights other names."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.loading import open_model
from pipeline.models import make_trainable
from pipeline.sections import LoraSection, ModelSection, TrainSection
from pipeline.sharding.engine import Engine
from pipeline.sharding.launch import open_engine
from pipeline.training.product import load_adapter, save_model, save_product
from pipeline.weights import WeightFiles
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
    section = ModelSection(path=str(folder), dtype="float32")
    model, sources = open_model(section, str(folder), sharded=False)
    engine = open_engine(make_trainable(model, train, seed=0), train, sources)
    torch.manual_seed(5)
    for p in engine.parameters:
        p.data.add_(0.1 * torch.randn_like(p))
    return engine, section


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(torch.arange(12).view(2, 6)).logits.detach()


def test_adapter_and_merged_model_answer_alike(model_folder, tmp_path):
    train = TrainSection(engine="single", steps=1, export_merged=True, lora=LoraSection(r=5, target_modules=["q_proj", "down_proj"]))
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


def test_a_fully_trained_model_is_what_was_trained(model_folder, tmp_path):
    train = TrainSection(engine="single", adapter="full", steps=1)
    engine, section = trained(model_folder, train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        save_product(engine, train, section.path, section, tmp_path / "out", make_tokenizer())
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", output_loading_info=True)
    assert not any(report.values()) and torch.equal(logits(model), logits(engine.module))
    assert "lm_head.weight" not in WeightFiles(tmp_path / "out" / "model"), "tied weights are written once"
    assert (tmp_path / "out" / "model" / "tokenizer.json").is_file()


def test_a_weight_that_is_not_finite_is_not_a_product(model_folder, tmp_path):
    engine, section = trained(model_folder, TrainSection(engine="single", adapter="full", steps=1))
    engine.parameters[0].data.view(-1)[3] = float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(AssertionError, match="is not finite"):
            save_model(engine, section.path, section, tmp_path / "out", make_tokenizer())
