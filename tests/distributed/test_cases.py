"""The equivalence matrix covers what it says, stays small, and is the same every time."""

from dataclasses import asdict

import pytest

from tests.distributed.cases import (
    EXCLUSIONS,
    Case,
    all_cases,
    exclusion,
    fetched,
    matrix_cases,
    product_of_factors,
    requirements,
)
from tests.distributed.covering import cover, groups, groups_with
from tests.distributed.matrix import StepData
from tests.tiny import FAMILIES, FAMILY_HIDDEN, FAMILY_RANK, VOCABULARY


def seen(cases, size: int) -> set:
    return set().union(*(groups(asdict(case), size) for case in cases))


def test_every_pair_of_factors_is_covered():
    assert seen(matrix_cases(), 2) == seen(all_cases(), 2)


def test_every_pair_is_covered_within_every_engine():
    """Hence every engine x adapter x schedule; counted once more below, without the code that chose the cases."""

    def within(cases):
        return set().union(*(groups_with(asdict(case), "engine", 3) for case in cases))

    assert within(matrix_cases()) == within(all_cases())
    triples = {(case.engine, case.adapter, case.schedule) for case in matrix_cases()}
    assert len(triples) == 3 * 3 * 3
    ways = {(case.engine, fetched(case), case.schedule) for case in matrix_cases()}
    assert len(ways) == 3 * 3 * 3 + 3, "and ZeRO-3's fourth way"


def test_the_matrix_is_small_and_has_both_group_sizes():
    assert len(set(matrix_cases())) == len(matrix_cases()) <= 60
    assert {(case.engine, case.ranks) for case in matrix_cases()} == {
        ("single", 1), ("zero3", 2), ("zero3", 3), ("fsdp2", 2), ("fsdp2", 3),
    }  # fmt: skip
    assert len({str(case) for case in all_cases()}) == len(all_cases()), (
        "names must tell cases apart"
    )


def test_the_same_cases_every_time():
    rows = [asdict(case) for case in all_cases()]
    assert {Case(**row) for row in cover(rows, requirements)} == set(matrix_cases())


def test_exactly_the_excluded_combinations_are_missing():
    for case in product_of_factors():
        impossible = (
            (case.engine == "single") != (case.ranks == 1)
            or (case.engine != "zero3" and (case.persistence or case.offload_optimizer or case.offload_param))
        )  # fmt: skip
        assert (exclusion(case) is not None) == impossible, case
    reasons = {exclusion(case) for case in product_of_factors()} - {None}
    assert reasons == {reason for reason, _ in EXCLUSIONS}, (
        "an exclusion that excludes nothing is a mistake"
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_sizes_do_not_divide(ranks):
    assert all(
        size % ranks
        for size in (
            FAMILY_HIDDEN,
            FAMILY_RANK,
            VOCABULARY,
            FAMILY_HIDDEN * FAMILY_RANK,
            FAMILY_HIDDEN * VOCABULARY,
        )
    )
    assert len(FAMILIES) >= 3


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_unequal_data_are_unequal_for_ranks_and_micro_batches(ranks, accumulation):
    def tokens(unequal: bool) -> list[list[int]]:
        data = [StepData(unequal, accumulation, rank, ranks) for rank in range(ranks)]
        return [
            [int((batch.labels[:, 1:] != -100).sum()) for batch in one.useful(0)] for one in data
        ]

    counts = tokens(unequal=True)
    assert all(len(row) == accumulation for row in counts)
    assert len({sum(row) for row in counts}) > 1 and all(
        len(set(row)) > 1 or accumulation == 1 for row in counts
    )
    assert len({count for row in tokens(unequal=False) for count in row}) == 1


def test_cover_takes_the_first_of_the_best():
    rows = [{"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 2, "b": 2}]
    assert cover(rows, lambda row: groups(row, 1)) == [rows[0], rows[3]]
    assert cover(rows, lambda row: groups(row, 2)) == [rows[0], rows[3], rows[1], rows[2]], (
        "what was used least comes first"
    )
