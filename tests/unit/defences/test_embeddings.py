"""Embeddings of one process against the layers' own outputs; sharded ones equal them:
tests/distributed/test_sharded.py.
"""

import pytest
import torch

from pipeline.defences.saft.embeddings import embed, position_weights
from pipeline.engines.open import open_engine
from pipeline.recipe.layer_choice import read_layer
from pipeline.recipe.sections import TrainSection
from tests.tiny import tiny_lora, tiny_rows


@pytest.mark.parametrize(
    ("labels", "position", "weights"),
    [
        ([-100, -100, 5, 6], "response_start", [0, 1, 0, 0]),
        ([-100, -100, 5, 6], "response_mean", [0, 0, 0.5, 0.5]),
        ([-100, -100, 5, 6], "response_end", [0, 0, 0, 1]),
        # the last of several turns, and something behind it
        ([-100, 4, -100, 5, -100], "response_start", [0, 0, 1, 0, 0]),
        ([-100, 4, -100, 5, -100], "response_mean", [0, 0, 0, 1, 0]),
        ([3, 4], "response_start", [1, 0]),
    ],
)
def test_which_positions_make_up_a_vector(labels, position, weights):
    assert position_weights(labels, position) == weights


@pytest.mark.parametrize(
    ("layer", "count", "index"), [(0, 4, 0), (3, 4, 3), (0.5, 32, 16), (0.99, 4, 3), (0.0, 4, 0)]
)
def test_layers_by_index_or_fraction(layer, count, index):
    assert read_layer(layer, count) == index


def test_a_layer_outside_the_model_is_refused():
    with pytest.raises(
        ValueError, match=r"saft.layer 4 is outside the model: it has decoder layers 0 to 3"
    ):
        read_layer(4, 4)


@pytest.mark.parametrize("position", ["response_start", "response_mean", "response_end"])
def test_embeddings_are_the_layer_s_output_and_leave_no_trace(position):
    rows, layer = tiny_rows(11), 2
    model = tiny_lora(dropout=0.3)
    engine = open_engine(model, TrainSection(engine="single", steps=1))
    found = embed(engine, rows, layer, position, micro_batch_size=4, pad_id=0)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    model.eval()
    for row, vector in zip(rows, found, strict=True):
        with torch.no_grad():
            states = model(
                input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True
            ).hidden_states[layer + 1][0]
        expected = torch.tensor(position_weights(row["labels"], position)) @ states
        assert torch.allclose(vector, expected, atol=1e-5)
    assert found.norm(dim=1).min() > 0
