"""Power mode, clocks, temperatures, trip points, brakes and rails, on trees of each generation."""

from pathlib import Path

import pytest

from kdedge_device import state
from kdedge_device.brakes import Brakes, pulled, read_brakes
from kdedge_device.rails import find_rails, parse_tegrastats, rail_milliwatts, rails_of_total

from . import boards


def test_the_power_mode_without_the_program(tmp_path: Path) -> None:
    """The same id is another mode on another board: the name is what tells."""
    found = {name: state.power_mode(str(make(tmp_path / name))) for name, make in boards.ALL.items()}
    assert found["xavier_nx"] == {"id": 2, "name": "MODE_15W_6CORE"}
    assert found["orin_nano"] == {"id": 2, "name": "MAXN_SUPER"}
    assert found["agx_orin"] == found["thor"] == {"id": 0, "name": "MAXN"}
    assert found["raspberry_pi"] is found["x86"] is None


def test_the_power_mode_of_the_program(tmp_path: Path) -> None:
    root = boards.orin_nano(tmp_path)
    boards.program(root, "/usr/sbin/nvpmodel", 'echo "NV Power Mode: 25W"; echo 1')
    assert state.power_mode(str(root)) == {"id": 1, "name": "25W"}
    boards.program(root, "/usr/sbin/nvpmodel", 'echo "NVPM WARN: fan mode is not set!"; echo "NV Power Mode: 7W"')
    assert state.power_mode(str(root)) == {"id": 3, "name": "7W"}, "the id is in the configuration"
    boards.program(root, "/usr/sbin/nvpmodel", "echo 'NVPM ERROR: not permitted' >&2; exit 1")
    assert state.power_mode(str(root)) == {"id": 2, "name": "MAXN_SUPER"}, "what it wrote when it was last set"
    assert state.power_modes(str(root)) == {"15W": 0, "25W": 1, "MAXN_SUPER": 2, "7W": 3}


def test_a_mode_that_the_configuration_does_not_name(tmp_path: Path) -> None:
    root = boards.put(boards.orin_nano(tmp_path), {"/var/lib/nvpmodel/status": "pmode:0009\n"})
    assert state.power_mode(str(root)) == {"id": 9, "name": None}


def test_a_program_that_asks_or_hangs_gets_no_answer(tmp_path: Path) -> None:
    boards.program(tmp_path, "/usr/sbin/nvpmodel", "read answer && echo asked || echo refused")
    assert state.answer([str(tmp_path / "usr/sbin/nvpmodel")]) == "refused\n"
    boards.program(tmp_path, "/usr/sbin/nvpmodel", "exec sleep 20")
    assert state.answer([str(tmp_path / "usr/sbin/nvpmodel")], timeout_s=0.2) is None
    assert state.answer([str(tmp_path / "absent")]) is None


@pytest.mark.parametrize(
    ("name", "gpu", "emc", "cpu"),
    [
        ("xavier_nx", (114.75, 204.0, 1109.25), None, (1190.4, 1190.4, 1420.8)),
        ("orin_nano", (306.0, 1020.0, 1020.0), None, (729.6, 1728.0, 1728.0)),
        ("agx_orin", None, (204.0, 3199.0, 3199.0), None),
        ("thor", (315.0, 1575.0, 1575.0), (665.6, 4266.0, 4266.0), None),
        ("raspberry_pi", None, None, (1500.0, 2400.0, 2400.0)),
        ("x86", None, None, (400.0, 3600.0, 4200.0)),
    ],
)
def test_clocks(
    tmp_path: Path,
    name: str,
    gpu: tuple[float, ...] | None,
    emc: tuple[float, ...] | None,
    cpu: tuple[float, ...] | None,
) -> None:
    found = state.clocks_mhz(str(boards.ALL[name](tmp_path)))
    assert found is not None
    told = {unit: None if clock is None else tuple(clock.values()) for unit, clock in found.items()}
    assert told == {"gpu": gpu, "emc": emc, "cpu": cpu}


def test_the_clock_of_a_virtual_machine(tmp_path: Path) -> None:
    boards.put(tmp_path, {"/proc/cpuinfo": "processor : 0\ncpu MHz\t\t: 2300.000\ncpu MHz\t\t: 2299.5\n"})
    assert state.clocks_mhz(str(tmp_path)) == {
        "gpu": None,
        "emc": None,
        "cpu": {"min": None, "cur": 2300.0, "max": None},
    }


def test_temperatures_without_sensors_that_are_off(tmp_path: Path) -> None:
    orin = str(boards.orin_nano(tmp_path / "orin"))
    assert state.temperatures_c(orin) == {"cpu-thermal": 52.125, "gpu-thermal": 51.5}
    x86 = str(boards.x86(tmp_path / "x86"))
    assert state.temperatures_c(x86) == {"x86_pkg_temp": 61.0, "acpitz": 40.0, "acpitz 2": 41.0}


def test_trip_points_that_change_what_is_computed(tmp_path: Path) -> None:
    """Not the one at 50 degrees, on which only a warning hangs, nor the fan's."""
    found = state.trips(str(boards.orin_nano(tmp_path / "orin")))
    assert sorted(found) == [
        ("cpu-thermal", "critical", 104.5),
        ("cpu-thermal", "passive", 99.0),
        ("gpu-thermal", "passive", 99.0),
    ]
    assert state.trips(str(boards.x86(tmp_path / "x86"))) == [("x86_pkg_temp", "passive", 100.0)]


