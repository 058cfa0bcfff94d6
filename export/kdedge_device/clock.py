"""Timing: one query in flight, the next one issued when it returns (MLPerf's single stream), and what the times say.

Times are kept in nanoseconds and told in milliseconds.
"""

import math
import time
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

from kdedge_device.failures import Failure

__all__ = ["EFFORTS", "Effort", "measure", "percentile", "summarize", "unstable"]

P99_RUNS = 1000  # fewer runs leave fewer than ten times above the 99th percentile: that number would be noise


class Effort(NamedTuple):
    """Measure until both `seconds` and `runs` are reached, after `warm_up_seconds` of the same work."""

    seconds: float
    runs: int
    warm_up_seconds: float


EFFORTS = {
    "quick": Effort(2.0, 1000, 0.3),
    "standard": Effort(60.0, 2000, 10.0),
    "mlperf": Effort(600.0, 2000, 10.0),
}


def measure(query: Callable[[int], Any], effort: Effort, clock: Callable[[], int] = time.perf_counter_ns) -> List[int]:
    """Nanoseconds of each call of `query(i)`, i counting from 0 in the warm-up and again in the measurement.

    The warm-up makes at least three calls: first ones allocate, and fill caches.
    """
    start = clock()
    count = 0
    while count < 3 or clock() - start < effort.warm_up_seconds * 1e9:
        query(count)
        count += 1
    times: List[int] = []
    start = clock()
    while len(times) < effort.runs or clock() - start < effort.seconds * 1e9:
        begin = clock()
        query(len(times))
        times.append(clock() - begin)
    return times


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Nearest rank: the smallest of the sorted values that at least `percent` % of them do not exceed."""
    if not ordered:
        raise Failure("A percentile of no measurements was asked for; measure at least one run.")
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]


def summarize(times_ns: Sequence[int]) -> Dict[str, Any]:
    """{p50, p90, p99, min, max, mean, std, count} in milliseconds; p99 is None below 1,000 runs, std below 2."""
    ordered = sorted(value / 1e6 for value in times_ns)
    count = len(ordered)
    mean = math.fsum(ordered) / count
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / (count - 1)) if count > 1 else None
    return {
        "p50": percentile(ordered, 50),
        "p90": percentile(ordered, 90),
        "p99": percentile(ordered, 99) if count >= P99_RUNS else None,
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "std": spread,
        "count": count,
    }


def unstable(summary: Dict[str, Any]) -> bool:
    """True where std is above 2.5 % of the mean, or p99 above 1.5 times p50: another run would tell another number."""
    varied = summary["std"] is not None and summary["std"] > 0.025 * summary["mean"]
    return bool(varied or (summary["p99"] is not None and summary["p99"] > 1.5 * summary["p50"]))
