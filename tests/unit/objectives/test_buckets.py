"""Micro-batches by tokens: samples, loss and gradient of rows by number, equal passes for all, less padding."""

import random
from itertools import chain

import pytest
import torch

from pipeline.objectives.batches import BatchOrder, micro_batches
from pipeline.objectives.buckets import cost, cut, pack
from pipeline.objectives.losses import useful_loss
from pipeline.training.loop import padding
from tests.tiny import tiny_lora, tiny_model, tiny_rows

ROWS = tiny_rows(64, longest=60)
BUDGET = 130


def shares(
    rows: list[dict], indices: list[int], ranks: int, budget: int | None, step: int = 0
) -> list[list]:
    return [
        micro_batches(rows, indices, 4, rank, ranks, 0, 0, step, budget) for rank in range(ranks)
    ]


def gradient(model, batches) -> tuple[float, torch.Tensor]:
    """Summed loss, and the gradients as one vector."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = useful_loss(model, batch)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def draws(count: int = 200) -> list[tuple[list[int], int, int]]:
    """Random lengths, budget and ranks; the budget holds the longest row, at times just."""
    rng = random.Random(0)
    found = []
    for _ in range(count):
        lengths = [
            rng.choice([rng.randint(2, 9), rng.randint(2, 200)]) for _ in range(rng.randint(1, 40))
        ]
        found.append(
            (
                lengths,
                max(lengths) + rng.choice([0, 1, rng.randint(0, 900)]),
                rng.choice([1, 2, 3, 8]),
            )
        )
    return found


def partitions(items: list[int]):
    """Every way to divide the items into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for groups in partitions(rest):
        yield [[first], *groups]
        for index, group in enumerate(groups):
            yield [*groups[:index], [first, *group], *groups[index + 1 :]]


# of rounding, for either
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("make", [tiny_model, tiny_lora])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_loss_and_gradient_are_those_of_rows_by_number(make, ranks, dtype, bound):
    model, order = make(dtype), BatchOrder(len(ROWS), 16, 0)
    for step in range(3):
        expected, whole = gradient(model, shares(ROWS, order.step(step), 1, None)[0])
        loss, found = gradient(
            model, list(chain.from_iterable(shares(ROWS, order.step(step), ranks, BUDGET)))
        )
        assert loss == pytest.approx(expected, rel=bound)
        assert (found - whole).norm() / whole.norm() < bound


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_sample_is_in_one_micro_batch_and_every_rank_has_as_many(ranks):
    order, passes = BatchOrder(len(ROWS), 24, 5), set()
    for step in range(6):
        made = shares(ROWS, order.step(step), ranks, BUDGET, step=step)
        longest = max(len(row["input_ids"]) for row in ROWS)
        ids = [
            row.tolist() + [0] * (longest - len(row))
            for batch in chain.from_iterable(made)
            for row in batch.input_ids
        ]
        assert sorted(ids) == sorted(
            row + [0] * (longest - len(row))
            for row in (ROWS[i]["input_ids"] for i in order.step(step))
        )
        assert all(batch.input_ids.numel() <= BUDGET for share in made for batch in share)
        (count,) = {len(share) for share in made}
        passes.add(count)
    assert len(passes) > 1 or ranks > 2, "the number of passes follows the samples' lengths"


def test_a_cut_keeps_the_budget_and_loses_nothing():
    for lengths, budget, ranks in draws():
        chunks = cut(lengths, budget, ranks)
        assert sorted(position for chunk in chunks for position in chunk) == list(
            range(len(lengths))
        )
        costs = [cost(lengths, chunk) for chunk in chunks]
        assert costs == sorted(costs, reverse=True) and costs[0] <= budget
        assert len(chunks) % ranks == 0 or len(chunks) == len(lengths) < ranks * -(
            -len(lengths) // ranks
        )
        assert cut(lengths, budget, ranks) == chunks


