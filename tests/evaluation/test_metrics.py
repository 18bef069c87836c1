"""Intervals against published values, and what exact match folds."""

import pytest

from pipeline.evaluation.metrics import exact_match, mean_interval, share


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
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
