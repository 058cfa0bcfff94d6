"""Several measurements in turn, each in a process of its own: A B, B A, A B... and one record an artifact over all.

A busy or hot machine slows down whatever runs at that time, so what is to be compared is measured side by side, and
what counts is the ratio within a round (`rounds_ms`). Python 3.8, standard library.
"""

import json
import math
import os
import re
import statistics
import subprocess
import tempfile
import uuid
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type

from kdedge_device.children import child
from kdedge_device.clock import early_stopping_p90, summarize, unstable
from kdedge_device.failures import (
    BudgetFailure,
    CorruptFailure,
    DeviceFailure,
    Failure,
    RuntimeFailure,
    VersionFailure,
)

__all__ = ["Job", "Told", "in_turn", "new_session", "one_round", "pooled"]

Record = Dict[str, Any]
Times = Dict[str, Optional[List[int]]]
_PARTS = ("compute", "with_copies", "end_to_end")
_CLASSES: Dict[int, Type[Failure]] = {
    each.exit_code: each for each in (BudgetFailure, VersionFailure, DeviceFailure, CorruptFailure, RuntimeFailure)
}


class Job(NamedTuple):
    """One thing to measure: its name, and what `bench` is called with for it."""

    name: str
    arguments: Sequence[str]


class Told(NamedTuple):
    """One process' record, and all its times where it noted them."""

    record: Record
    times_ns: Optional[Times]


def new_session(started_at: str) -> str:
    """Marks the records that were measured in turn with each other."""
    return f"{started_at}-{uuid.uuid4().hex[:8]}"


def in_turn(
    jobs: Sequence[Job], rounds: int, measure: Callable[[Job], Told], log: Callable[[str], None]
) -> Tuple[Dict[str, List[Told]], Dict[str, Failure]]:
    """What each job told, and why it failed where it did: it is left out from then on, the others go on."""
    told: Dict[str, List[Told]] = {job.name: [] for job in jobs}
    failed: Dict[str, Failure] = {}
    for number in range(rounds):
        for job in jobs if number % 2 == 0 else reversed(jobs):
            if job.name in failed:
                continue
            try:
                told[job.name].append(measure(job))
            except Failure as error:
                failed[job.name] = error
                log(f"{job.name}: {error}")
            else:
                log(f"round {number + 1} of {rounds}, {job.name}: {_headline(told[job.name][-1].record)}")
    return {name: each for name, each in told.items() if name not in failed}, failed


def _headline(record: Record) -> str:
    part = record["latency_ms"][record["conditions"]["headline"]] if record["latency_ms"]["compute"] else None
    return "p90 {p90:.3f} ms".format(**part) if part else "{throughput_ips:.1f} images a second".format(**record)


def one_round(job: Job) -> Told:
    """Runs `bench` in a process of its own. The Failure that it told, of the same class, where it failed."""
    with tempfile.TemporaryDirectory(prefix="kdedge-") as folder:
        file = os.path.join(folder, "times.json")
        command = child("__main__", "bench", *job.arguments, "--json", "--times", file)
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except OSError as error:
            raise Failure(f"The measurement of {job.name} cannot be started: {error}.") from None
        try:
            document = json.loads(done.stdout.decode("utf-8"))
        except ValueError:
            document = {}
        if done.returncode != 0 or "latency_ms" not in document:
            raise _failure(job, document, done)
        if not os.path.exists(file):  # --offline notes none
            return Told(document, None)
        with open(file, encoding="utf-8") as noted:
            return Told(document, json.load(noted))


def _failure(job: Job, document: Dict[str, Any], done: "subprocess.CompletedProcess[bytes]") -> Failure:
    if "error" in document:
        return _CLASSES.get(done.returncode, Failure)(str(document["error"]))
    last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
    return Failure(f"The measurement of {job.name} ended with code {done.returncode}: {last[0]}")


