"""Who gets which samples: the same for any number of ranks, as many passes for each, and fillers that weigh nothing."""

import pytest
import torch

from pipeline.objectives.batches import BatchOrder, micro_batches, pair_batches
from pipeline.objectives.losses import safety_loss, useful_loss
from pipeline.objectives.sharing import accumulation, check_shares, fillers
from tests.tiny import tiny_lora, tiny_model, tiny_pairs, tiny_rows


def test_micro_batches_do_not_depend_on_the_ranks():
    rows, indices = tiny_rows(), BatchOrder(40, 8, 3).step(2)
    alone = micro_batches(rows, indices, 2, 0, 1, 0, 0, 2)
    shared = [micro_batches(rows, indices, 2, rank, 2, 0, 0, 2) for rank in range(2)]
    merged = [shared[number % 2][number // 2] for number in range(4)]
    for a, b in zip(alone, merged, strict=True):
        assert (
            (a.input_ids == b.input_ids).all()
            and a.seed == b.seed
            and a.global_tokens == b.global_tokens
        )
    assert alone[0].global_tokens == sum(
        sum(label != -100 for label in rows[i]["labels"][1:]) for i in indices
    )


def test_uneven_sets_give_every_rank_as_many_passes():
    pairs = tiny_pairs(7)
    shares = [pair_batches(pairs, list(range(7)), 2, rank, 3, 0, 0, 0) for rank in range(3)]
    assert {len(share) for share in shares} == {2}
    assert sum(batch.input_ids.shape[0] // 2 for share in shares for batch in share) == 7


def test_an_epoch_sees_every_sample_once():
    order = BatchOrder(10, 4, 0)
    seen = [index for step in range(5) for index in order.step(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_shares_of_a_batch_are_equal():
    check_shares("align.train.batch_size", 8, 4)
    with pytest.raises(
        ValueError,
        match=r"^align.train.batch_size 8 is not divisible by 6 ranks: use a multiple of 6, or 4 ranks$",
    ):
        check_shares("align.train.batch_size", 8, 6)


@pytest.mark.parametrize("samples, size, ranks", [(8, 4, 4), (10, 4, 2), (4, 2, 8), (7, 2, 3)])
def test_the_passes_of_a_rank_are_counted_before_they_are_made(samples, size, ranks):
    made = shares(pair_batches, tiny_pairs(samples), samples, size, ranks)
    assert {len(share) for share in made} == {accumulation(samples, size, ranks)}
    idle = sum(not batch.weights.any() for share in made for batch in share)
    note = fillers("safety_pairs.batch_size", samples, size, ranks)
    assert (
        note is None
        if idle == 0
        else note.startswith(
            f"safety_pairs.batch_size {samples} leaves {idle} of {ranks} ranks without a pair"
        )
    )


# samples, micro-batch, ranks
SCARCE = [
    (100, 1, 8),
    (50, 1, 8),
    (32, 4, 64),
    (48, 2, 64),
    (1, 4, 2),
    (1, 1, 2),
    (3, 2, 2),
    (5, 4, 8),
]


def shares(make, rows, samples: int, size: int, ranks: int) -> list[list]:
    return [make(rows, list(range(samples)), size, rank, ranks, 0, 0, 0) for rank in range(ranks)]


@pytest.mark.parametrize("samples, size, ranks", SCARCE)
def test_small_sets_are_filled_up_with_what_weighs_nothing(samples, size, ranks):
    rows, pairs = tiny_rows(samples), tiny_pairs(samples)
    useful, safety = (
        shares(micro_batches, rows, samples, size, ranks),
        shares(pair_batches, pairs, samples, size, ranks),
    )
    tokens = sum((batch.labels[:, 1:] != -100).sum().item() for share in useful for batch in share)
    expected = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    assert (
        {len(share) for share in useful}
        == {len(share) for share in safety}
        == {-(-samples // (size * ranks))}
    )
    assert {batch.global_tokens for share in useful for batch in share} == {tokens} == {expected}
    assert {batch.global_pairs for share in safety for batch in share} == {samples}
    assert sum(batch.weights.sum().item() for share in safety for batch in share) == samples
    for batch in (batch for share in safety for batch in share):
        silent = (batch.labels == -100).all(dim=1)
        assert (
            torch.equal(silent, (batch.weights == 0).repeat(2))
            and batch.weights.dtype == torch.float32
        )


@pytest.mark.parametrize(
    "samples, size, ranks", [(8, 2, 2), (8, 4, 1), (7, 2, 3), (48, 2, 1), (9, 4, 2)]
)
def test_what_suffices_is_shared_without_fillers(samples, size, ranks):
    pairs = [
        batch
        for share in shares(pair_batches, tiny_pairs(samples), samples, size, ranks)
        for batch in share
    ]
    assert (
        all(batch.weights.all() for batch in pairs)
        and sum(len(batch.weights) for batch in pairs) == samples
    )
    useful = [
        batch
        for share in shares(micro_batches, tiny_rows(samples), samples, size, ranks)
        for batch in share
    ]
    assert sum(len(batch.labels) for batch in useful) == samples and all(
        (batch.labels != -100).any(dim=1).all() for batch in useful
    )


FILLED = [
    (micro_batches, useful_loss),
    (pair_batches, safety_loss("logsigmoid")),
    (pair_batches, safety_loss("difference")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make, loss_fn", FILLED)
def test_a_filler_is_a_differentiable_zero(make, loss_fn, dtype):
    """Its backward runs through every layer, so that its rank takes part in the collectives, and gives exact zeros."""
    rows = tiny_rows(3) if make is micro_batches else tiny_pairs(3)
    for model in (tiny_model(dtype), tiny_lora(dtype)):
        (batch,) = make(rows, [0, 1, 2], 1, 3, 4, 0, 0, 0)
        loss = loss_fn(model, batch)
        assert loss.item() == 0.0 and loss.requires_grad
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        assert all(gradient is not None and not gradient.any() for gradient in gradients), (
            "zeros, not absent and not NaN"
        )


@pytest.mark.parametrize("make, loss_fn", FILLED)
def test_the_loss_does_not_depend_on_the_fillers(make, loss_fn):
    rows = tiny_rows(3) if make is micro_batches else tiny_pairs(3)
    model = tiny_model(torch.float64)
    alone, filled = (
        sum(loss_fn(model, b).item() for share in shares(make, rows, 3, 1, ranks) for b in share)
        for ranks in (1, 8)
    )
    assert alone == pytest.approx(filled, rel=1e-12)


def test_weights_go_to_the_device():
    (batch,) = pair_batches(tiny_pairs(2), [0, 1], 2, 0, 1, 0, 0, 0)
    moved = batch.to("meta")
    assert {getattr(moved, name).device.type for name in ("input_ids", "weights")} == {"meta"}
    assert {tensor.device.type for tensor in vars(moved.targets).values()} == {"meta"}