def test_fan_memory_and_uptime(tmp_path: Path) -> None:
    root = str(boards.orin_nano(tmp_path))
    assert state.fan(root) == {"pwm": 120, "rpm": 2140}
    assert state.memory_mib(root) == {"total": 7812, "available": 5859}
    assert state.uptime_s(root) == 3605.25


def test_brakes_of_each_generation(tmp_path: Path) -> None:
    found = {name: read_brakes(str(make(tmp_path / name))) for name, make in boards.ALL.items()}
    orin, pi, x86 = found["orin_nano"], found["raspberry_pi"], found["x86"]
    assert orin is not None
    assert pi is not None
    assert x86 is not None
    assert orin.states == {"cpufreq-cpu0": 0, "devfreq-17000000.gpu": 0}, "neither the fan nor the warning"
    assert orin.events == {
        "oc1: under-voltage": 0,
        "oc2: average over-current": 15,
        "oc3: instantaneous over-current": 37,
    }
    rails = ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")
    assert set(orin.alarms) == {f"{rail} {kind}" for rail in rails for kind in ("max", "crit")} | {"all rails crit"}
    assert list(pi.states.values()) == [0, 0, 0, 0]
    assert pi.events["pi: under-voltage, ever"] == 1
    assert sum(pi.events.values()) == 1
    assert pi.alarms == {"supply voltage low": 0}
    assert x86 == Brakes({"Processor": 0}, {"core thermal throttling": 3, "package thermal throttling": 7}, {})
    assert found["jetpack_4"] is None, "which is not the same as none of them being on"


def test_what_is_said_of_brakes() -> None:
    before = Brakes({"cpufreq-cpu0": 0}, {"oc3": 37, "oc2": 1}, {"VDD_IN crit": 0})
    assert pulled(before, before) == {}
    after = Brakes({"cpufreq-cpu0": 2}, {"oc3": 40, "oc2": 1}, {"VDD_IN crit": 1})
    said = pulled(before, after)
    assert set(said) == {"cpufreq-cpu0", "oc3", "VDD_IN crit"}
    assert "rose by 3" in said["oc3"]
    assert pulled(None, Brakes({}, {"oc3": 40}, {})) == {}, "one look says nothing of a counter"
    assert pulled(before, None) == {}


@pytest.mark.parametrize(
    ("name", "total", "milliwatts"),
    [
        ("xavier_nx", ["VDD_IN"], 2760.0),  # 5 V x 552 mA
        ("agx_xavier", ["GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"], 8350.0),  # 9 V x 650 mA + 5 V x 500 mA
        ("orin_nano", ["VDD_IN"], 6000.0),
        ("agx_orin", ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"], 7200.0),  # 20 V x 160 mA + 5 V x 800 mA
        ("thor", ["VIN"], 25530.0),
        ("jetpack_4", ["POM_5V_IN"], 3100.0),
    ],
)
def test_rails(tmp_path: Path, name: str, total: list[str], milliwatts: float) -> None:
    root = str(boards.ALL[name](tmp_path))
    rails = find_rails(root)
    assert rails_of_total([rail.name for rail in rails]) == total
    found = {rail.name: rail_milliwatts(root, rail) for rail in rails}
    assert sum(found[each] or 0 for each in total) == pytest.approx(milliwatts)
    assert not {"NC", "sum of shunt voltages"} & set(found)


def test_thor_without_its_input_is_the_sum_of_three(tmp_path: Path) -> None:
    root = boards.thor(tmp_path)
    (root / "sys/class/hwmon/hwmon4/name").write_text("nct6775\n")
    assert rails_of_total([rail.name for rail in find_rails(str(root))]) == [
        "VDD_GPU",
        "VDD_CPU_SOC_MSS",
        "VIN_SYS_5V0",
    ]


def test_no_rails_and_rails_that_do_not_answer(tmp_path: Path) -> None:
    assert find_rails(str(boards.raspberry_pi(tmp_path / "pi"))) == []
    root = boards.orin_nano(tmp_path / "orin")
    rails = find_rails(str(root))
    (root / "sys/class/hwmon/hwmon1/in1_input").write_text("\n")
    assert [rail_milliwatts(str(root), rail) for rail in rails] == [None, 2000.0, 1500.0]


@pytest.mark.parametrize(
    ("name", "total", "milliwatts"),
    [
        ("xavier_nx", ["VDD_IN"], 2763.0),
        ("agx_xavier", ["GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"], 5258.0),
        ("orin_nano", ["VDD_IN"], 16321.0),
        ("agx_orin", ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"], 6755.0),
        ("thor", ["VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"], 15085.0),  # -392 + 8710 + 6767
        ("jetpack_4", ["VDD_IN"], 3875.0),
    ],
)
def test_tegrastats(name: str, total: list[str], milliwatts: float) -> None:
    found = parse_tegrastats(boards.TEGRASTATS[name])
    assert rails_of_total(list(found)) == total
    assert sum(found[each] for each in total) == milliwatts
    assert not {"RAM", "SWAP", "NC", "CPU_TOT"} & set(found)
