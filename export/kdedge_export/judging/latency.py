"""Latency for the gate: one child process a measurement, the files in turn, until the ratio is told from 1.

A busy or hot machine slows down whatever runs at that time, so only files measured side by side are compared: a round
measures each once, and what counts is the ratio within it. Every second round goes backwards (A B, B A): a machine that
slows down steadily favours either as often as the other.
"""

import json
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdedge.errors import DeviceError
from kdedge.intervals import signed_rank
from kdedge_device.bench_pool import pooled
from kdedge_device.bench_rounds import Told, new_session
from kdedge_device.children import child
from kdedge_device.record import now

__all__ = ["LOOKS", "Race", "Speedup", "measure_alone", "race", "speedup"]

LOOKS = ((6, 0.968), (12, 0.9907), (24, 0.991))
"""(rounds, confidence): when the ratios are looked at. Each look may be wrong; 3.1 %, 0.9 % and 0.9 % make 5 %,
so an interval holds the ratio in 95 of 100 races, wherever it stopped (Bonferroni). Six rounds are the fewest that can
tell."""
ONE_ROUND = ("--seconds", "0.25", "--runs", "30")
MAX_SECONDS = 60.0

Record = dict[str, Any]
Measure = Callable[[str], Record]


@dataclass(frozen=True)
class Speedup:
    """The float file's latency over another's, with its 95 % interval: above 1 is faster."""

    value: float
    low: float
    high: float
    rounds: int

    @property
    def told(self) -> bool:
        """The interval is clear of 1: which of the two is faster is known."""
        return self.low > 1.0 or self.high < 1.0

    def to_json(self) -> dict[str, Any]:
        return {"speedup": self.value, "speedup_interval": [self.low, self.high], "rounds": self.rounds}


@dataclass(frozen=True)
class Race:
    """`records`: one a file, over all rounds. `rounds_ms`: the median of each. `speedups`: of all but the first."""

    records: dict[str, Record]
    rounds_ms: dict[str, list[float]]
    speedups: dict[str, Speedup]


def race(
    names: Sequence[str],
    measure: Measure,
    max_seconds: float = MAX_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Race:
    """Each of `names` against the first, by rounds, until all intervals are clear of 1 or LOOKS are over.

    `measure(name)` gives a record. More rounds are not begun where they would end after `max_seconds`; the first six
    always are, since fewer tell nothing.
    """
    told: dict[str, list[Record]] = {name: [] for name in names}
    speedups: dict[str, Speedup] = {}
    start, done = clock(), 0
    for rounds, confidence in LOOKS:
        # Time says nothing of the ratio, so this does not favour an outcome.
        if done and (clock() - start) * rounds / done > max_seconds:
            break
        for number in range(done, rounds):
            for name in names if number % 2 == 0 else reversed(names):
                told[name].append(measure(name))
        done = rounds
        times = {name: [_median_ms(each) for each in records] for name, records in told.items()}
        speedups = {name: speedup(times[names[0]], times[name], confidence) for name in names[1:]}
        if all(each.told for each in speedups.values()):
            break
    session = new_session(now())
    records = {name: pooled([Told(each, None) for each in found], session) for name, found in told.items()}
    return Race(records, times, speedups)


def _median_ms(record: Record) -> float:
    return float(record["latency_ms"]["compute"]["p50"])


def speedup(base_ms: Sequence[float], other_ms: Sequence[float], confidence: float) -> Speedup:
    """The ratio of two files measured in turn, from one pair a round, with its interval of `confidence`.

    The logarithm of a ratio is symmetric where noise strikes either file alike."""
    logs = [math.log(base / other) for base, other in zip(base_ms, other_ms, strict=True)]
    value, low, high = (math.exp(each) for each in signed_rank(logs, confidence))
    return Speedup(value, low, high, len(logs))


def measure_alone(model: Path, threads: int, arguments: Sequence[str] = ONE_ROUND) -> Record:
    """The record of `bench MODEL` in a process of its own. DeviceError with the child's message where it fails."""
    command = child("__main__", "bench", str(model), "--threads", str(threads), "--json", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        document = json.loads(done.stdout)
    except ValueError:
        document = {}
    if done.returncode != 0 or not isinstance(document, dict) or "latency_ms" not in document:
        told = document.get("error") if isinstance(document, dict) else None
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DeviceError(
            f"Measuring {model.name} failed with exit code {done.returncode}: {told or last[0]}. "
            "Its latency was expected. Try: kdedge doctor"
        )
    return document
