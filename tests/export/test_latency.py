"""The race is run on made-up machines; that a child process measures is shown once, and no time is judged."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from kdedge.errors import DeviceError
from kdedge_export.judging.latency import LOOKS, Race, Speedup, measure_alone, race

SHORT = ("--seconds", "0", "--runs", "20")


def record(value: float) -> dict[str, Any]:
    compute = {"p50": value, "p90": 1.1 * value, "p99": None, "min": 0.9 * value, "max": 2 * value}
    compute |= {"mean": value, "std": 0.1 * value, "count": 30}
    return {
        "latency_ms": {"compute": compute, "with_copies": None, "end_to_end": None},
        "conditions": {"batch": 1, "threads": 1},
        "flags": {"throttled": None, "unstable": False},
        "energy_mj_per_inference": None,
        "throughput_ips": 1e3 / value,
        "repeats": 1,
    }


class Machine:
    """Files of given latencies on a machine whose slowness changes with the measurements made so far."""

    def __init__(self, slowness: Callable[[int], float] = lambda step: 1.0, **files: float) -> None:
        self.files, self.slowness = files, slowness
        self.order: list[str] = []

    def __call__(self, name: str) -> dict[str, Any]:
        self.order.append(name)
        return record(self.files[name] * self.slowness(len(self.order) - 1))


def run(machine: Machine, **options: Any) -> Race:
    return race(tuple(machine.files), machine, **options)


def noise(sigma: float, seed: int) -> Callable[[int], float]:
    """Most measurements are near the truth, one in ten is up to twice as slow: another process came."""
    rng = np.random.default_rng(seed)
    return lambda step: float(np.exp(sigma * rng.normal()) * (1 + rng.uniform() * (rng.uniform() < 0.1)))


def test_files_are_measured_in_turn_and_every_second_round_backwards() -> None:
    machine = Machine(fp32=3.0, int8=2.0)
    found = run(machine)
    assert machine.order == ["fp32", "int8", "int8", "fp32"] * 3
    assert found.speedups["int8"] == Speedup(1.5, 1.5, 1.5, 6)
    assert found.rounds_ms == {"fp32": [3.0] * 6, "int8": [2.0] * 6}


def test_three_files_share_the_rounds() -> None:
    machine = Machine(fp32=3.0, int8=2.0, fp16=9.0)
    found = run(machine)
    assert machine.order[:6] == ["fp32", "int8", "fp16", "fp16", "int8", "fp32"]
    assert {name: each.value for name, each in found.speedups.items()} == pytest.approx({"int8": 1.5, "fp16": 1 / 3})


@pytest.mark.parametrize("step", range(12))
def test_a_machine_that_slows_down_halfway_does_not_bias_the_ratio(step: int) -> None:
    machine = Machine(lambda now: 1.2 if now >= step else 1.0, fp32=1.5, int8=1.0)
    found = run(machine).speedups["int8"]
    assert found.value == pytest.approx(1.5, rel=1e-9)
    assert found.told
    # Measured one after the other, six times each, the same machine gives up to 1.8 or 1.25.
    blocks = Machine(lambda now: 1.2 if now >= 6 else 1.0, fp32=1.5, int8=1.0)
    times = {name: np.median([blocks(name)["latency_ms"]["compute"]["p50"] for _ in range(6)]) for name in blocks.files}
    assert times["fp32"] / times["int8"] == pytest.approx(1.25)


def test_a_steady_slope_does_not_bias_the_ratio() -> None:
    """2 % slower with each measurement: A B A B alone would see INT8 2 % slower than it is in every round."""
    found = run(Machine(lambda now: 1.02**now, fp32=1.0, int8=1.0)).speedups["int8"]
    assert found.value == pytest.approx(1.0, abs=1e-9)
    assert not found.told


def test_rounds_go_on_until_the_interval_is_clear() -> None:
    clear = run(Machine(noise(0.01, 1), fp32=2.0, int8=1.0)).speedups["int8"]
    assert clear.rounds == 6
    assert clear.low > 1.4
    tie = run(Machine(noise(0.03, 2), fp32=1.0, int8=1.0)).speedups["int8"]
    assert tie.rounds == 24
    assert tie.low < 1.0 < tie.high
    near = run(Machine(noise(0.02, 3), fp32=1.05, int8=1.0)).speedups["int8"]
    assert near.rounds in (12, 24)
    assert near.low > 1.0


def test_a_cap_on_time_ends_the_race_at_a_look() -> None:
    ticks = itertools.count()  # a second goes by between any two looks at the clock
    found = run(Machine(fp32=1.0, int8=1.0), max_seconds=1.5, clock=lambda: float(next(ticks)))
    assert found.speedups["int8"].rounds == 6
    ticks = itertools.count()
    found = run(Machine(fp32=1.0, int8=1.0), max_seconds=2.5, clock=lambda: float(next(ticks)))
    assert found.speedups["int8"].rounds == 12


def test_the_interval_covers_wherever_the_race_stops() -> None:
    """2 % noise, bursts, a true ratio near 1, where looking again and again would lie most often."""
    for truth in (1.0, 1.03):
        inside = 0
        for seed in range(400):
            found = run(Machine(noise(0.02, seed), fp32=truth, int8=1.0)).speedups["int8"]
            inside += found.low <= truth <= found.high
        assert inside / 400 >= 0.93


def test_looks_spend_five_percent_together() -> None:
    assert sum(1 - confidence for _, confidence in LOOKS) < 0.0505  # rank sums are whole: 4.9 % in truth
    assert [rounds for rounds, _ in LOOKS] == sorted(rounds for rounds, _ in LOOKS)


def test_one_record_over_all_rounds() -> None:
    values = iter([1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 5.0, 5.0, 6.0, 6.0])
    found = race(("fp32", "int8"), lambda name: record(next(values)), max_seconds=0.0)
    compute = found.records["fp32"]["latency_ms"]["compute"]
    assert compute["p50"] == 3.5
    assert (compute["min"], compute["max"], compute["count"], compute["p99"]) == (0.9, 12.0, 180, None)
    assert compute["mean"] == pytest.approx(3.5)
    draws = np.concatenate([value + 0.1 * value * _standardised(30) for value in (1, 2, 3, 4, 5, 6)])
    assert compute["std"] == pytest.approx(draws.std(ddof=1))
    assert found.records["fp32"]["repeats"] == 6
    assert found.records["fp32"]["flags"] == {"throttled": None, "unstable": True}
    assert found.records["fp32"]["throughput_ips"] == pytest.approx(1e3 / 3.5)


def _standardised(count: int) -> np.ndarray:
    draws = np.random.default_rng(0).normal(size=count)
    return np.asarray((draws - draws.mean()) / draws.std(ddof=1))


def test_a_child_process_measures(tmp_path: Path) -> None:
    shape = ["batch", 1, 4, 4]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("input", "logits")]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["logits"])], "g", ends[:1], ends[1:])
    path = tmp_path / "a path with spaces.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    found = measure_alone(path, 2, SHORT)
    assert found["conditions"]["threads"] == 2
    assert found["latency_ms"]["compute"]["count"] == 20
    assert found["artifact"]["file"] == path.name
    again = race(("a", "b"), lambda name: found, max_seconds=0.0)
    assert again.records["a"]["latency_ms"]["compute"]["count"] == 120, "a real record can be raced"
    assert set(again.records["a"]) == {*found, "rounds_ms", "rounds_ips", "session"}


def test_what_the_child_says_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"Measuring absent\.onnx failed with exit code 2: .*does not exist"):
        measure_alone(tmp_path / "absent.onnx", 1, SHORT)
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(DeviceError, match="exit code 5"):
        measure_alone(tmp_path / "text.onnx", 1, SHORT)
    with pytest.raises(DeviceError, match=r"exit code 2: Unrecognized arguments"):
        measure_alone(tmp_path / "text.onnx", 1, ("--fly",))
