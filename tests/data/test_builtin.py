"""The project's own task, and archives that are not what they should be."""

import sqlite3

from pipeline.data import text_to_sql
from pipeline.data.batches import BatchOrder, check_divides, micro_batches, pair_batches
from tests.tiny import tiny_pairs, tiny_rows


def test_every_query_runs():
    database = sqlite3.connect(":memory:")
    for table in text_to_sql.tables():
        database.execute(text_to_sql.schema(table))
    for row in text_to_sql.text_to_sql_rows():
        database.execute(row["response"])


def test_questions_are_distinct_and_always_the_same():
    rows = text_to_sql.text_to_sql_rows()
    assert len({row["prompt"] for row in rows}) == len(rows) > 1000
    assert rows == text_to_sql.text_to_sql_rows()


def test_micro_batches_do_not_depend_on_the_ranks():
    rows, indices = tiny_rows(), BatchOrder(40, 8, 3).step(2)
    alone = micro_batches(rows, indices, 2, 0, 1, 0, 0, 2)
    shared = [micro_batches(rows, indices, 2, rank, 2, 0, 0, 2) for rank in range(2)]
    merged = [shared[number % 2][number // 2] for number in range(4)]
    for a, b in zip(alone, merged, strict=True):
        assert (a.input_ids == b.input_ids).all() and a.seed == b.seed and a.global_tokens == b.global_tokens
    assert alone[0].global_tokens == sum(sum(label != -100 for label in rows[i]["labels"][1:]) for i in indices)


def test_uneven_sets_give_every_rank_as_many_passes():
    pairs = tiny_pairs(7)
    shares = [pair_batches(pairs, list(range(7)), 2, rank, 3, 0, 0, 0) for rank in range(3)]
    assert {len(share) for share in shares} == {2}
    assert sum(batch.input_ids.shape[0] // 2 for share in shares for batch in share) == 7


def test_an_epoch_sees_every_sample_once():
    order = BatchOrder(10, 4, 0)
    seen = [index for step in range(5) for index in order.step(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_division_is_checked():
    import pytest

    check_divides("train", 8, 2, 2)
    with pytest.raises(ValueError, match="train.batch_size 8 .* multiple of 6"):
        check_divides("train", 8, 2, 3)
