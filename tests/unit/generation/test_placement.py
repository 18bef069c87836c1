"""Where an evaluated model is put, as far as a machine without GPUs can tell:
the map of its layers, and accelerate's hooks on a CPU.
"""

import copy

import pytest
import torch

from pipeline.evaluation.evaluate import token_loss
from pipeline.generation.generation import generate
from pipeline.generation.placement import device_map, dispatch, place
from pipeline.model.models import decoder_layers
from tests.project import make_tokenizer
from tests.tiny import FAMILIES, LAYERS, family_model, tiny_lora, tiny_model, tiny_rows

MODELS = {
    "adapter": tiny_lora,
    "tied": tiny_model,
    **{name: lambda name=name: family_model(name, tied=False) for name in FAMILIES},
}
PLENTY = 10**9  # bytes, of a GPU

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=MODELS)
def model(request) -> torch.nn.Module:
    return MODELS[request.param]()


def gpu_of_layers(model: torch.nn.Module, placed: dict[str, int]) -> list[int]:
    """The GPU of every decoder layer; fails where a layer's parts are placed apart."""
    names = {module: name for name, module in model.named_modules()}
    return [
        next(gpu for name, gpu in placed.items() if f"{names[layer]}.".startswith(f"{name}."))
        for layer in decoder_layers(model)
    ]


@pytest.mark.parametrize("gpus", [2, 4])
def test_layers_are_spread_in_order_and_stay_whole(model, gpus):
    placed = device_map(model, {gpu: PLENTY for gpu in range(gpus)})
    layers = gpu_of_layers(model, placed)
    assert len(layers) == LAYERS and layers == sorted(layers)
    assert set(placed.values()) >= {0, 1} and layers.count(0) <= LAYERS // 2 + 1, (
        "the first GPU has room for all, and does not get it"
    )


def test_a_model_that_the_gpus_cannot_hold_is_refused(model):
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with pytest.raises(ValueError, match="does not fit on the 2 GPUs"):
        device_map(model, {0: size // 4, 1: size // 4, "cpu": PLENTY})


def test_inputs_go_to_the_embeddings(model):
    """generate and token_loss put them where the first parameter is."""
    assert next(model.parameters()) is model.get_input_embeddings().weight


def test_without_gpus_a_model_stays_on_the_cpu(model):
    assert place(model) is model and {p.device.type for p in model.parameters()} == {"cpu"}


def test_answers_and_loss_come_through_the_hooks_unchanged(model):
    """accelerate's hooks move nothing here, but everything passes them:
    arguments, caches, and what the losses ask the head for.
    """
    tokenizer, prompts, rows = make_tokenizer(), [[5, 6, 7], [11, 3, 60, 21, 9], [8]], tiny_rows(7)
    hooked = dispatch(copy.deepcopy(model), {"": "cpu"}, force_hooks=True)
    assert hasattr(hooked, "_hf_hook") and all(
        hasattr(layer, "_hf_hook") for layer in decoder_layers(hooked)
    )
    answers = generate(model, tokenizer, prompts, 6, 2)
    assert len(set(answers)) > 1 and generate(hooked, tokenizer, prompts, 6, 2) == answers
    assert token_loss(hooked, rows, 0, 8) == token_loss(model, rows, 0, 8)
