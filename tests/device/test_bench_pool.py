"""One record over several rounds: values, and what rounds do between themselves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdedge_device.bench import bench
from kdedge_device.bench_pool import pooled
from kdedge_device.bench_rounds import Told
from kdedge_device.bench_subject import open_subject
from kdedge_device.clock import Effort, early_stopping_p90, summarize

SHORT = Effort(0.0, 5, 0.0)


def a_round(bundle: Path, times_ns: list[int], noted: bool = True, **changes: Any) -> Told:
    """A real record with times of our own."""
    record = bench(open_subject(str(bundle)), SHORT, "custom")
    record["latency_ms"] = {"compute": summarize(times_ns), "with_copies": None, "end_to_end": None}
    record["throughput_ips"] = 1e9 * len(times_ns) / sum(times_ns)
    record["flags"] = {"throttled": changes.pop("throttled", None), "unstable": bool(changes.get("why"))}
    record["stability"] = {"stable": not changes.get("why"), "why": changes.pop("why", [])}
    record.update(changes)
    return Told(record, {"compute": times_ns, "with_copies": None, "end_to_end": None} if noted else None)


def test_one_record_over_all_rounds_by_value(bundle: Path) -> None:
    rng = np.random.default_rng(0)
    times = [(rng.normal(1e6, 1e3, size=count)).astype(int).tolist() for count in (400, 500, 600)]
    rounds = [a_round(bundle, each) for each in times]
    rounds[0].record["conditions"]["temperature_c"] = {"before": 40, "after": 41}
    rounds[2].record["conditions"]["temperature_c"] = {"before": 45, "after": 46}
    found = pooled(rounds, "session")
    every = [value for each in times for value in each]
    assert found["latency_ms"]["compute"] == summarize(every), "p99 is known, though no round has 1,000 runs"
    assert found["early_stopping_p90_ms"] == early_stopping_p90(every)
    assert found["rounds_ms"] == {key: [summarize(each)[key] for each in times] for key in ("p50", "p90")}
    assert (found["repeats"], found["session"], found["energy_mj_per_inference"]) == (3, "session", None)
    seconds = [round(sum(each) / 1e9, 3) for each in times]
    assert found["conditions"]["rounds"] == {"runs": [400, 500, 600], "seconds": seconds}
    assert found["conditions"]["temperature_c"] == {"before": 40, "after": 46}
    assert found["stability"] == {"stable": True, "why": []}
    assert min(e.record["throughput_ips"] for e in rounds) < found["throughput_ips"] < 1001
    json.dumps(found, allow_nan=False)


def test_without_the_times_summaries_are_pooled(bundle: Path) -> None:
    times = [[1_000_000, 3_000_000], [2_000_000, 6_000_000, 4_000_000]]
    found = pooled([a_round(bundle, each, noted=False) for each in times], "s")["latency_ms"]["compute"]
    every = np.concatenate(times) / 1e6
    assert (found["min"], found["max"], found["count"], found["p99"]) == (1.0, 6.0, 5, None)
    assert (found["mean"], found["std"]) == (pytest.approx(every.mean()), pytest.approx(every.std(ddof=1)))
    assert (found["p50"], found["p90"]) == (2.5, 4.5)


def test_what_speaks_against_a_round_speaks_against_all(bundle: Path) -> None:
    slow, fast = [1_000_000] * 9, [1_200_000] * 9
    varies = "The times vary by {} % of their mean."
    found = pooled(
        [a_round(bundle, slow, why=[varies.format(3.5)]), a_round(bundle, slow, why=[varies.format(4)])], "s"
    )
    assert found["stability"] == {"stable": False, "why": ["In 2 of 2 rounds: " + varies.format(3.5)]}
    assert found["flags"] == {"throttled": None, "unstable": True}
    apart = pooled([a_round(bundle, slow, throttled=False), a_round(bundle, fast, throttled=True)], "s")
    assert apart["flags"] == {"throttled": True, "unstable": True}
    assert apart["stability"]["why"] == ["The rounds differ from each other by more than each of them varies."]


def powered(milliwatts: float, inferences: int, seconds: float, idle_mw: float | None) -> dict[str, Any]:
    """What a record tells of energy, beside its number."""
    above = None if idle_mw is None else (milliwatts - idle_mw) * seconds / inferences
    source = {
        "source": "ina3221", "samples": round(20 * seconds), "caveat": "module", "summed": ["VDD_IN"],
        "mean_mw": milliwatts, "mean_mw_by_name": {"VDD_IN": milliwatts}, "seconds": seconds, "inferences": inferences,
        "samples_per_second": 20.0, "idle_mw": idle_mw, "above_idle_mj_per_inference": above,
    }  # fmt: skip
    return {"energy_mj_per_inference": milliwatts * seconds / inferences, "energy_source": source}


def test_energy_is_all_millijoules_by_all_inferences(bundle: Path) -> None:
    """10 s of 5 W and 1 s of 9 W are 59 J; power at rest was looked at before the first round only."""
    times = [1_000_000] * 9
    rounds = [
        a_round(bundle, times, **powered(5000, 10_000, 10.0, 2000)),
        a_round(bundle, times, **powered(9000, 1000, 1.0, None)),
    ]
    found = pooled(rounds, "s")
    assert found["energy_mj_per_inference"] == pytest.approx(59_000 / 11_000)
    source = found["energy_source"]
    assert (source["seconds"], source["inferences"], source["samples"], source["idle_mw"]) == (11.0, 11_000, 220, 2000)
    assert source["mean_mw"] == source["mean_mw_by_name"]["VDD_IN"] == pytest.approx(59_000 / 11)
    assert source["above_idle_mj_per_inference"] == pytest.approx((59_000 - 22_000) / 11_000)
    rounds[1].record["energy_mj_per_inference"] = None
    found = pooled(rounds, "s")
    assert (found["energy_mj_per_inference"], found["energy_source"]["why_not"]) == (None, "1 of 2 rounds have none.")
    rounds[1] = a_round(bundle, times, energy_source=None)
    assert pooled(rounds, "s")["energy_source"] is None


def clocked(bundle: Path, mode: str, which: str, low: float, high: float) -> Told:
    told = a_round(bundle, [1_000_000] * 9)
    looks = {"min": low, "max": high, "p10": low, "p90": high}
    told.record["conditions"] |= {
        "power_mode": {"id": 0, "name": mode},
        "clocks_mhz": {"before": 1, "after": 2, "judged": which, f"{which}_while_timed": looks},
    }
    return told


def test_what_changes_from_round_to_round(bundle: Path) -> None:
    same = [clocked(bundle, "MAXN", "gpu", 900.0, 901.0) for _ in range(3)]
    found = pooled(same, "s")
    assert (found["stability"]["stable"], found["conditions"]["power_mode"]["name"]) == (True, "MAXN")
    found = pooled([*same[:2], clocked(bundle, "15W", "gpu", 600.0, 600.0)], "s")
    assert found["stability"]["why"] == [
        "The power mode changed between the rounds: MAXN in 2, 15W in 1 of 3.",
        "The GPU's clock moved between 600 and 901 MHz from round to round; --set-clocks holds it still.",
    ]
    assert found["flags"]["unstable"]
    assert found["conditions"]["power_mode"] is None, "no one of them is that of the record"
    span = found["conditions"]["clocks_mhz"]["gpu_while_timed"]
    assert (span["min"], span["max"]) == (600.0, 901.0)
    found = pooled([clocked(bundle, "MAXN", "cpu", mhz, mhz) for mhz in (1500.0, 1450.0)], "s")
    assert found["stability"]["stable"], "a processor's clock may differ by 5 %"
    found = pooled([clocked(bundle, "MAXN", "cpu", mhz, mhz) for mhz in (1500.0, 1400.0)], "s")
    assert "processor's clock moved between 1400 and 1500 MHz from round" in found["stability"]["why"][0]