def pooled(told: Sequence[Told], session: str) -> Record:
    """One record over all rounds: summaries of all times together, or where they are not known of the rounds' own.

    `rounds_ms`: p50 and p90 of computing, one a round. The state of the machine is that before the first round and
    after the last; energy is the mean by inferences; a brake in any round counts.
    """
    records = [each.record for each in told]
    first, last = records[0], records[-1]
    latency_ms = {part: _part(part, told) for part in _PARTS}
    compute = latency_ms["compute"]
    headline = latency_ms.get(first["conditions"].get("headline", "compute")) or compute
    why = _reasons(records)
    loose = any(record["flags"]["unstable"] for record in records) or (headline is not None and unstable(headline))
    if loose and not why:
        why = ["The rounds differ from each other by more than each of them varies."]
    throttled = [record["flags"]["throttled"] for record in records if record["flags"]["throttled"] is not None]
    rounds = [record["latency_ms"]["compute"] for record in records] if compute else []
    return {
        **first,
        "conditions": _spanned(first["conditions"], last["conditions"]),
        "latency_ms": latency_ms,
        "early_stopping_p90_ms": _early(told, first["conditions"].get("headline", "compute")),
        "repeats": len(records),
        "rounds_ms": {key: [each[key] for each in rounds] for key in ("p50", "p90")},
        "session": session,
        "throughput_ips": statistics.harmonic_mean([record["throughput_ips"] for record in records]),
        "energy_mj_per_inference": _energy(records),
        "flags": {**first["flags"], "unstable": loose, "throttled": any(throttled) if throttled else None},
        "stability": {"stable": not loose, "why": why},
    }


def _reasons(records: Sequence[Record]) -> List[str]:
    """What speaks against each round, once where it differs by its numbers only, with how many rounds it was in."""
    found: Dict[str, List[str]] = {}
    for record in records:
        for sentence in (record.get("stability") or {}).get("why", []):
            found.setdefault(re.sub(r"[\d.]+", "#", sentence), []).append(sentence)
    many = len(records) > 1
    return [f"In {len(each)} of {len(records)} rounds: {each[0]}" if many else each[0] for each in found.values()]


def _times(part: str, told: Sequence[Told]) -> Optional[List[int]]:
    """All of a part; None where a round did not note them."""
    every = [None if each.times_ns is None else each.times_ns.get(part) for each in told]
    return [value for each in every for value in each or []] if all(every) else None


def _early(told: Sequence[Told], part: str) -> Optional[float]:
    times = _times(part, told)
    return None if times is None else early_stopping_p90(times)


def _part(part: str, told: Sequence[Told]) -> Optional[Dict[str, Any]]:
    times = _times(part, told)
    if times is not None:
        return summarize(times)
    parts = [each.record["latency_ms"][part] for each in told]
    if any(each is None for each in parts):
        return None
    count = sum(each["count"] for each in parts)
    mean = math.fsum(each["count"] * each["mean"] for each in parts) / count
    squares = math.fsum(
        (each["count"] - 1) * (each["std"] or 0.0) ** 2 + each["count"] * (each["mean"] - mean) ** 2 for each in parts
    )
    return {
        "p50": statistics.median(each["p50"] for each in parts),
        "p90": statistics.median(each["p90"] for each in parts),
        "p99": None,  # of all rounds together it is not known
        "min": min(each["min"] for each in parts),
        "max": max(each["max"] for each in parts),
        "mean": mean,
        "std": math.sqrt(squares / (count - 1)) if count > 1 else None,
        "count": count,
    }


def _spanned(first: Dict[str, Any], last: Dict[str, Any]) -> Dict[str, Any]:
    """`first`, with what was noted "after" taken from `last`."""
    spanned = dict(first)
    for key, value in first.items():
        if isinstance(value, dict) and "after" in value and isinstance(last.get(key), dict):
            spanned[key] = {**value, "after": last[key].get("after")}
    return spanned


def _energy(records: Sequence[Record]) -> Optional[float]:
    found = [record["energy_mj_per_inference"] for record in records]
    return None if any(each is None for each in found) else math.fsum(found) / len(found)
