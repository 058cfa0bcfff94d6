"""Intervals by their definitions, and against slow enumeration."""

import itertools

import numpy as np
import pytest

from kdedge.intervals import signed_rank, wilson


@pytest.mark.parametrize("z", [1.959964, 3.0])
@pytest.mark.parametrize(("count", "total"), [(0, 10), (1, 1000), (5, 500), (500, 1000), (10, 10), (2.5, 7)])
def test_the_ends_are_z_standard_errors_of_their_own_from_the_share(count: float, total: int, z: float) -> None:
    low, high = wilson(count / total, total, z)
    assert 0 <= low <= count / total <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert (end - count / total) ** 2 == pytest.approx(z**2 * end * (1 - end) / total, rel=1e-6)


def test_the_ends_are_exact() -> None:
    assert wilson(0, 50)[0] == 0.0 < wilson(0, 50)[1]
    assert wilson(1, 50)[1] == 1.0 > wilson(1, 50)[0]


def slow_signed_rank(values: list[float], shift: float) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test that the centre is `shift`, by throwing all signs."""
    distances = np.abs(np.array(values) - shift)
    ranks = distances.argsort().argsort() + 1
    seen = ranks[np.array(values) > shift].sum()
    sums = np.array([sum(r for r, up in zip(ranks, signs, strict=True) if up) for signs in _signs(len(values))])
    return float(2 * min((sums <= seen).mean(), (sums >= seen).mean()))


def _signs(count: int) -> list[tuple[bool, ...]]:
    return list(itertools.product((False, True), repeat=count))


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.968])
@pytest.mark.parametrize("count", [6, 7, 9])
def test_signed_rank_is_what_the_test_does_not_refuse(count: int, confidence: float) -> None:
    values = list(np.random.default_rng(count).normal(size=count))
    estimate, low, high = signed_rank(values, confidence)
    assert low < estimate < high
    tiny = 1e-9
    for end, inward in ((low, tiny), (high, -tiny)):
        assert slow_signed_rank(values, end + inward) > 1 - confidence
        assert slow_signed_rank(values, end - inward) <= 1 - confidence + 1e-12


def test_signed_rank_is_exact_whatever_the_tails() -> None:
    """Cauchy noise, which has no mean: the interval holds the centre as often as it says."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        _, low, high = signed_rank(list(2 + rng.standard_cauchy(8)), 0.95)
        inside += low <= 2 <= high
    assert 0.945 <= inside / 1000 <= 0.975  # 8 values allow 96.1 %


def test_one_wild_value_moves_the_centre_little() -> None:
    calm = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 0.99]
    assert signed_rank([*calm, 50.0])[0] == pytest.approx(1.0, abs=0.02)


def test_too_few_values_for_an_interval() -> None:
    with pytest.raises(ValueError, match=r"5 values are too few for an interval of 95\.0%"):
        signed_rank([1.0, 2.0, 3.0, 4.0, 5.0], 0.95)
    assert signed_rank([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], 0.95)[1:] == (1.0, 32.0)
