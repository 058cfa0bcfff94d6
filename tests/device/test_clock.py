"""Times and what is said of them."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats

from kdedge_device.clock import (
    EFFORTS,
    Effort,
    collect,
    early_stopping_p90,
    percentile,
    quantiles,
    stopwatch,
    summarize,
    variation,
    warm_up,
)
from kdedge_device.failures import Failure


def test_percentile_is_the_nearest_rank() -> None:
    """The oracle is the definition: the smallest value that at least p % of all do not exceed."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 10, 99, 100, 101, 1000):
        ordered = sorted(rng.normal(size=count).tolist())
        for percent in (1, 50, 90, 99, 100):
            expected = next(v for v in ordered if sum(w <= v for w in ordered) * 100 >= percent * count)
            assert percentile(ordered, percent) == expected
    with pytest.raises(Failure, match="no measurements"):
        percentile([], 50)


def test_summary_by_value() -> None:
    summary = summarize([1_000_000, 3_000_000, 2_000_000, 4_000_000])
    assert summary == {
        "p50": 2.0,
        "p90": 4.0,
        "p99": None,
        "min": 1.0,
        "max": 4.0,
        "mean": 2.5,
        "std": pytest.approx(np.std([1, 2, 3, 4], ddof=1)),
        "count": 4,
    }
    assert summarize([5_000_000])["std"] is None


def test_p99_needs_a_thousand_runs() -> None:
    assert summarize([1] * 999)["p99"] is None
    assert summarize(list(range(1, 1001)))["p99"] == 990 / 1e6


class Machine:
    """A clock, and queries that take what `milliseconds` says of the i-th call."""

    def __init__(self, milliseconds: Callable[[int], int]) -> None:
        self.now_ns, self.calls, self.milliseconds = 0, [], milliseconds  # type: ignore[var-annotated]

    def clock(self) -> int:
        return self.now_ns

    def timed(self, index: int) -> int:
        took = self.milliseconds(len(self.calls)) * 1_000_000
        self.calls.append(index)
        self.now_ns += took
        return took


def test_both_seconds_and_runs_must_be_reached() -> None:
    machine = Machine(lambda i: 10)
    assert collect(machine.timed, Effort(1.0, 20, 0.0), machine.clock) == [10_000_000] * 100
    assert machine.calls == [*range(100)]
    assert len(collect(machine.timed, Effort(0.05, 20, 0.0), machine.clock)) == 20


def test_a_stopwatch_times_the_call_alone() -> None:
    machine = Machine(lambda i: 7)
    assert [stopwatch(machine.timed, machine.clock)(i) for i in range(2)] == [7_000_000] * 2


def test_the_warm_up_goes_on_until_it_is_steady() -> None:
    steady = Machine(lambda i: 10)
    assert warm_up(steady.timed, Effort(0, 1, 1.0), steady.clock) == (1.0, 100, True)
    getting_faster = Machine(lambda i: max(10, 30 - i // 2))  # steady from its 40th call on, after 0.8 s
    found = warm_up(getting_faster.timed, Effort(0, 1, 1.0), getting_faster.clock)
    assert (1.0 < found.seconds < 1.6, found.steady) == (True, True)
    never = Machine(lambda i: 10 + i // 10)
    found = warm_up(never.timed, Effort(0, 1, 1.0), never.clock)
    assert (2.0 <= found.seconds < 2.1, found.steady) == (True, False), "not longer than twice"
    none = Machine(lambda i: 10)
    assert warm_up(none.timed, Effort(0, 1, 0.0), none.clock) == (0.03, 3, None), "but at least three calls"
    slow = Machine(lambda i: 5000)
    assert warm_up(slow.timed, Effort(0, 1, 1.0), slow.clock) == (15.0, 3, None)


def test_an_effort_is_shared_among_rounds() -> None:
    assert EFFORTS["standard"].split(6) == Effort(10.0, 334, 10 / 6)
    assert EFFORTS["quick"].split(6) == Effort(2 / 6, 167, 0.3), "each process warms up"
    assert EFFORTS["quick"].split(1) == EFFORTS["quick"]


def loadgen_index(count: int) -> int:
    """As the load generator looks for it (early_stopping.cc, results.cc): with h(t) the fewest queries within p90 for
    which t beyond it are too few to be chance, t grows as long as h(t) + t queries are there."""

    def enough(over: int) -> int:
        return next(
            over + within for within in range(9 * count) if scipy.stats.binom.cdf(over, over + within, 0.1) < 1 - 0.99
        )

    over = 1
    while count >= enough(over + 1):
        over += 1
    return count - over


def test_early_stopping_is_that_of_the_load_generator() -> None:
    rng = np.random.default_rng(0)
    # What its own early_stopping.cc gave, compiled.
    given = {64: 63, 80: 79, 81: 79, 100: 97, 500: 466, 1000: 922, 2000: 1832, 9000: 8167, 24576: 22228}
    for count, index in given.items():
        assert early_stopping_p90((rng.permutation(count) * 1_000_000).tolist()) == index, count
    assert [loadgen_index(count) for count in (64, 81, 100)] == [63, 79, 97]
    for count in (65, 99, 130):
        assert early_stopping_p90([each * 1_000_000 for each in range(count)]) == loadgen_index(count), count
    assert early_stopping_p90([1] * 63) is None
    draws = rng.exponential(size=(300, 200)) * 1e6
    missed = sum((early_stopping_p90(row.tolist()) or 0.0) < np.log(10) for row in draws)
    assert missed <= 10, "p90 of an exponential distribution is ln 10; 1 % of the bounds may miss it"


def test_times_that_vary() -> None:
    assert variation(summarize([1_000_000 + (i % 2) * 1000 for i in range(1000)])) == []
    assert "vary by 4.8%" in variation(summarize([1_000_000 + (i % 2) * 100_000 for i in range(1000)]))[0]
    assert "p99 is 1.60 times p50" in variation(summarize([1_000_000] * 980 + [1_600_000] * 20))[-1]


def test_efforts_are_those_of_the_contract() -> None:
    assert {name: (each.seconds, each.runs) for name, each in EFFORTS.items()} == {
        "quick": (2.0, 1000),
        "standard": (60.0, 2000),
        "mlperf": (600.0, 2000),
    }


def test_quantiles_for_a_picture() -> None:
    found = quantiles([1_000_000 * i for i in range(100, 0, -1)])
    assert found == {str(each): float(each) for each in (1, 5, 10, 25, 50, 75, 90, 95)}, "99 would be noise"
    assert quantiles(list(range(1, 1001)))["99"] == 990 / 1e6
