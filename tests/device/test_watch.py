"""The watch: what it tells of a board's state, and why a number is not stable."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdedge_device.clock import summarize, variation
from kdedge_device.failures import Failure
from kdedge_device.sampler import Trace
from kdedge_device.watch import Watch, snapshot

from . import boards

STEADY = {"p50": 1.0, "p90": 1.01, "p99": 1.1, "min": 0.9, "max": 1.2, "mean": 1.0, "std": 0.01, "count": 2000}


def watched(root: Path, meanwhile: Callable[[], None] = lambda: None, **options: Any) -> Watch:
    """A watch over a timed part in which `meanwhile` happens to the board."""
    with Watch(str(root), idle_s=0.0, **options) as watch:
        watch.mark_start()
        meanwhile()
        watch.mark_end()
    return watch


def change(root: Path, path: str, text: str) -> Callable[[], None]:
    return lambda: boards.put(root, {path: text}) and None


@pytest.mark.parametrize("name", sorted(boards.ALL))
def test_a_board_at_rest_is_stable(tmp_path: Path, name: str) -> None:
    watch = watched(boards.ALL[name](tmp_path), energy=False)
    knows = name not in ("jetpack_4",)
    assert watch.verdict(STEADY) == {
        "stable": True,
        "why": [],
        "throttled": False if knows else None,
        "unstable": False,
    }
    json.dumps(watch.conditions(), allow_nan=False)


def test_conditions(tmp_path: Path) -> None:
    found = watched(boards.orin_nano(tmp_path), energy=False).conditions()
    assert found["power_mode"] == {"id": 2, "name": "MAXN_SUPER"}
    assert found["clocks_mhz"]["before"]["gpu"] == {"min": 306.0, "cur": 1020.0, "max": 1020.0}
    assert found["clocks_mhz"]["gpu_while_timed"] is None, "nothing looked"
    assert found["temperature_c"]["after"] == {"cpu-thermal": 52.125, "gpu-thermal": 51.5}
    assert found["throttle"]["before"]["events"]["oc2: average over-current"] == 15
    assert found["fan"] == {"pwm": 120, "rpm": 2140}
    assert (found["memory_mib"]["total"], found["uptime_s"]) == (7812, 3605.25)
    assert (found["board"]["family"], found["board"]["jetpack"]) == ("orin", "6.2")


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    watch = watched(tmp_path)
    found = watch.conditions()
    assert {key: found[key] for key in ("power_mode", "clocks_mhz", "fan", "memory_mib", "uptime_s")} == dict.fromkeys(
        ("power_mode", "clocks_mhz", "fan", "memory_mib", "uptime_s")
    )
    assert found["temperature_c"] == found["throttle"] == {"before": None, "after": None}
    assert watch.energy(10) == {"energy_mj_per_inference": None, "energy_source": None}
    assert watch.verdict(STEADY)["throttled"] is None
    assert watch.verdict(STEADY)["stable"]


def test_this_machine_whatever_it_is() -> None:
    watch = watched(Path("/"))
    json.dumps([watch.conditions(), watch.energy(1), watch.verdict(STEADY)], allow_nan=False)
    assert watch.conditions()["board"]["python"]


def test_times_that_vary(tmp_path: Path) -> None:
    watch = watched(tmp_path, energy=False)
    for times in ([1000] * 2000, [1000, 1060] * 500, [1000] * 980 + [1600] * 20, [1000], [1000, 1040]):
        summary = summarize([each * 1000 for each in times])
        assert watch.verdict(summary)["why"] == variation(summary), times
    why = watch.verdict({**STEADY, "std": 0.026})["why"]
    assert len(why) == 1
    assert why[0].startswith("The times vary by 2.6% of their mean")
    why = watch.verdict({**STEADY, "p99": 1.51})["why"]
    assert len(why) == 1
    assert "p99 is 1.51 times p50" in why[0]
    assert watch.verdict({**STEADY, "std": None, "p99": None})["stable"]


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("/sys/class/hwmon/hwmon3/oc3_event_cnt", "40", r"'oc3: instantaneous over-current' rose by 3"),
        ("/sys/class/hwmon/hwmon1/curr1_crit_alarm", "1", r"The alarm 'VDD_IN crit' is on"),
        ("/sys/class/thermal/cooling_device1/cur_state", "4", r"The brake 'cpufreq-cpu0' is on \(state 4\)"),
    ],
)
def test_brakes(tmp_path: Path, path: str, text: str, words: str) -> None:
    root = boards.orin_nano(tmp_path)
    verdict = watched(root, change(root, path, text), energy=False).verdict(STEADY)
    assert (verdict["stable"], verdict["throttled"], len(verdict["why"])) == (False, True, 1)
    assert verdict["why"][0].startswith("The ")
    assert re.search(words, verdict["why"][0])


def test_a_counter_that_rose_before_the_timed_part_is_none_of_its_business(tmp_path: Path) -> None:
    root = boards.orin_nano(tmp_path)
    with Watch(str(root), energy=False) as watch:
        change(root, "/sys/class/hwmon/hwmon3/oc3_event_cnt", "99")()
        watch.mark_start()
        watch.mark_end()
    assert watch.verdict(STEADY)["stable"]


def test_x86_and_the_raspberry_pi_throttle_too(tmp_path: Path) -> None:
    root = boards.x86(tmp_path / "x86")
    count = change(root, "/sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count", "9")
    assert watched(root, count, energy=False).verdict(STEADY)["throttled"]
    root = boards.raspberry_pi(tmp_path / "pi")
    bits = change(root, "/sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled", "50005")
    verdict = watched(root, bits, energy=False).verdict(STEADY)
    assert [sentence.split("'")[1] for sentence in verdict["why"]] == [
        "pi: under-voltage",
        "pi: throttled",
        "pi: throttled, ever",
    ]


def test_a_trip_point(tmp_path: Path) -> None:
    """99.5 degrees crosses 99, and neither 104.5 nor the warning at 50."""
    root = boards.orin_nano(tmp_path)
    hot = change(root, "/sys/class/thermal/thermal_zone0/temp", "99500")
    verdict = watched(root, hot, energy=False).verdict(STEADY)
    assert verdict["why"] == [
        "cpu-thermal reached 99.5 degrees C, and its passive trip point is at 99.0: "
        "cool the board, or choose a lower power mode."
    ]


def test_a_power_mode_that_changed(tmp_path: Path) -> None:
    root = boards.orin_nano(tmp_path)
    mode = change(root, "/var/lib/nvpmodel/status", "pmode:0001")
    assert watched(root, mode, energy=False).verdict(STEADY)["why"] == [
        "The power mode changed from MAXN_SUPER to 25W."
    ]


def slowly(*steps: Callable[[], None]) -> Callable[[], None]:
    """Each step lasts for several of the sampler's looks."""

    def run() -> None:
        for step in steps:
            step()
            time.sleep(0.3)

    return run


