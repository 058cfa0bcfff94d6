"""One record over several rounds of one measurement: all their times, their energy, and what changed between them.

Python 3.8, standard library.
"""

import math
import re
import statistics
from typing import Any, Dict, List, Optional, Sequence

from kdedge_device.bench_rounds import Record, Told
from kdedge_device.clock import early_stopping_p90, quantiles, summarize, variation
from kdedge_device.clock_span import joined, moved
from kdedge_device.energy import pooled_energy

__all__ = ["pooled"]

_PARTS = ("compute", "with_copies", "end_to_end")
_WHILE_TIMED = {"gpu": "gpu_while_timed", "cpu": "cpu_while_timed"}


def pooled(told: Sequence[Told], session: str) -> Record:
    """One record over all rounds: summaries of all times together, or where they are not known of the rounds' own.

    `rounds_ms`: p50 and p90 of computing, one a round; `rounds_ips`: the throughput of each; `quantiles_ms`: of all
    times, where they are known. The state of the machine is that before the first round and after the last, its clocks
    while timed those of all; energy is all millijoules by all inferences. What speaks against a round, or changed from
    one to the next, speaks against all; a brake in any round counts.
    """
    records = [each.record for each in told]
    first = records[0]
    latency_ms = {part: _part(part, told) for part in _PARTS}
    compute = latency_ms["compute"]
    headline = latency_ms.get(_headline(first)) or compute
    conditions = _conditions(records)
    why = _reasons(records) + _between(records, conditions)
    if not why and headline is not None and variation(headline):
        why = ["The rounds differ from each other by more than each of them varies."]
    loose = bool(why) or any(record["flags"]["unstable"] for record in records)
    throttled = [record["flags"]["throttled"] for record in records if record["flags"]["throttled"] is not None]
    rounds = [record["latency_ms"]["compute"] for record in records] if compute else []
    return {
        **first,
        "conditions": conditions,
        "latency_ms": latency_ms,
        "quantiles_ms": {part: None if (times := _times(part, told)) is None else quantiles(times) for part in _PARTS},
        "early_stopping_p90_ms": _early(told, _headline(first)),
        "repeats": len(records),
        "rounds_ms": {key: [each[key] for each in rounds] for key in ("p50", "p90")},
        "rounds_ips": [record["throughput_ips"] for record in records],
        "session": session,
        "throughput_ips": statistics.harmonic_mean([record["throughput_ips"] for record in records]),
        **pooled_energy([(each["energy_mj_per_inference"], each.get("energy_source")) for each in records]),
        "flags": {**first["flags"], "unstable": loose, "throttled": any(throttled) if throttled else None},
        "stability": {"stable": not loose, "why": why},
    }


def _headline(record: Record) -> str:
    return str(record["conditions"].get("headline", "compute"))


def _reasons(records: Sequence[Record]) -> List[str]:
    """What speaks against each round, once where it differs by its numbers only, with how many rounds it was in."""
    found: Dict[str, List[str]] = {}
    for record in records:
        for sentence in (record.get("stability") or {}).get("why", []):
            found.setdefault(re.sub(r"[\d.]+", "#", sentence), []).append(sentence)
    many = len(records) > 1
    return [f"In {len(each)} of {len(records)} rounds: {each[0]}" if many else each[0] for each in found.values()]


def _between(records: Sequence[Record], conditions: Dict[str, Any]) -> List[str]:
    """What was still within each round, and not the same in all of them."""
    said = []
    modes = _modes(records)
    if len(set(modes)) > 1:
        named = ", ".join(f"{mode} in {modes.count(mode)}" for mode in dict.fromkeys(modes))
        said.append(f"The power mode changed between the rounds: {named} of {len(modes)}.")
    clocks = conditions.get("clocks_mhz") or {}
    which = clocks.get("judged")
    within = [
        (record["conditions"].get("clocks_mhz") or {}).get(_WHILE_TIMED.get(str(which), "")) for record in records
    ]
    if not any(moved(which, each) for each in within):
        between = moved(which, clocks.get(_WHILE_TIMED.get(str(which), "")), " from round to round")
        said += [between] if between else []
    return said


def _modes(records: Sequence[Record]) -> List[str]:
    modes = [record["conditions"].get("power_mode") or {} for record in records]
    return [str(mode.get("name") or mode.get("id") or "unknown") for mode in modes]


def _conditions(records: Sequence[Record]) -> Dict[str, Any]:
    """The first round's, with what was noted "after" taken from the last, and of all what was noted while timed.

    `rounds`: {"runs", "seconds"} that were timed, one a round. `power_mode` is None where rounds differ.
    """
    first, last = records[0]["conditions"], records[-1]["conditions"]
    spanned = dict(first)
    for key, value in first.items():
        if isinstance(value, dict) and "after" in value and isinstance(last.get(key), dict):
            spanned[key] = {**value, "after": last[key].get("after")}
    clocks = spanned.get("clocks_mhz")
    if clocks is not None:
        every = [record["conditions"].get("clocks_mhz") or {} for record in records]
        found = {key: joined([each.get(key) for each in every]) for key in _WHILE_TIMED.values()}
        spanned["clocks_mhz"] = {**clocks, **found}
    if len(set(_modes(records))) > 1:
        spanned["power_mode"] = None
    timed = [_timed(record) for record in records]
    return {**spanned, "rounds": {key: [each[key] for each in timed] for key in ("runs", "seconds")}}


def _timed(record: Record) -> Dict[str, Any]:
    part = record["latency_ms"].get(_headline(record)) or record["latency_ms"].get("compute")
    if part is None:
        offline = record["conditions"].get("offline") or {}
        part = offline.get("batch_ms")
    return (
        {"runs": None, "seconds": None}
        if part is None
        else {
            "runs": part["count"],
            "seconds": round(part["count"] * part["mean"] / 1e3, 3),
        }
    )


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
