"""Two ranks of either engine on a model's files, against the single process:
loading, 4 bits, products, the safety direction.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.model.models import load_model, make_trainable
from pipeline.recipe.sections import TrainSection
from tests.distributed import streamed_worker as worker
from tests.distributed.ranks import spawn
from tests.tiny import family_model

pytestmark = [pytest.mark.processes, pytest.mark.slow]

ENGINES = ["zero3", "fsdp2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model's files, several of them, with tied embeddings and without."""
    path = tmp_path_factory.mktemp("streamed")
    for name in ("tied", "untied"):
        family_model("qwen2", name == "tied").save_pretrained(path / name, max_shard_size="20KB")
    damaged = family_model("qwen2", tied=True)
    damaged.model.layers[1].mlp.up_proj.weight.data[-1, -1] = float("nan")
    damaged.save_pretrained(path / "damaged")
    return path


@pytest.fixture(scope="module")
def found(folder) -> dict[str, dict]:
    for engine in ENGINES:
        spawn(worker.WORLD, worker.main, engine, str(folder))
    return {engine: torch.load(folder / f"{engine}.pt", weights_only=True) for engine in ENGINES}


@pytest.fixture(scope="module")
def single(folder) -> dict[str, dict]:
    return {
        "quantised": worker.quantised(folder, "single"),
        "direction": worker.direction(folder, "single"),
    }


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return torch.sqrt(
        sum((a[name].double() - b[name].double()).square().sum() for name in a)
    ).item()


@pytest.mark.parametrize("case", ["-".join(map(str, case)) for case in worker.LOADS])
@pytest.mark.parametrize("engine", ENGINES)
def test_shards_hold_the_loaded_models_bits_dtypes_and_bytes(found, engine, case):
    result = found[engine]["loads"][case]
    assert result["same"]
    assert result["bytes"] == pytest.approx(1, abs=0.02), "once over all ranks, but for the padding"


def adapter_start(folder: Path) -> dict:
    model = make_trainable(
        load_model(str(folder / "tied"), torch.float32),
        TrainSection(steps=1, lora=worker.LORA),
        seed=0,
    )
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_training_in_4_bits_equals_the_single_process(found, single, folder, engine, checkpointing):
    name = f"checkpointing {checkpointing}"
    update = distance(single["quantised"][name], adapter_start(folder))
    share = distance(found[engine]["quantised"][name], single["quantised"][name]) / update
    print(f"{engine} nf4 {name}: {share:.1e} of the update")
    assert share < 1e-5


def test_4_bits_are_not_the_model_in_full_precision(single, folder):
    """The control: what the comparison above would miss if nothing were quantised."""
    full = worker.run(worker.start(folder, "single"), sap=True)
    quantised = single["quantised"]["checkpointing False"]
    assert distance(full, quantised) / distance(quantised, adapter_start(folder)) > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_4_bit_shards_really_shrink(found, single, engine):
    assert found[engine]["quantised"]["held"] == pytest.approx(
        0.5, abs=0.05
    )  # tiny tensors, each padded to 64 bytes
    assert found[engine]["quantised"]["codes"] == pytest.approx(0.5, abs=0.001)  # bytes a weight
    assert found[engine]["quantised"]["loss"] == pytest.approx(
        single["quantised"]["loss"], rel=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_fully_trained_model_is_loaded_by_from_pretrained(found, folder, engine, dtype):
    product, trained = folder / f"{engine}-full-{dtype}", found[engine]["products"][f"full-{dtype}"]
    model, report = AutoModelForCausalLM.from_pretrained(product, output_loading_info=True)
    assert (
        not any(report.values()) and model.config.use_cache and model.dtype == getattr(torch, dtype)
    )
    for name, p in model.named_parameters():
        assert torch.equal(p, trained[name].to(p.dtype))
    assert AutoTokenizer.from_pretrained(product).chat_template
    assert sorted(path.name for path in product.glob("*.safetensors")) == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_merged_model_is_what_peft_merges(found, folder, engine, dtype):
    trained = found[engine]["products"][f"lora-{dtype}"]
    adapted = make_trainable(
        load_model(str(folder / "tied"), torch.float32),
        TrainSection(steps=1, lora=worker.LORA),
        seed=0,
    )
    missing = adapted.load_state_dict(trained, strict=False)
    assert not missing.unexpected_keys
    expected = adapted.merge_and_unload().to(getattr(torch, dtype)).state_dict()
    model, report = AutoModelForCausalLM.from_pretrained(
        folder / f"{engine}-lora-{dtype}", output_loading_info=True
    )
    assert not any(report.values()) and all(
        torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapted_head_that_was_tied_is_the_single_process_one_and_merges(found, folder, engine):
    trained, start = found[engine]["tied_head"], load_model(str(folder / "tied"), torch.float32)
    expected = worker.tied_head(folder, "single")
    update = torch.sqrt(
        sum(t.double().square().sum() for name, t in expected.items() if "lora_B" in name)
    ).item()
    assert distance(trained, expected) / update < 1e-4
    merged, report = AutoModelForCausalLM.from_pretrained(
        folder / f"{engine}-head", output_loading_info=True
    )
    a, b = (
        next(t for name, t in trained.items() if f"lm_head.lora_{part}" in name) for part in "AB"
    )
    assert not any(report.values()) and torch.equal(
        merged.model.embed_tokens.weight, start.model.embed_tokens.weight
    )
    assert torch.equal(
        merged.lm_head.weight, start.lm_head.weight + (b @ a) * (worker.LORA.alpha / worker.LORA.r)
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_weight_that_is_not_finite_is_named_by_all_ranks_together(found, folder, engine):
    first, second = found[engine]["damaged"]
    weight = "model.layers.1.mlp.up_proj.weight"
    assert (
        first == second and f"model.path '{folder / 'damaged'}': weight {weight} holds NaN" in first
    )


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_direction_is_the_single_process_one_and_survives_its_files(
    found, single, engine, adapter
):
    result, expected = found[engine]["direction"][adapter], single["direction"][adapter]
    norm = torch.sqrt(sum(t.double().square().sum() for t in expected["vector"].values())).item()
    assert result["same"] and distance(result["vector"], expected["vector"]) / norm < 1e-5
    assert result["checksum"] == expected["checksum"] != result["moved"], (
        "initial weights have the same bits on every engine"
    )
    assert len(result["summary"]["layers"]) == 4
    for row, wanted in zip(result["summary"]["layers"], expected["summary"]["layers"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_summary_is_that_of_the_whole_vectors(single, adapter):
    result = single["direction"][adapter]
    for row in result["summary"]["layers"]:
        part = [
            t.double().flatten()
            for name, t in result["vector"].items()
            if f".layers.{row['layer']}." in name
        ]
        assert row["safety_norm"] == pytest.approx(torch.cat(part).norm().item(), rel=1e-9)
    assert result["summary"]["norm"] == pytest.approx(
        torch.cat([t.double().flatten() for t in result["vector"].values()]).norm().item()
    )
