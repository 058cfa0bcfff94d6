"""Intervals against slow independent computations: scipy, root search on the definition, exact enumeration."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from kdedge_bench.stats import mcnemar_p, paired_difference, tango, wilson

Z = 1.959963984540054


@pytest.mark.parametrize(("correct", "images"), [(0, 1), (1, 1), (0, 540), (540, 540), (516, 540), (7, 40), (20, 40)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_is_scipys(correct: int, images: int, confidence: float) -> None:
    expected = stats.binomtest(correct, images).proportion_ci(confidence, method="wilson")
    assert wilson(correct, images, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_by_its_definition() -> None:
    """The limits are the shares p whose own standard error puts the observed share z away."""
    low, high = wilson(516, 540)
    for limit in (low, high):
        assert abs(516 / 540 - limit) / math.sqrt(limit * (1 - limit) / 540) == pytest.approx(Z, rel=1e-9)
    assert low < 516 / 540 < high


def test_wilson_known_value() -> None:
    low, high = wilson(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(("correct", "images"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(correct: int, images: int) -> None:
    with pytest.raises(ValueError, match="is not a share"):
        wilson(correct, images)


def _slow_score(first: int, second: int, n: int, delta: float) -> float:
    """Tango's statistic with the nuisance share found by numerical maximisation, not by the closed form."""

    def minus_log_likelihood(share: float) -> float:
        probs = np.array([share + delta, share, 1 - 2 * share - delta])
        counts = np.array([first, second, n - first - second])
        return float(-(counts * np.log(np.maximum(probs, 1e-300))).sum())

    low, high = max(0.0, -delta), (1 - delta) / 2
    share = optimize.minimize_scalar(
        minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}
    ).x
    return float((first - second - n * delta) / math.sqrt(n * (2 * share + delta * (1 - delta))))


@pytest.mark.parametrize(("first", "second", "n"), [(5, 9, 540), (1, 12, 100), (0, 3, 60), (20, 20, 200), (40, 3, 80)])
def test_tango_by_numerical_likelihood(first: int, second: int, n: int) -> None:
    low, high = tango(first, second, n)
    assert low < (first - second) / n < high
    assert _slow_score(first, second, n, low) == pytest.approx(Z, abs=2e-3)
    assert _slow_score(first, second, n, high) == pytest.approx(-Z, abs=2e-3)


def test_tango_without_discordant_pairs_has_width() -> None:
    """Closed form for b = c = 0: the limits are ± z² / (n + z²)."""
    limit = Z * Z / (540 + Z * Z)
    assert tango(0, 0, 540) == pytest.approx((-limit, limit), abs=1e-9)


def test_tango_swaps_sign_with_its_arguments() -> None:
    low, high = tango(4, 11, 300)
    assert tango(11, 4, 300) == pytest.approx((-high, -low), abs=1e-12)


def test_tango_agrees_with_a_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    base, new = np.ones(800, bool), np.ones(800, bool)
    base[:40] = False
    new[20:90] = False
    draws = rng.integers(0, 800, (20000, 800))
    differences = (new[draws].mean(1) - base[draws].mean(1)).astype(float)
    found = paired_difference(base, new)
    assert found.difference == pytest.approx(-30 / 800)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=2e-3)


@pytest.mark.parametrize(("first", "second", "n"), [(3, 3, 5), (-1, 0, 5), (0, 0, 0)])
def test_tango_refuses(first: int, second: int, n: int) -> None:
    with pytest.raises(ValueError, match="is not possible"):
        tango(first, second, n)


def test_paired_counts() -> None:
    base = [True, True, True, False, False, True]
    new = [True, False, False, True, False, True]
    found = paired_difference(base, new)
    assert (found.only_base, found.only_new, found.images) == (2, 1, 6)
    assert found.difference == pytest.approx(-1 / 6)
    assert found.p_value == 1.0


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 9), (1, 12), (30, 3), (400, 700)])
def test_mcnemar_is_the_binomial_test(b: int, c: int) -> None:
    expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_p(b, c) == pytest.approx(expected, rel=1e-9)


def test_paired_refuses_different_lengths() -> None:
    with pytest.raises(ValueError, match="same images"):
        paired_difference([True], [True, False])
