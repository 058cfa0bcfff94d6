"""Energy: sums made by hand, meters on trees of boards, and the process that reads while another is timed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import kdedge_device
from kdedge_device.brakes import Brakes
from kdedge_device.energy import energy_per_inference, mean_milliwatts, mean_power
from kdedge_device.meters import CounterMeter, RailMeter, TegrastatsMeter, find_meter
from kdedge_device.sampler import Sampler, Trace, sample, worth_sampling

from . import boards

S = 1_000_000_000


def trace(
    power: list[tuple[int, list[float]]], names: list[str], total: list[str], wraps: list[int] | None = None
) -> Trace:
    return Trace("by hand", "a caveat", names, total, wraps, power, [], [], [], [])


def test_the_mean_is_by_time_not_by_sample() -> None:
    """1 s from 1 to 3 W, then 4 s at 3 W: (2 + 12) / 5 W, where the mean of the three samples would be 2.33 W."""
    assert mean_milliwatts([0, S, 5 * S], [1000.0, 3000.0, 3000.0]) == pytest.approx(2800.0)


def test_a_counter_that_starts_again() -> None:
    """2 J in 2 s, once from 9.5 J over 10 J to 1.5 J."""
    assert mean_milliwatts([0, 2 * S], [1e6, 3e6], wrap=10_000_000) == pytest.approx(1000.0)
    assert mean_milliwatts([0, S, 2 * S], [9.5e6, 0.5e6, 1.5e6], wrap=10_000_000) == pytest.approx(1000.0)


def test_energy_of_an_inference_and_above_idle() -> None:
    """3 s idle at 4 W, then 10 s at 6 W of input: 60 J for 2,000 inferences are 30 mJ each, 10 mJ above idle."""
    idle = [(i * S // 10, [4000.0, 1000.0]) for i in range(31)]
    busy = [(5 * S + i * S // 10, [6000.0, 2500.0]) for i in range(101)]
    seen = trace([*idle, *busy], ["VDD_IN", "VDD_CPU_GPU_CV"], ["VDD_IN"])
    found = energy_per_inference(seen, (5 * S, 15 * S), (0, 3 * S), 2000)
    source = found["energy_source"]
    assert found["energy_mj_per_inference"] == pytest.approx(30.0)
    assert source["above_idle_mj_per_inference"] == pytest.approx(10.0)
    assert (source["mean_mw"], source["idle_mw"]) == (pytest.approx(6000.0), pytest.approx(4000.0))
    assert source["mean_mw_by_name"]["VDD_CPU_GPU_CV"] == pytest.approx(2500.0)
    assert (source["summed"], source["samples"], source["samples_per_second"]) == (["VDD_IN"], 101, 10.0)
    assert source["caveat"] == "a caveat"


def test_what_lies_outside_of_the_timed_part_does_not_count() -> None:
    power = [(i * S, [9000.0 if i < 10 else 2000.0]) for i in range(40)]
    found = mean_power(trace(power, ["VDD_IN"], ["VDD_IN"]), (10 * S, 30 * S))
    assert found is not None
    assert (found.milliwatts, found.samples, found.seconds) == (2000.0, 21, 20.0)


def test_several_rails_are_summed() -> None:
    power = [(i * S, [100.0, 20.0, 7.0]) for i in range(20)]
    seen = trace(power, ["VDD_GPU_SOC", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"], ["VDD_GPU_SOC", "VIN_SYS_5V0"])
    found = energy_per_inference(seen, (0, 19 * S), None, 1)
    assert found["energy_mj_per_inference"] == pytest.approx(120.0 * 19)
    assert found["energy_source"]["above_idle_mj_per_inference"] is None, "idle was not measured"


def test_null_where_nothing_is_known() -> None:
    nothing = {"energy_mj_per_inference": None, "energy_source": None}
    seen = trace([(i * S, [1.0]) for i in range(20)], ["VDD_IN"], ["VDD_IN"])
    assert energy_per_inference(None, (0, S), None, 1) == nothing
    assert energy_per_inference(seen._replace(source=None), (0, S), None, 1) == nothing
    assert energy_per_inference(seen, None, None, 1) == nothing
    assert energy_per_inference(seen, (0, 19 * S), None, 0) == nothing
    short = energy_per_inference(seen, (0, 3 * S), None, 1)
    assert short["energy_mj_per_inference"] is None
    assert "4 samples" in short["energy_source"]["why_not"]
    assert energy_per_inference(seen, (100 * S, 200 * S), None, 1)["energy_source"]["samples"] == 0


def test_the_meter_of_each_board(tmp_path: Path) -> None:
    found = {name: find_meter(str(make(tmp_path / name))) for name, make in boards.ALL.items()}
    kinds = {name: type(meter) for name, meter in found.items()}
    assert kinds == dict.fromkeys(boards.ALL, RailMeter) | {"raspberry_pi": type(None), "x86": CounterMeter}
    orin, x86 = found["agx_orin"], found["x86"]
    assert isinstance(orin, RailMeter)
    assert isinstance(x86, CounterMeter)
    assert orin.read() == [2400.0, 800.0, 4000.0, 300.0]
    assert (orin.total, orin.wraps) == (["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"], None)
    assert (x86.names, x86.read(), x86.wraps) == (["package-0"], [262143000000.0], [262143328850]), "no subdomain twice"


def test_a_meter_that_stops_to_answer_gives_nothing(tmp_path: Path) -> None:
    meter = find_meter(str(boards.orin_nano(tmp_path)))
    assert meter is not None
    (tmp_path / "sys/class/hwmon/hwmon1/curr3_input").unlink()
    assert meter.read() is None


def test_tegrastats_where_the_files_are_missing(tmp_path: Path) -> None:
    lines = "; ".join(f"echo '{boards.TEGRASTATS['orin_nano'].replace('16321', str(mw))}'" for mw in (1000, 2000))
    boards.program(tmp_path, "/usr/bin/tegrastats", f"{lines}; printf 'half a li'; exec sleep 30")
    meter = find_meter(str(tmp_path))
    assert isinstance(meter, TegrastatsMeter)
    values = None
    until = time.monotonic() + 10
    while values is None and time.monotonic() < until:
        values = meter.read()
    process = meter._process
    meter.close()
    assert values == [2000.0, 7104.0, 3120.0], "the last whole line"
    assert (meter.names, meter.total) == (["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"], ["VDD_IN"])
    assert process is not None
    assert process.poll() is not None, "it is ended with the meter"


def test_sampling_reads_until_it_is_told(tmp_path: Path) -> None:
    root = boards.orin_nano(tmp_path)
    rounds: list[float] = []

    def goes_on(seconds: float) -> bool:
        rounds.append(seconds)
        (root / "sys/class/devfreq/17000000.gpu/cur_freq").write_text("306000000\n")
        (root / "sys/class/hwmon/hwmon1/curr1_input").write_text("2400\n")
        return len(rounds) < 3

    seen = sample(str(root), goes_on, lambda: None)
    assert [values[0] for _, values in seen.power] == [6000.0, 12000.0, 12000.0]
    assert [mhz for _, mhz in seen.gpu_mhz] == [1020.0, 306.0, 306.0]
    assert (seen.names[0], seen.total, seen.source) == ("VDD_IN", ["VDD_IN"], RailMeter.source)
    assert seen.temperatures_c[0][1] == {"cpu-thermal": 52.125, "gpu-thermal": 51.5}
    assert isinstance(seen.brakes[0][1], Brakes)
    assert min(rounds) >= 0


def test_a_machine_that_tells_nothing_needs_no_sampler(tmp_path: Path) -> None:
    assert not worth_sampling(str(tmp_path))
    assert worth_sampling(str(boards.raspberry_pi(tmp_path)))


def test_the_sampler_in_its_own_process(tmp_path: Path) -> None:
    sampler = Sampler(str(boards.thor(tmp_path)))
    begin = time.monotonic_ns()
    assert sampler.start()
    time.sleep(0.2)
    seen = sampler.stop()
    assert seen is not None
    assert len(seen.power) >= 2
    assert all(begin <= moment <= time.monotonic_ns() for moment, _ in seen.power), "both use one clock"
    assert seen.total == ["VIN"]
    assert dict(zip(seen.names, seen.power[0][1], strict=True))["VIN"] == 25530.0
    assert sampler.stop() is None


def test_a_sampler_that_cannot_work_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(str(boards.thor(tmp_path)))
    monkeypatch.setattr("kdedge_device.sampler.child", lambda *a: [sys.executable, "-c", "raise SystemExit(1)"])
    assert not sampler.start()
    monkeypatch.setattr("kdedge_device.sampler.child", lambda *a: [str(tmp_path / "absent")])
    assert not sampler.start()
    assert sampler.stop() is None


def test_a_killed_sampler_leaves_no_trace(tmp_path: Path) -> None:
    sampler = Sampler(str(boards.thor(tmp_path)))
    assert sampler.start()
    assert sampler._process is not None
    sampler._process.kill()
    assert sampler.stop() is None


def gone(pid: int, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not boards.is_gone(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return boards.is_gone(pid)


PARENT = """
import os, sys, time
sys.path.insert(0, {package!r})
from kdedge_device.sampler import Sampler
sampler = Sampler({root!r})
assert sampler.start()
print(sampler._process.pid, flush=True)
{more}
time.sleep(60)
"""
# A child that inherits the pipe's end keeps it open after its parent's death.
HOLDER = "import subprocess\nsubprocess.Popen(['sleep', '60'], pass_fds=[sampler._process.stdin.fileno()], stdout=2)"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_the_process_that_started_it(tmp_path: Path, number: signal.Signals) -> None:
    _killed_parent(tmp_path, "", lambda parent: parent.send_signal(number))


def test_it_ends_also_where_another_child_holds_the_pipe_open(tmp_path: Path) -> None:
    """Its own end closes when its parent is killed, but a sleeping sibling keeps the other one."""
    _killed_parent(tmp_path, HOLDER, lambda parent: parent.kill())


def _killed_parent(tmp_path: Path, more: str, kill: Callable[["subprocess.Popen[str]"], None]) -> None:
    root = boards.orin_nano(tmp_path)
    package = str(Path(kdedge_device.__file__).parents[1])
    lines = PARENT.format(package=package, root=str(root), more=more)
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-c", lines]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True, start_new_session=True) as parent:
        assert parent.stdout is not None
        sampler = int(parent.stdout.readline())
        assert not boards.is_gone(sampler)
        kill(parent)
        parent.wait(10)
        try:
            assert gone(sampler), "the sampler outlived its parent"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)  # the sleeping sibling
