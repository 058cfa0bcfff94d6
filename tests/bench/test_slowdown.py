"""Slowdowns and verdicts by value; the rank sums against counting them out."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from kdedge.intervals import newcombe, rank_sum, signed_rank
from kdedge_bench.slowdown import Slowdown, judge, repeats_wanted, slowdown


def refused(first: int, second: int, tail: float) -> int:
    """How many of the smallest U have together at most `tail`: all ways to place `first` draws among the others."""
    ways = Counter(
        sum(place - rank for rank, place in enumerate(places))
        for places in itertools.combinations(range(first + second), first)
    )
    total = 0
    for u in itertools.count():
        total += ways[u]
        if total > tail * math.comb(first + second, first):
            return u
    raise AssertionError


@pytest.mark.parametrize(("first", "second"), [(4, 4), (4, 6), (7, 5), (8, 8)])
def test_rank_sum_against_counting(first: int, second: int) -> None:
    rng = np.random.default_rng(first * second)
    a, b = list(rng.normal(3, 1, first)), list(rng.normal(0, 1, second))
    differences = sorted(x - y for x in a for y in b)
    cut = refused(first, second, 0.025)
    estimate, low, high = rank_sum(a, b)
    assert (low, high) == (differences[cut - 1], differences[-cut])
    assert estimate == pytest.approx(np.median(differences))


def test_rank_sum_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        _, low, high = rank_sum(list(rng.standard_cauchy(7) + 2), list(rng.standard_cauchy(7)))
        hits += low <= 2 <= high
    assert 0.935 < hits / 1000 < 0.985


@pytest.mark.parametrize("count", [61, 400])
def test_many_draws_take_the_normal_distribution(count: int) -> None:
    rng = np.random.default_rng(count)
    draws = list(rng.normal(1, 1, count))
    estimate, low, high = signed_rank(draws)
    half = 1.96 / np.sqrt(count) * np.sqrt(np.pi / 3)  # ranks are 3/pi as efficient as means where noise is normal
    assert [estimate - low, high - estimate] == pytest.approx([half, half], rel=0.35)
    _, low, high = rank_sum(draws, [draw - 1 for draw in draws])
    assert high - low == pytest.approx(2 * np.sqrt(2) * half, rel=0.35)


def test_two_sessions_of_one_file_raise_no_alarm() -> None:
    """3 % of drift between them, half a percent of noise within, and a budget of one percent."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(100):
        base, new = (np.exp(rng.normal(0, 0.03) + rng.normal(0, 0.005, 6)) for _ in range(2))
        found = slowdown(list(base), list(new), paired=False)
        alarms += judge(found.low, found.high, 0.01) == "fail"
    assert alarms <= 10


def test_too_few() -> None:
    with pytest.raises(ValueError, match="3 and 4 values are too few"):
        rank_sum([1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0])


def test_newcombe_as_published() -> None:
    """Newcombe 1998, Statistics in Medicine 17, table II: 56/70 against 48/80, method 10."""
    assert newcombe((56 / 70, 70), (48 / 80, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_by_value() -> None:
    found = slowdown([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], [1.1, 2.2, 4.4, 8.8, 17.6, 35.2], paired=True)
    assert [found.fraction, found.low, found.high] == pytest.approx([0.1, 0.1, 0.1])
    apart = slowdown([2.0] * 4, [3.0] * 4, paired=False)
    assert [apart.low, apart.high] == pytest.approx([1.5 * math.exp(-0.05) - 1, 1.5 * math.exp(0.05) - 1])
    assert slowdown([1.0, 1.0], [1.3, 1.3], paired=True) == Slowdown(pytest.approx(0.3), None, None, 2, True)
    assert slowdown([1.0], [1.3, 1.3, 1.3], paired=False).fraction == pytest.approx(0.3)
    for wrong in (([], [1.0], False), ([1.0], [0.0], False), ([1.0], [1.0, 2.0], True)):
        with pytest.raises(ValueError, match=r"expected|no pairs"):
            slowdown(*wrong)


def test_verdicts() -> None:
    assert judge(0.04, 0.2, 0.03) == "fail"
    assert judge(0.02, 0.2, 0.03) == "cannot tell"
    assert judge(0.0, 0.03, 0.03) == "pass"
    assert judge(None, None, 0.03) == "cannot tell"


def test_repeats_wanted() -> None:
    assert repeats_wanted(Slowdown(0.1, None, None, 1, True), 0.03) == 6
    assert repeats_wanted(Slowdown(0.1, None, None, 1, False), 0.03) == 6, "those to come are in turn"
    # Half of the interval is 0.08, and the way to the budget 0.02: sixteen times as many, and twice that to be sure.
    for found in (Slowdown(0.05, -0.03, 0.13, 10, True), Slowdown(0.01, -0.07, 0.09, 10, True)):
        assert repeats_wanted(found, 0.03) == pytest.approx(160 * (2.8 / 1.96) ** 2, abs=1)
    assert repeats_wanted(Slowdown(0.03, -0.03, 0.13, 10, True), 0.03) is None
    # Of two occasions the noise within them counts, 0.01 on either side, and not what may lie between them.
    low, high = (math.exp(math.log1p(end) + by) - 1 for end, by in ((0.0, -0.05), (0.02, 0.05)))
    assert repeats_wanted(Slowdown(0.01, low, high, 10, False), 0.03) == 6
    assert repeats_wanted(Slowdown(0.01, low, high, 60, False), 0.03) == math.ceil(60 / 4 * (2.8 / 1.96) ** 2)
    assert repeats_wanted(Slowdown(0.0301, -0.03, 0.13, 10, True), 0.03) is None


def test_the_wanted_repeats_do_tell() -> None:
    """As many as it asks for, on a machine of the same noise, and the answer is there most of the time."""
    rng = np.random.default_rng(1)

    def measured(count: int) -> Slowdown:
        base, new = np.exp(rng.normal(0, 0.05, count)), 1.06 * np.exp(rng.normal(0, 0.05, count))
        return slowdown(list(base), list(new), paired=True)

    wanted = repeats_wanted(Slowdown(0.06, 0.06 - 0.052, 0.06 + 0.052, 8, True), 0.03)
    assert wanted is not None
    told = [judge(each.low, each.high, 0.03) for each in (measured(wanted) for _ in range(40))]
    assert told.count("fail") >= 26
    assert told.count("pass") == 0
