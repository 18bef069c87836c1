"""Streamed loading gives the model that from_pretrained gives, and no rank ever holds more than its part."""

import errno
import json
import os
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from pipeline.model.loading import load_whole, open_model
from pipeline.model.model_facts import read_facts
from pipeline.model.models import (
    check_weights,
    damaged_weight,
    load_chat,
    load_model,
    make_trainable,
    outline,
)
from pipeline.model.quantization import quantise
from pipeline.model.weights import WeightFiles, fill, not_finite
from pipeline.recipe.sections import LoraSection, ModelSection, TrainSection
from pipeline.system.system_errors import BrokenFile, sentence
from tests.model_folder import change, make_folder
from tests.project import make_model
from tests.tiny import FAMILIES, family_model
from tests.tools import measure_loading

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def saved(folder: Path, family: str = "llama", tied: bool = True) -> str:
    family_model(family, tied).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return str(folder)


def section(location: str, dtype: torch.dtype = torch.float32, **changes) -> ModelSection:
    return ModelSection(
        path=location, dtype=str(dtype).removeprefix("torch."), attention="sdpa", **changes
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_streamed_model_is_the_loaded_one(tmp_path, family, tied, dtype):
    location = saved(tmp_path, family, tied)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, sources = open_model(section(location, dtype), location, sharded=True)
    assert set(sources) == set(model.parameters()) and all(
        p.untyped_storage().nbytes() <= 4 for p in sources
    )
    expected = load_model(location, dtype)
    fill(sources)
    assert type(model) is type(expected) and model.training and not model.config.use_cache
    for found, wanted in (
        (model.named_parameters(), expected.named_parameters()),
        (model.named_buffers(), expected.named_buffers()),
    ):
        found, wanted = dict(found), dict(wanted)
        assert found.keys() == wanted.keys()
        assert all(
            found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name])
            for name in wanted
        )
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seeds_adapter_has_the_same_bits_however_the_model_is_loaded(tmp_path, dtype):
    location = saved(tmp_path)
    train = TrainSection(
        engine="fsdp2", steps=1, lora=LoraSection(r=5, target_modules=["q_proj", "down_proj"])
    )

    def adapter(model) -> dict[str, torch.Tensor]:
        return {
            name: p
            for name, p in make_trainable(model, train, seed=3).named_parameters()
            if p.requires_grad
        }

    streamed, loaded = (
        adapter(open_model(section(location, dtype), location, sharded=True)[0]),
        adapter(load_model(location, dtype)),
    )
    assert streamed.keys() == loaded.keys() and all(
        torch.equal(streamed[name], loaded[name]) for name in loaded
    )
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in streamed.values())


def rename(folder: Path, old: str = "model.", new: str = "") -> None:
    """Give weights other names; these are those of a model that was saved without its head,
    and transformers knows them.
    """
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        save_file(
            {name.replace(old, new, 1): t for name, t in state.items()},
            path,
            metadata={"format": "pt"},
        )
    index = folder / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())
    index.write_text(
        json.dumps(
            {
                **mapping,
                "weight_map": {
                    name.replace(old, new, 1): file for name, file in mapping["weight_map"].items()
                },
            }
        )
    )


def store_both(folder: Path) -> None:
    path = next(
        path
        for path in folder.glob("*.safetensors")
        if "model.embed_tokens.weight" in load_file(path)
    )
    state = load_file(path)
    save_file(
        {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()},
        path,
        metadata={"format": "pt"},
    )
    index = folder / "model.safetensors.index.json"
    index.write_text(
        index.read_text().replace(
            '"weight_map": {', f'"weight_map": {{"lm_head.weight": "{path.name}",'
        )
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rename, "its files hold no model.embed_tokens.weight and lm_head.weight"),
        (store_both, "its files hold both of the tied"),
    ],
    ids=["renamed", "both"],
)
def test_what_transformers_converts_is_loaded_whole_with_a_warning(tmp_path, change, reason):
    location = saved(tmp_path)
    expected = load_model(location, torch.float32).state_dict()
    change(tmp_path)
    with pytest.warns(
        UserWarning, match=f"{location} is loaded whole on every rank, because {reason}"
    ):
        model, sources = open_model(section(location), location, sharded=True)
    assert not sources and all(
        torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items()
    )


