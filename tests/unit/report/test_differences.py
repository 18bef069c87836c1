"""Paired differences: their sign and value, what pairing buys, and what resampling seeds and prompts sees."""

import numpy as np
import pytest

from pipeline.report.differences import HEADER, difference, difference_rows


def outcomes(rates: list[float], prompts: int = 150, seed: int = 0) -> dict[int, dict[str, float]]:
    rng = np.random.default_rng(seed)
    hard = rng.random(prompts)  # the same prompts are hard for every method and seed
    return {
        s: {f"p{i}": float(hard[i] < rate) for i in range(prompts)} for s, rate in enumerate(rates)
    }


def test_a_method_minus_itself_is_nothing_but_not_certainly_so():
    """A bootstrap of prompts that all come out alike is a point; 12 of 12 equal says little."""
    found = difference(outcomes([0.5, 0.6]), outcomes([0.5, 0.6]))
    assert (
        found.value == 0
        and -0.04 < found.low < -0.01
        and 0.01 < found.high < 0.04
        and not found.clear
    )
    few = difference({0: {str(i): 0.0 for i in range(12)}}, {0: {str(i): 0.0 for i in range(12)}})
    assert few.value == 0 and (few.low, few.high) == pytest.approx((-0.2425, 0.2425), abs=1e-3)


def test_more_seeds_do_not_make_more_prompts_of_those_that_come_out_alike():
    same = {str(i): 1.0 for i in range(12)}
    one, three = (
        difference(dict.fromkeys(range(count), same), dict.fromkeys(range(count), same))
        for count in (1, 3)
    )
    assert (one.low, one.high) == (three.low, three.high)


def test_a_difference_has_its_sign_and_size():
    method, reference = (
        {0: {"a": 0.0, "b": 1.0}, 1: {"a": 0.0, "b": 0.0}},
        {0: {"a": 1.0, "b": 1.0}, 1: {"a": 1.0, "b": 0.0}},
    )
    found = difference(method, reference)
    assert found.value == pytest.approx(-0.5) and found.low < found.value < found.high
    assert str(found).startswith("-0.50 [-")


def test_a_large_difference_over_all_seeds_is_clear():
    found = difference(outcomes([0.3, 0.35, 0.3]), outcomes([0.8, 0.75, 0.85]))
    assert found.clear and found.high < -0.3 and str(found).endswith("*")


def test_seeds_that_disagree_widen_the_interval():
    agree = difference(outcomes([0.4, 0.4, 0.4]), outcomes([0.6, 0.6, 0.6]))
    differ = difference(outcomes([0.1, 0.4, 0.7]), outcomes([0.6, 0.6, 0.6]))
    assert (
        differ.high - differ.low > 2 * (agree.high - agree.low) and agree.clear and not differ.clear
    )


def test_pairing_cancels_what_prompts_have_in_common():
    paired = difference(outcomes([0.5, 0.5]), outcomes([0.55, 0.55]))
    mixed_up = difference(outcomes([0.5, 0.5]), outcomes([0.55, 0.55], seed=1))
    assert paired.high - paired.low < (mixed_up.high - mixed_up.low) / 2


def test_three_seeds_answers_to_one_prompt_are_not_three_prompts():
    """Where all seeds agree on every prompt, they tell nothing that one of them does not: the interval is as wide."""
    one, reference = outcomes([0.5], prompts=60), {0: {f"p{i}": float(i % 2) for i in range(60)}}
    alone = difference(one, reference)
    thrice = difference({s: one[0] for s in range(3)}, {s: reference[0] for s in range(3)})
    assert thrice.value == alone.value and thrice.high - thrice.low == pytest.approx(
        alone.high - alone.low, rel=0.1
    )


def test_only_common_seeds_and_prompts_count():
    assert (
        difference({0: {"a": 1.0}}, {1: {"a": 0.0}}) is None
        and difference({0: {"a": 1.0}}, {0: {"b": 0.0}}) is None
    )
    assert (
        difference({0: {"a": 1.0, "c": 1.0}, 5: {"a": 0.0}}, {0: {"a": 0.0, "b": 1.0}}).value == 1.0
    )


def test_rows_compare_every_method_with_every_reference_but_itself():
    found = {
        name: {"non_refusal": outcomes([rate]), "over_refusal": {}, "ordinary": {}, "exact": {}}
        for name, rate in (("sft", 0.9), ("safe_mix", 0.4), ("sap", 0.3))
    }
    rows = difference_rows(found, ["sft", "safe_mix"])
    assert [row[:2] for row in rows] == [
        ("safe_mix", "sft"),
        ("sap", "sft"),
        ("sft", "safe_mix"),
        ("sap", "safe_mix"),
    ]
    assert all(len(row) == len(HEADER) and row[3] == "" for row in rows) and rows[1][2].startswith(
        "-0."
    )
