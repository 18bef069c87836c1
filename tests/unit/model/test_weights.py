"""Weights in files: any slice of them, written as they come, and an adapter added one tensor at a time."""

import copy
import json
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.model import weights
from pipeline.model.models import add_lora
from pipeline.model.weights import (
    WeightFiles,
    fill,
    merged,
    placeholder,
    read,
    tensor_source,
    write_sharded,
)
from pipeline.recipe.sections import LoraSection
from tests.tiny import FAMILIES, family_model


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"a": (7, 5), "b": (3,), "c": (4, 3, 2), "d": (11, 2)}
    return {
        name: torch.randn(shape).to(torch.bfloat16 if name == "c" else torch.float32)
        for name, shape in shapes.items()
    }


def test_any_slice_of_any_file(tmp_path):
    given = tensors()
    write_sharded(given.items(), tmp_path, max_bytes=150)
    files = WeightFiles(tmp_path)
    assert set(files) == set(given) and len(list(tmp_path.glob("*.safetensors"))) > 1
    for name, tensor in given.items():
        assert (
            files[name].dtype == tensor.dtype
            and torch.equal(files[name], tensor)
            and files.shape(name) == tuple(tensor.shape)
        )
        flat = tensor.flatten()
        for start in range(flat.numel() + 1):
            for stop in range(start, flat.numel() + 1):
                assert torch.equal(files.flat(name, start, stop), flat[start:stop])


def test_the_files_are_visited_one_after_another(tmp_path):
    write_sharded(tensors().items(), tmp_path, max_bytes=150)
    files = WeightFiles(tmp_path)
    visited = [files._file_of[name] for name in files]
    assert visited == sorted(visited) and len(set(visited)) > 1


def test_an_index_without_its_file_is_refused(tmp_path):
    write_sharded(tensors().items(), tmp_path, max_bytes=150)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"model-00002-of-00002.safetensors is missing, though model.safetensors.index.json lists it",
    ):
        WeightFiles(tmp_path)


def test_writing_holds_one_file_and_the_next_tensor(tmp_path):
    """A gathered model passes through rank 0 without ever being there."""
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    def stream():
        nonlocal most
        for number in range(20):
            tensor = torch.full((100,), float(number))  # 400 bytes
            alive.add(tensor)
            most = max(most, len(alive))
            yield f"t{number:02d}", tensor
            del tensor

    write_sharded(stream(), tmp_path, max_bytes=1200)
    assert most <= 4
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 8000 and len(set(index["weight_map"].values())) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {*index["weight_map"].values(), "model.safetensors.index.json"}
    )


@pytest.mark.parametrize(
    ("name", "tensor"), [("nan", torch.tensor([1.0, float("nan")])), ("empty", torch.empty(0))]
)
def test_what_cannot_be_right_is_not_written_silently(tmp_path, name, tensor):
    with pytest.raises(AssertionError, match=name):
        write_sharded([(name, tensor)], tmp_path)


def test_views_of_one_tensor_are_written_apart(tmp_path):
    whole = torch.arange(6.0)
    write_sharded({"first": whole[:4], "second": whole[2:]}.items(), tmp_path, stem="other")
    assert torch.equal(load_file(tmp_path / "other.safetensors")["second"], whole[2:])


def test_a_placeholder_takes_no_memory_and_is_filled():
    parameter = placeholder((1000, 1000), torch.float32)
    assert parameter.untyped_storage().nbytes() == 4
    value = torch.randn(1000, 1000)
    fill({parameter: tensor_source(value)})
    assert torch.equal(parameter, value) and parameter.is_contiguous()


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(weights, "_CHUNK", 10)


@pytest.mark.parametrize("numel", [0, 1, 9, 10, 11, 995])
def test_any_number_of_pieces_is_read_into_its_place(numel, small_pieces):
    value, target = torch.randn(numel + 3), torch.full((numel,), float("nan"), dtype=torch.bfloat16)
    read(tensor_source(value), 3, target, torch.bfloat16)
    assert torch.equal(target, value[3:].bfloat16())


def test_threads_read_together_and_what_they_hold_is_bounded(small_pieces):
    """All of them at once, never more, and no piece waits in memory for another one."""
    lock, together = threading.Lock(), threading.Barrier(weights.READERS, timeout=60)
    alive: weakref.WeakSet = weakref.WeakSet()
    most, threads = 0, set()

    def source(start: int, stop: int) -> torch.Tensor:
        nonlocal most
        value = torch.arange(start, stop, dtype=torch.float32)
        with lock:
            alive.add(value)
            most = max(most, len(alive))
            threads.add(threading.get_ident())
        together.wait()
        return value

    target = torch.empty(100 * weights.READERS)
    read(source, 0, target, torch.float32)
    assert torch.equal(target, torch.arange(target.numel(), dtype=torch.float32))
    # A thread that got its next piece may still hold the last one for a moment.
    assert (
        threading.get_ident() not in threads
        and len(threads) == weights.READERS
        and most <= 2 * weights.READERS
    )
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_an_error_in_a_thread_is_raised_and_ends_the_reading(small_pieces):
    """That of the first piece, whatever a later one said sooner."""
    asked = []

    def source(start: int, stop: int) -> torch.Tensor:
        asked.append(start)
        time.sleep(0.2 if start == 10 else 0.001)
        if start >= 10:
            raise OSError(f"no element {start}")
        return torch.zeros(stop - start)

    with pytest.raises(OSError, match=r"^no element 10$"):
        read(source, 0, torch.empty(100_000), torch.float32)
    assert len(asked) < 9_000 and not [
        thread for thread in threading.enumerate() if thread.name.startswith("weights")
    ]


def test_threads_share_the_files(tmp_path, small_pieces):
    given = {name: torch.randn(300, 7) for name in "abcd"}
    write_sharded(given.items(), tmp_path, max_bytes=10_000)
    files = WeightFiles(tmp_path)
    for name, tensor in given.items():
        target = torch.empty(tensor.numel() - 5)
        read(weights.file_source(files, name), 5, target, torch.float32)
        assert torch.equal(target, tensor.view(-1)[5:])


def trained_adapter(model, targets: list[str]):
    adapted = add_lora(model, LoraSection(r=5, alpha=7, target_modules=targets), seed=1)
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_bit_for_bit_what_peft_merges_in_float32(tmp_path, family, tied, dtype):
    from pipeline.training.product import _updates

    base = family_model(family, tied).to(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    adapted = trained_adapter(copy.deepcopy(base).float(), ["q_proj", "v_proj", "down_proj"])
    gathered = {
        name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad
    }
    files = WeightFiles(tmp_path / "base")
    assert len({files._file_of[name] for name in files}) > 1
    write_sharded(
        merged(files, _updates(gathered), 7 / 5, dtype), tmp_path / "merged", max_bytes=20_000
    )
    base.config.save_pretrained(tmp_path / "merged")
    expected = adapted.merge_and_unload().to(dtype).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype).state_dict()
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], expected[name]) and found[name].dtype == dtype for name in expected
    )
    assert ("lm_head.weight" in WeightFiles(tmp_path / "merged")) is not tied


def test_an_update_of_an_unknown_weight_is_refused(tmp_path):
    save_file({"a": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(AssertionError):
        list(
            merged(
                WeightFiles(tmp_path),
                {"b": (torch.ones(1, 2), torch.ones(2, 1))},
                1.0,
                torch.float32,
            )
        )


def test_nothing_in_the_folder_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        WeightFiles(tmp_path)
