"""Times and what is said of them."""

import numpy as np
import pytest

from kdedge_device.clock import EFFORTS, Effort, measure, percentile, summarize, unstable
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


def test_both_seconds_and_runs_must_be_reached() -> None:
    now = [0]

    def clock() -> int:
        return now[0]

    def query(milliseconds: int, calls: list[int]):  # type: ignore[no-untyped-def]
        def run(index: int) -> None:
            calls.append(index)
            now[0] += milliseconds * 1_000_000

        return run

    calls: list[int] = []
    times = measure(query(10, calls), Effort(seconds=1.0, runs=20, warm_up_seconds=0.05), clock)
    assert times == [10_000_000] * 100
    assert calls == [*range(5), *range(100)], "the warm-up is not among the times, and counts from 0 as well"
    calls.clear()
    assert len(measure(query(10, calls), Effort(seconds=0.05, runs=20, warm_up_seconds=0.0), clock)) == 20
    assert len(calls) == 3 + 20


def test_unstable() -> None:
    steady = summarize([1_000_000 + (i % 2) * 1000 for i in range(1000)])
    assert not unstable(steady)
    assert unstable(summarize([1_000_000 + (i % 2) * 100_000 for i in range(1000)]))
    assert unstable(summarize([1_000_000] * 980 + [1_600_000] * 20))


def test_efforts_are_those_of_the_contract() -> None:
    assert {name: (each.seconds, each.runs) for name, each in EFFORTS.items()} == {
        "quick": (2.0, 1000),
        "standard": (60.0, 2000),
        "mlperf": (600.0, 2000),
    }