def test_a_weight_that_is_missing_is_not_drawn_at_random(tmp_path):
    location = saved(tmp_path)
    rename(tmp_path, "model.norm.weight", "model.norm.gone")
    with (
        pytest.warns(UserWarning, match="is loaded whole"),
        pytest.raises(ValueError, match=r"lacks the weight model.norm.weight"),
    ):
        open_model(section(location), location, sharded=True)


def damage(folder: Path, name: str, value: float) -> None:
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        if name in state:
            state[name].view(-1)[-1] = value
            save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, quantization, value, word):
    location, name = saved(tmp_path), "model.layers.2.mlp.up_proj.weight"
    damage(tmp_path, name, value)
    with pytest.raises(ValueError, match=rf"model.path '{location}': weight {name} holds {word}"):
        load_whole(section(location, quantization=quantization), location)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_is_said_of_a_weight_is_what_is_wrong_with_its_first_piece(
    tmp_path, quantization, monkeypatch
):
    """Once a weight, in the files' order, whichever thread was first."""
    location, names = (
        saved(tmp_path),
        [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 2)],
    )
    for name in names:
        for path in tmp_path.glob("*.safetensors"):
            state = load_file(path)
            if name in state:
                state[name].view(-1)[130], state[name].view(-1)[-1] = float("inf"), float("nan")
                save_file(state, path, metadata={"format": "pt"})
    monkeypatch.setattr("pipeline.model.weights._CHUNK", 64)
    monkeypatch.setattr("pipeline.model.quantization._ON_CPU", 64)
    _, sources = open_model(section(location, quantization=quantization), location, sharded=True)
    flat = WeightFiles.flat

    def late(self, name: str, start: int, stop: int) -> torch.Tensor:
        if start <= 130 < stop:
            time.sleep(0.05)  # the thread of the last piece is there before
        return flat(self, name, start, stop)

    monkeypatch.setattr(WeightFiles, "flat", late)
    fill(sources)
    assert sources.damaged == [damaged_weight(location, name, "infinity") for name in names]


def test_large_weights_whose_sum_overflows_are_finite():
    huge = torch.full((100,), 3e38)
    assert not_finite(huge) is None and not_finite(torch.tensor([1, 2])) is None
    assert (
        not_finite(torch.full((9,), 6e4).half()) is None
        and not_finite(torch.ones(3).to(torch.float8_e4m3fn)) is None
    )
    assert not_finite(torch.cat([huge, torch.tensor([float("nan")])])) == "NaN"
    assert not_finite(torch.tensor([[0.0, float("inf")]]).bfloat16()) == "infinity"


def test_files_are_held_against_the_models_outline(tmp_path):
    location = saved(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    outlined, label = outline(section(location)), f"model.path {location}"

    def check() -> None:
        check_weights(outlined, read_facts(section(location), tmp_path).tensors, label)

    check()
    rename(tmp_path, "model.", "transformer.model.")  # transformers may know what they are
    check()
    rename(tmp_path, "transformer.model.", "model.")
    path = next(
        path for path in tmp_path.glob("*.safetensors") if "model.norm.weight" in load_file(path)
    )
    state = load_file(path)
    save_file(state | {"model.norm.weight": torch.ones(3)}, path)
    sizes = f"model.norm.weight is 3 in {path.name}, but config.json makes it 35"
    with pytest.raises(ValueError, match=f"model.path {location}: {sizes}"):
        check()
    with (
        pytest.warns(UserWarning, match="is loaded whole"),
        pytest.raises(ValueError, match=r"is \(3,\) in the files"),
    ):
        open_model(section(location), location, sharded=True)
    del state["model.norm.weight"]
    save_file(state, path)
    index = tmp_path / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())["weight_map"]
    del mapping["model.norm.weight"]
    change(index, weight_map=mapping)
    with pytest.raises(ValueError, match=r"lacks the weight model.norm.weight"):
        check()


