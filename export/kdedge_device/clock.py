"""Timing: one query in flight, the next one issued when it returns (MLPerf's single stream), and what the times say.

Times are kept in nanoseconds and told in milliseconds. p90 is the headline. Python 3.8, standard library.
"""

import math
import statistics
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from kdedge_device.failures import Failure

__all__ = [
    "EFFORTS",
    "MAX_VARIATION",
    "Effort",
    "WarmUp",
    "collect",
    "early_stopping_p90",
    "percentile",
    "quantiles",
    "stopwatch",
    "summarize",
    "told_effort",
    "usual_rounds",
    "variation",
    "warm_up",
]

P99_RUNS = 1000  # fewer runs leave fewer than ten times above the 99th percentile: that number would be noise
FEWEST_QUERIES = 64  # MLPerf's least for its estimate of p90
MAX_VARIATION = 0.025  # standard deviation by mean, of times that are called stable
MAX_TAIL = 1.5  # and their p99 by p50
STEADY = 0.02  # medians this close are called equal
_DRAWN = (1, 5, 10, 25, 50, 75, 90, 95, 99)
_WINDOWS = 5  # of the warm-up; the last three are compared

Timed = Callable[[int], int]
"""Does query i, i counting from 0, and gives the nanoseconds that it took."""
Clock = Callable[[], int]


class Effort(NamedTuple):
    """Measure until both `seconds` and `runs` are reached, after `warm_up_seconds` of the same work."""

    seconds: float
    runs: int
    warm_up_seconds: float

    def split(self, rounds: int) -> "Effort":
        """One of `rounds` that together are this effort. Each warms up anew, in a process of its own."""
        runs = -(-self.runs // rounds)
        return Effort(self.seconds / rounds, runs, max(min(self.warm_up_seconds, 0.3), self.warm_up_seconds / rounds))


EFFORTS = {
    "quick": Effort(2.0, 1000, 0.3),
    "standard": Effort(60.0, 2000, 10.0),
    "mlperf": Effort(600.0, 2000, 10.0),  # the rules of MLPerf's single stream; what it gives is no MLPerf result
}

ROUNDS = 6  # of files that are compared; fewer cannot tell two apart


def usual_rounds(effort: str) -> int:
    """Among how many processes an effort is shared. MLPerf's rules ask for one run without a break."""
    return 1 if effort == "mlperf" else ROUNDS


def told_effort(effort: str, rounds: int) -> str:
    """What a record calls an effort that was shared among rounds: not by MLPerf's rules where they were broken."""
    if effort != "mlperf" or rounds == 1:
        return effort
    return f"{EFFORTS[effort].seconds:g} s in {rounds} rounds"


class WarmUp(NamedTuple):
    """What preceded a measurement. `steady`: its last three parts took the same; None where it was too short."""

    seconds: float
    runs: int
    steady: Optional[bool]


def stopwatch(query: Callable[[int], Any], clock: Clock = time.perf_counter_ns) -> Timed:
    """`query` timed by the host's clock, from the call until it returns."""

    def timed(index: int) -> int:
        begin = clock()
        query(index)
        return clock() - begin

    return timed


def warm_up(timed: Timed, effort: Effort, clock: Clock = time.perf_counter_ns) -> WarmUp:
    """Until the effort's warm-up is over and the times are steady; at most twice as long as the effort says.

    At least three calls: first ones allocate, and fill caches.
    """
    start, count = clock(), 0
    least = effort.warm_up_seconds * 1e9
    window: List[int] = []
    medians: List[float] = []
    while True:
        window.append(timed(count))
        count += 1
        passed = clock() - start
        if passed >= least / _WINDOWS * (len(medians) + 1) and len(window) >= 3:
            medians.append(statistics.median(window))
            window = []
        steady = _equal(medians[-3:]) if len(medians) >= 3 else None
        if count >= 3 and passed >= least and (steady or passed >= 2 * least):
            return WarmUp(passed / 1e9, count, steady)


def _equal(values: Sequence[float]) -> bool:
    return max(values) <= (1 + STEADY) * min(values)


def collect(timed: Timed, effort: Effort, clock: Clock = time.perf_counter_ns) -> List[int]:
    """The nanoseconds of each query, until the effort's seconds and runs are both reached."""
    times: List[int] = []
    start = clock()
    while len(times) < effort.runs or clock() - start < effort.seconds * 1e9:
        times.append(timed(len(times)))
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


def quantiles(times_ns: Sequence[int]) -> Dict[str, float]:
    """{"1": ms, "5", "10", "25", "50", "75", "90", "95", "99"}, for a picture of them; "99" from 1,000 runs on."""
    ordered = sorted(value / 1e6 for value in times_ns)
    known = [percent for percent in _DRAWN if percent < 99 or len(ordered) >= P99_RUNS]
    return {str(percent): percentile(ordered, percent) for percent in known}


def early_stopping_p90(times_ns: Sequence[int]) -> Optional[float]:
    """Milliseconds that the p90 of a run without end would not exceed, with 99 % confidence. None below 64 queries.

    The estimate of MLPerf's early stopping, as its load generator computes it: of n queries the t-th largest, t being
    the most for which t or fewer of n above the true p90 have a probability of at most 1 %: the sum over k <= t of
    C(n, k) 0.1^k 0.9^(n - k). The t - 1 above it are passed over.
    """
    count = len(times_ns)
    if count < FEWEST_QUERIES:
        return None
    over, left = 0, 0.01 - 0.9**count
    while True:
        # In logarithms: 0.9^n is 0 in floating point from some 7,000 queries on.
        log_choose = math.lgamma(count + 1) - math.lgamma(over + 2) - math.lgamma(count - over)
        left -= math.exp(log_choose + (over + 1) * math.log(0.1) + (count - over - 1) * math.log(0.9))
        if left < 0:
            return sorted(times_ns)[count - over] / 1e6
        over += 1


def variation(summary: Dict[str, Any]) -> List[str]:
    """A sentence for each thing in the times that says that another run would tell another number."""
    said = []
    if summary["std"] is not None and summary["std"] > MAX_VARIATION * summary["mean"]:
        said.append(
            "The times vary by {:.1%} of their mean, and {:.1%} is the most that is called stable.".format(
                summary["std"] / summary["mean"], MAX_VARIATION
            )
        )
    if summary["p99"] is not None and summary["p99"] > MAX_TAIL * summary["p50"]:
        said.append(
            "p99 is {:.2f} times p50, and {:g} is the most that is called stable: something else ran, too.".format(
                summary["p99"] / summary["p50"], MAX_TAIL
            )
        )
    return said
