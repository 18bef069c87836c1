"""Intervals against published values, and what exact match folds."""

import math

import pytest

from pipeline.judges.metrics import (
    difference_of_shares,
    exact_match,
    mean_interval,
    paired_interval,
    share,
)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_matches_newcombe(hits, n, low, high):
    """Table I of Newcombe, Statistics in Medicine 17 (1998), method 3."""
    result = share([True] * hits + [False] * (n - hits))
    assert result["value"] == hits / n and result["n"] == n
    assert (result["low"], result["high"]) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_is_symmetric_and_stays_within_0_and_1():
    none, every = share([False] * 20), share([True] * 20)
    assert 0 <= none["low"] < 1e-12 and 1 - 1e-12 < every["high"] <= 1
    assert every["low"] == pytest.approx(1 - none["high"]) and 0 < every["low"] < 1


def test_a_share_of_nothing_has_no_value():
    assert share([]) == {"value": None, "low": None, "high": None, "n": 0}


def flags(hits: int, n: int) -> dict:
    return share([True] * hits + [False] * (n - hits))


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((0, 10), (0, 20), -0.1611, 0.2775),
    ],
)
def test_difference_of_two_shares_matches_newcombe(one, other, low, high):
    """Table II of Newcombe, Statistics in Medicine 17:873 (1998), method 10."""
    found = difference_of_shares(flags(*one), flags(*other))
    assert found["value"] == pytest.approx(one[0] / one[1] - other[0] / other[1])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=6e-4)


def test_a_difference_to_nothing_has_no_value():
    assert difference_of_shares(flags(1, 2), share([]))["value"] is None


@pytest.mark.parametrize(
    ("first", "second", "n"),
    [(1, 0, 12), (6, 2, 44), (0, 0, 12), (20, 3, 150), (5, 5, 5 + 5), (0.5, 1.5, 30)],
)
def test_tango_s_ends_are_where_the_score_is_the_normal_s_quantile(first, second, n):
    """The restricted estimate is found by maximising the likelihood on a grid, not by the closed form."""
    for delta in (found := paired_interval(first, second, n)):
        if abs(delta) > 1 - 1e-9:
            continue
        inside = [(1 - abs(delta)) * i / 40_000 for i in range(1, 40_000)]
        # p(second only), with p(first only) = it + delta
        inside = [max(0.0, -delta) + x / 2 for x in inside]

        def likelihood(q: float, delta: float = delta) -> float:
            parts = ((first, q + delta), (second, q), (n - first - second, 1 - 2 * q - delta))
            return sum(
                count * math.log(p) if p > 0 else (-math.inf if count else 0.0)
                for count, p in parts
            )

        q = max(inside, key=likelihood)
        score = abs(first - second - n * delta) / math.sqrt(n * (2 * q + delta * (1 - delta)))
        assert score == pytest.approx(1.95996, rel=5e-3)
    assert -1 <= found[0] <= (first - second) / n <= found[1] <= 1


def test_paired_intervals_do_not_collapse_where_all_prompts_come_out_alike():
    low, high = paired_interval(0, 0, 12)
    assert (low, high) == pytest.approx((-0.2425, 0.2425), abs=1e-3), "12 of 12 equal"
    assert paired_interval(0, 0, 120)[1] < 0.04
    assert paired_interval(3, 1, 20) == pytest.approx(
        tuple(-end for end in reversed(paired_interval(1, 3, 20))), abs=1e-9
    )
    assert (
        paired_interval(12, 0, 12)[1] == pytest.approx(1.0)
        and 0.5 < paired_interval(12, 0, 12)[0] < 0.6
    )


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262)])
def test_student_interval_over_seeds(n, t):
    """Values of 0 and 1 by turns; the half-width is t(n-1) * s / sqrt(n), t from the table."""
    values = [float(i % 2) for i in range(n)]
    mean = sum(values) / n
    deviation = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5
    result = mean_interval(values)
    assert result["value"] == pytest.approx(mean) and result["n"] == n
    assert result["high"] - result["value"] == pytest.approx(t * deviation / n**0.5, rel=1e-4)
    assert result["value"] - result["low"] == pytest.approx(t * deviation / n**0.5, rel=1e-4)


def test_a_textbook_student_interval():
    result = mean_interval([1.0, 2.0, 3.0])
    assert (result["low"], result["high"]) == pytest.approx((-0.484, 4.484), abs=1e-3)


def test_more_than_ten_seeds_are_never_given_too_narrow_an_interval():
    """t(19) is 2.093; a wider interval is allowed, the normal's 1.96 is not."""
    values = [float(i % 2) for i in range(20)]
    half = mean_interval(values)["high"] - 0.5
    assert half >= 2.093 * (5 / 19) ** 0.5 / 20**0.5


def test_one_seed_has_no_interval():
    assert mean_interval([0.4]) == {"value": 0.4, "low": None, "high": None, "n": 1}


@pytest.mark.parametrize(
    ("response", "same"),
    [
        ("SELECT a FROM b", True),
        ("  SELECT  a\n\tFROM b ", True),
        ("SELECT a FROM b;", True),
        ("SELECT a FROM b ;\n", True),
        ("select a from b", False),
        ("SELECT a FROM b.", False),
        ("SELECT a; FROM b", False),
        ("SELECTa FROM b", False),
        ("SELECT a FROM b SELECT", False),
        ("", False),
    ],
)
def test_exact_match_folds_white_space_and_a_closing_semicolon_only(response, same):
    assert exact_match(response, "SELECT a FROM b") is same
    assert exact_match(response, "SELECT a\nFROM b;") is same