def test_no_way_to_group_the_rows_takes_fewer_passes_or_has_a_cheaper_costliest_one():
    rng = random.Random(1)
    for _ in range(40):
        lengths = [rng.randint(2, 40) for _ in range(6)]
        budget, ranks = max(lengths) + rng.randint(0, 60), rng.choice([1, 2])
        costs = [
            [cost(lengths, group) for group in groups] for groups in partitions(list(range(6)))
        ]
        allowed = [found for found in costs if max(found) <= budget]
        chunks = cut(lengths, budget, ranks)
        least = min(map(len, allowed))
        assert len(chunks) == -(-least // ranks) * ranks
        assert cost(lengths, chunks[0]) == min(
            max(found) for found in allowed if len(found) <= len(chunks)
        )


def test_a_packing_keeps_the_budget_and_loses_nothing():
    for lengths, budget, ranks in draws():
        chunks = pack(lengths, budget, ranks)
        assert sorted(position for chunk in chunks for position in chunk) == list(
            range(len(lengths))
        )
        totals = [sum(lengths[position] for position in chunk) for chunk in chunks]
        assert totals == sorted(totals, reverse=True) and totals[0] <= budget and min(totals) > 0
        assert len(chunks) % ranks == 0 or len(chunks) == len(lengths) < ranks * -(
            -len(lengths) // ranks
        )
        assert len(chunks) <= max(len(cut(lengths, budget, ranks)), ranks), (
            "what is not padded takes no more passes"
        )
        assert pack(lengths, budget, ranks) == chunks


def test_a_packing_takes_few_passes_that_cost_about_the_same():
    """At most 11/9 of the least number and one more, which no group of rows could undercut; level where that fits."""
    rng = random.Random(4)
    for _ in range(40):
        lengths = [rng.randint(2, 40) for _ in range(6)]
        budget = max(lengths) + rng.randint(0, 60)
        totals = [
            [sum(lengths[i] for i in group) for group in groups]
            for groups in partitions(list(range(6)))
        ]
        least = min(len(found) for found in totals if max(found) <= budget)
        assert len(pack(lengths, budget, 1)) <= least * 11 / 9 + 6 / 9
    lengths = [rng.randint(20, 200) for _ in range(64)]
    totals = [sum(lengths[position] for position in chunk) for chunk in pack(lengths, 1024, 2)]
    assert len(totals) == 8 and max(totals) - min(totals) < 0.05 * max(totals) < 0.05 * 1024


def test_packed_rows_are_bounded_too_where_a_set_is_larger_than_a_step():
    lengths = [5, 40, 7, 7, 30, 6, 8, 5, 5, 6] * 3
    free, bound = pack(lengths, 200, 2), pack(lengths, 200, 2, most=4)
    assert max(map(len, free)) > 4 >= max(map(len, bound)) and len(bound) % 2 == 0
    assert sorted(chain.from_iterable(bound)) == list(range(30))


def test_rows_are_bounded_too_where_a_set_is_larger_than_a_step():
    """Validation and the direction's samples: a pass of the budget's rows could hold more than a step's."""
    lengths = [5, 40, 7, 7, 30, 6, 8, 5, 5, 6] * 3
    free, bound = cut(lengths, 200, 2), cut(lengths, 200, 2, most=4)
    assert max(map(len, free)) > 4 >= max(map(len, bound)) and len(bound) % 2 == 0
    assert sorted(chain.from_iterable(bound)) == list(range(30)) and all(
        cost(lengths, chunk) <= 200 for chunk in bound
    )


def test_ranks_pass_over_nearly_as_much_in_every_turn():
    """Rank 0 has at most one micro-batch's tokens more than the last: a pass has what lies next by cost."""
    for lengths, budget, ranks in draws():
        costs = [cost(lengths, chunk) for chunk in cut(lengths, budget, ranks)]
        if len(costs) % ranks == 0:
            sums = [sum(costs[rank::ranks]) for rank in range(ranks)]
            assert max(sums) - min(sums) <= costs[0] - costs[-1]


def test_the_cut_is_the_same_for_any_ranks_by_which_the_passes_divide():
    """Dropout too: its seed goes with a micro-batch's number."""
    indices = BatchOrder(len(ROWS), 24, 3).step(1)
    (alone,) = shares(ROWS, indices, 1, BUDGET)
    ranks = next(count for count in (2, 3, 5, 7) if len(alone) % count == 0)
    shared = shares(ROWS, indices, ranks, BUDGET)
    for number, batch in enumerate(alone):
        other = shared[number % ranks][number // ranks]
        assert torch.equal(batch.input_ids, other.input_ids) and batch.seed == other.seed


def test_fewer_rows_than_ranks_are_filled_up_with_what_weighs_nothing():
    made = shares(ROWS, [0, 1, 2], 8, BUDGET)
    assert {len(share) for share in made} == {1}
    silent = [batch for share in made for batch in share if (batch.labels == -100).all()]
    shortest = min(len(ROWS[i]["input_ids"]) for i in (0, 1, 2))
    assert [batch.input_ids.numel() for batch in silent] == [shortest] * 5
    model = tiny_model(torch.float64)
    expected, whole = gradient(model, shares(ROWS, [0, 1, 2], 1, None)[0])
    loss, found = gradient(model, [batch for share in made for batch in share])
    assert (
        loss == pytest.approx(expected, rel=1e-12) and (found - whole).norm() / whole.norm() < 1e-12
    )


def test_widely_drawn_lengths_are_padded_less():
    """At no more tokens a pass than rows by number need: a third of the passes, and padding falls from 47% to 23%."""
    rng = random.Random(2)
    lengths = [int(rng.lognormvariate(5, 0.8)) + 2 for _ in range(256)]
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in lengths]
    order = BatchOrder(256, 64, 0)
    by_number = [batch for step in range(4) for batch in shares(rows, order.step(step), 1, None)[0]]
    budget = max(batch.input_ids.numel() for batch in by_number)
    by_tokens = [
        batch for step in range(4) for batch in shares(rows, order.step(step), 1, budget)[0]
    ]
    assert padding(by_tokens) < 0.6 * padding(by_number)
    assert len(by_tokens) < len(by_number) / 3