def test_a_gpu_clock_that_moved_and_came_back(tmp_path: Path) -> None:
    """Looks before and after would not see it. It counts where the GPU is used."""
    root = boards.orin_nano(tmp_path)
    clock = "/sys/class/devfreq/17000000.gpu/cur_freq"
    steps = [change(root, clock, hertz) for hertz in ("1020000000", "306000000", "1020000000")]
    watch = watched(root, slowly(*steps), uses_gpu=True)
    clocks = watch.conditions()["clocks_mhz"]
    assert (clocks["judged"], clocks["gpu_while_timed"]["min"], clocks["gpu_while_timed"]["max"]) == ("gpu", 306, 1020)
    assert watch.verdict(STEADY)["why"] == [
        "The GPU's clock moved between 306 and 1020 MHz; --set-clocks holds it still."
    ]
    assert watched(root, slowly(*steps)).verdict(STEADY)["stable"]


def looks(root: Path, megahertz: list[float]) -> Watch:
    """A watch with as many looks at the processor's clock, without the seconds that they would take."""
    watch = watched(root, energy=False)
    at = (watch._start_ns or 0) + 1
    watch._end_ns = at
    watch._trace = Trace(None, None, [], [], None, [], [], [(at, each) for each in megahertz], [], [])
    return watch