def test_a_hub_models_files_are_looked_at_once_they_are_here(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    change(make_folder(snapshot) / "tokenizer_config.json", pad_token="[PAD]")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("pipeline.model.loading.weight_files", lambda *_: WeightFiles(snapshot))
    with pytest.raises(
        ValueError, match=r"model.path owner/name: pad_token '\[PAD\]' has id 20, .* has 20 rows"
    ):
        open_model(section("owner/name"), "owner/name", sharded=True)


def test_a_persistent_buffer_comes_from_the_files(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    class WithBuffer(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("scale", torch.ones(3))

    location = saved(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    save_file(
        {**load_file(path), "scale": torch.tensor([1.0, 2.0, 3.0])}, path, metadata={"format": "pt"}
    )
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        index.read_text().replace('"weight_map": {', f'"weight_map": {{"scale": "{path.name}",')
    )
    monkeypatch.setattr(
        "pipeline.model.loading.AutoModelForCausalLM.from_config",
        lambda config, dtype, **_: WithBuffer._from_config(config, dtype=dtype),
    )
    model, sources = open_model(section(location), location, sharded=True)
    assert sources and model.scale.tolist() == [1.0, 2.0, 3.0]


def test_quantised_models_are_whole_and_alike_by_either_way(tmp_path):
    """From slices of the files, or, where they cannot be streamed, from the model in memory."""
    location = saved(tmp_path, "qwen2")
    streamed = load_whole(section(location, torch.bfloat16, quantization="nf4"), location)
    store_both(tmp_path)
    with pytest.warns(UserWarning, match="is loaded whole"):
        loaded = load_whole(section(location, torch.bfloat16, quantization="nf4"), location)
    found, expected = streamed.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )
    assert streamed.generation_config.eos_token_id == loaded.generation_config.eos_token_id
    ids = torch.arange(6).view(1, 6)
    assert torch.equal(streamed(ids).logits, loaded(ids).logits)


def test_training_and_evaluation_quantise_on_the_same_device(tmp_path, monkeypatch):
    """This process's accelerator, wherever the weights are kept afterwards; a whole model is still on the CPU."""
    location, asked = saved(tmp_path), []

    def recorded(model, sources, device):
        asked.append(device)
        quantise(model, sources, "cpu")

    monkeypatch.setattr("pipeline.model.loading.quantise", recorded)
    monkeypatch.setattr("pipeline.model.loading.device", lambda: torch.device("cuda", 1))
    whole = load_whole(section(location, quantization="nf4"), location)
    for sharded in (True, False):
        open_model(section(location, quantization="nf4"), location, sharded)
    assert asked == [torch.device("cuda", 1)] * 3 and {
        p.device.type for p in whole.parameters()
    } == {"cpu"}


def test_what_cannot_be_had_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"model.path 'no/such-model' could not be loaded"
    ) as caught:
        open_model(section("no/such-model"), "no/such-model", sharded=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sharded", [True, False])
def test_a_folder_that_vanished_since_it_was_checked_is_no_model_of_the_hub(
    tmp_path, monkeypatch, sharded
):
    location = saved(tmp_path / "model")
    monkeypatch.setattr(Path, "is_dir", lambda path: True)  # it goes a moment after the last look
    shutil.rmtree(location)
    with pytest.raises(FileNotFoundError) as gone:
        open_model(section(location), location, sharded)
    assert (
        gone.value.filename == location
        and "bring it back if it was moved or unmounted" in sentence(gone.value)
    )


@pytest.mark.parametrize(
    "name", ["generation_config.json", "config.json", "tokenizer_config.json", "tokenizer.json"]
)
def test_a_file_that_this_machine_cannot_read_is_not_left_out_and_no_bad_input(tmp_path, name):
    make_model(tmp_path)
    load_chat(section(str(tmp_path)))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/proc/self/mem")  # opens, and gives EIO
    with pytest.raises(OSError) as found:
        load_chat(section(str(tmp_path)))
    assert found.value.errno == errno.EIO


HARM = {
    "cut": lambda folder: os.truncate(folder / "model-00002-of-00013.safetensors", 500),
    "emptied": lambda folder: os.truncate(folder / "model-00002-of-00013.safetensors", 0),
    "header": lambda folder: (folder / "model-00002-of-00013.safetensors").write_bytes(
        b"\xff" * 300
    ),
    "index": lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
    "no map": lambda folder: change(folder / "model.safetensors.index.json", weight_map=None),
    "no tensors": lambda folder: save_file(
        {"x": torch.zeros(1)}, folder / "model-00002-of-00013.safetensors"
    ),
}


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("harm", HARM)
def test_files_that_broke_after_they_were_checked_are_one_sentence_that_names_the_file(
    tmp_path, sharded, harm
):
    """Before they were they are bad input: tests/unit/model/test_model_facts.py."""
    location = saved(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 13
    HARM[harm](tmp_path)
    if (harm, sharded) == ("no tensors", False):  # transformers says itself what is missing
        with pytest.raises(ValueError, match="lacks the weight"):
            load_model(location, torch.float32)
        return
    with pytest.raises(BrokenFile) as broken:
        _, sources = open_model(section(location), location, sharded)
        fill(sources)
    name = (
        "model.safetensors.index.json"
        if harm in ("index", "no map")
        else "model-00002-of-00013.safetensors"
    )
    said = sentence(broken.value)
    assert said.startswith(str(tmp_path / name)) and "\n" not in said
    assert said.endswith(
        "copy or download it again, and run the same command again; finished stages and checkpoints are kept"
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, int]:
    """A model of some 190 MB in files of 40 MB, and the size of the largest."""
    folder = tmp_path_factory.mktemp("large")
    measure_loading.in_own_process(measure_loading.make_model, folder / "small", 64, 2, 10**9)
    measure_loading.in_own_process(measure_loading.make_model, folder / "model", 768, 4, 40 * 10**6)
    files = list((folder / "model").glob("*.safetensors"))
    assert len(files) > 3
    return folder, max(path.stat().st_size for path in files)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_host_memory_stays_below_the_shards_and_one_file(large, engine, tmp_path):
    folder, file_bytes = large
    common = {"location": str(folder / "model"), "adapter": "lora"}
    cases = [
        {**common, "streamed": True, "quantization": "none"},
        {**common, "streamed": True, "quantization": "nf4"},
        # a cast: float32 would be a view of the mapped files
        {**common, "streamed": False, "quantization": "none", "dtype": "bfloat16"},
    ]
    streamed, nf4, whole = measure_loading.measure(
        engine, folder / "small", cases, tmp_path / "rows.json"
    )
    weights = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    assert streamed["shards"] == pytest.approx(weights, rel=0.01), "every weight once, in float32"
    for row in (streamed, nf4):
        assert (
            row["anonymous"] < row["shards"] + file_bytes
            and row["mapped"] < file_bytes + 10 * 2**20
        )
    # Layers take 4 bits and a 64th of a float32 instead of 32 bits; embeddings and head stay as they are.
    full = 2 * 8192 * 768 * 4
    assert nf4["shards"] == pytest.approx(full + (weights - full) * (0.5 + 4 / 64) / 4, rel=0.01)
    assert whole["anonymous"] > whole["shards"] + weights / 4, (
        "the control: two whole copies in bfloat16 are seen"
    )


def test_a_model_that_cannot_recompute_is_refused_or_left_as_it_is():
    config = OpenAIGPTConfig(vocab_size=97, n_embd=16, n_layer=1, n_head=2)
    train = {"steps": 1, "adapter": "full"}
    make_trainable(
        OpenAIGPTLMHeadModel(config), TrainSection(**train, gradient_checkpointing="auto"), 0
    )
    with pytest.raises(
        ValueError,
        match=r"OpenAIGPTLMHeadModel cannot recompute activations: set train.gradient_checkpointing .* to false",
    ):
        make_trainable(
            OpenAIGPTLMHeadModel(config), TrainSection(**train, gradient_checkpointing=True), 0
        )