def test_a_processors_clock_that_moved(tmp_path: Path) -> None:
    """A governor is never quite still: a tenth of the looks, and 5 %, do not count. Where a GPU computes, none does."""
    root = boards.raspberry_pi(tmp_path)
    for quiet in ([2400.0] * 18 + [1500.0] * 2, [2400.0, 2300.0] * 10, [2400.0] * 5 + [1500.0] * 4, []):
        assert looks(root, quiet).verdict(STEADY)["stable"], quiet
    moving = looks(root, [2400.0] * 15 + [1500.0] * 5)
    assert moving.conditions()["clocks_mhz"]["cpu_while_timed"] == {"min": 1500, "max": 2400, "p10": 1500, "p90": 2400}
    assert moving.verdict(STEADY)["why"] == [
        "The processor's clock moved between 1500 and 2400 MHz, and 5% is the most that is called stable: "
        "--set-clocks on a Jetson, or the governor 'performance', holds it still."
    ]
    moving._judged = "gpu"
    assert moving.verdict(STEADY)["stable"]


def test_the_highest_clock_of_all_clusters_is_looked_at(tmp_path: Path) -> None:
    root = boards.orin_nano(tmp_path)
    slow, fast = (f"/sys/devices/system/cpu/cpufreq/policy{number}/scaling_cur_freq" for number in (0, 4))
    boards.put(root, {slow: "729600", fast: "1510400"})
    watch = watched(root, slowly(lambda: None))
    assert watch.conditions()["clocks_mhz"]["cpu_while_timed"]["min"] == 1510.4


def test_energy_of_the_timed_part(tmp_path: Path) -> None:
    """6 W before, 12 W while timed: the mean is 12 W, and what an inference takes follows from its time."""
    root = boards.orin_nano(tmp_path)
    with Watch(str(root), idle_s=0.5) as watch:
        change(root, "/sys/class/hwmon/hwmon1/curr1_input", "2400")()
        watch.mark_start()
        time.sleep(1.5)
        watch.mark_end()
    found = watch.energy(100)
    source = found["energy_source"]
    assert source["mean_mw"] == pytest.approx(12000.0)
    assert source["idle_mw"] == pytest.approx(6000.0)
    assert found["energy_mj_per_inference"] == pytest.approx(12000.0 * source["seconds"] / 100)
    assert source["above_idle_mj_per_inference"] == pytest.approx(6000.0 * source["seconds"] / 100)
    assert source["seconds"] >= 1.5
    assert "wall" in source["caveat"]


def test_a_processors_counter_is_not_the_energy_of_a_graphics_card(tmp_path: Path) -> None:
    root = boards.x86(tmp_path)
    with Watch(str(root), idle_s=0.0) as watch:
        watch.mark_start()
        time.sleep(0.2)
        watch.mark_end()
    assert watch.energy(1)["energy_source"]["source"].startswith("intel-rapl")
    watch._uses_gpu = True
    assert watch.energy(1) == {"energy_mj_per_inference": None, "energy_source": None}


def test_a_snapshot(tmp_path: Path) -> None:
    found = snapshot(str(boards.orin_nano(tmp_path)))
    assert found["power_mode"]["name"] == "MAXN_SUPER"
    assert found["power_mw"] == {"VDD_IN": 6000.0, "VDD_CPU_GPU_CV": 2000.0, "VDD_SOC": 1500.0}
    assert found["brakes"]["events"]["oc2: average over-current"] == 15
    assert found["clocks_left_held"] is None
    boards.put(tmp_path, {"/var/lib/kdedge/clocks.json": '{"boot": null, "mode": null}'})
    assert "cut off" in snapshot(str(tmp_path))["clocks_left_held"]
    json.dumps([found, snapshot("/"), snapshot(str(boards.x86(tmp_path / "x86")))], allow_nan=False)


def test_the_sampler_is_gone_after_an_error(tmp_path: Path) -> None:
    processes = []

    def fail() -> None:
        with Watch(str(boards.orin_nano(tmp_path)), idle_s=0.0) as watch:
            processes.append(watch._sampler._process if watch._sampler else None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert processes[0] is not None
    assert processes[0].poll() == 0


def test_it_cannot_be_asked_too_early(tmp_path: Path) -> None:
    watch = Watch(str(tmp_path))
    for question in (watch.conditions, lambda: watch.energy(1), lambda: watch.verdict(STEADY)):
        with pytest.raises(Failure, match="before its measurement ended"):
            question()
