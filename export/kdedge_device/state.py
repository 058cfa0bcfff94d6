"""The state a machine is in while it is timed: power mode, clocks, temperatures, brakes, fan, memory, uptime.

Of Jetsons with JetPack 5 to 7, of a Raspberry Pi and of an x86 machine alike: each of them has some of these files. All
readable without root but the EMC clock, which is null then. Nothing is changed. Python 3.8, standard library.
"""

import os
import re
import shutil
import subprocess
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from kdedge_device.sysfs import at, paths, read, read_int

__all__ = [
    "Trip",
    "clocks_mhz",
    "cpu_clock_paths",
    "fan",
    "gpu_clock_path",
    "memory_mib",
    "power_mode",
    "power_modes",
    "program",
    "temperatures_c",
    "trips",
    "uptime_s",
]

Run = Callable[[List[str]], Optional[str]]
Clock = Dict[str, Optional[float]]


def program(root: str, name: str) -> Optional[str]:
    """Where a program of the machine below `root` lies; on this machine ("/") also what PATH finds."""
    for folder in ("/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/bin"):
        path = at(root, f"{folder}/{name}")
        if os.access(path, os.X_OK):
            return path
    return shutil.which(name) if root == "/" else None


def answer(command: List[str], timeout_s: float = 10.0) -> Optional[str]:
    """What a program printed; None where it failed or took too long. It gets no input, so that it cannot ask."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=timeout_s
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def power_modes(root: str = "/") -> Dict[str, int]:
    """Names and ids in the active configuration of nvpmodel. Ids differ between modules and JetPacks; names do not."""
    text = read(root, "/etc/nvpmodel.conf") or ""
    found = {}
    for line in re.findall(r"^\s*<\s*POWER_MODEL\s+([^>]*)>", text, re.MULTILINE):
        fields = dict(re.findall(r"(\w+)=(\S+)", line))
        if "NAME" in fields and fields.get("ID", "").isdigit():
            found[fields["NAME"]] = int(fields["ID"])
    return found


def power_mode(root: str = "/", run: Run = answer) -> Optional[Dict[str, Any]]:
    """{"id", "name"}: of `nvpmodel -q`, else of the file it writes. None on a machine without power modes."""
    path = program(root, "nvpmodel")
    told = (run([path, "-q"]) if path else None) or ""
    name = re.search(r"NV Power Mode:\s*(\S+)", told)
    number = re.search(r"^\s*(\d+)\s*$", told, re.MULTILINE)
    if name:
        known = power_modes(root).get(name.group(1))
        return {"id": int(number.group(1)) if number else known, "name": name.group(1)}
    status = re.search(r"pmode:(\d+)", read(root, "/var/lib/nvpmodel/status") or "")
    if status is None:
        return None
    mode = int(status.group(1))
    names = [name for name, each in power_modes(root).items() if each == mode]
    return {"id": mode, "name": names[0] if names else None}


def clocks_mhz(root: str = "/") -> Optional[Dict[str, Optional[Clock]]]:
    """{"gpu", "emc", "cpu"}: {"min", "cur", "max"} in MHz, min and max being the limits now set. EMC is the memory's.

    Of several CPU clusters the lowest minimum, and the highest current and maximum.
    """
    clocks = {"gpu": _devfreq(root, _gpu(root)), "emc": _emc(root), "cpu": _cpu(root)}
    return clocks if any(clocks.values()) else None


def gpu_clock_path(root: str = "/") -> Optional[str]:
    """The file with the GPU's clock in Hz, or None."""
    folder = _gpu(root)
    return f"{folder}/cur_freq" if folder else None


def cpu_clock_paths(root: str = "/") -> List[str]:
    """The files with the clock of each cluster of cores in kHz; none in most virtual machines."""
    return paths(root, "/sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq")


def _gpu(root: str) -> Optional[str]:
    """Xavier names it 17000000.gv11b, Orin .ga10b (JetPack 5) or .gpu (from 6 on), Thor gpu-gpc-0, with gpu-nvd-0
    beside it, which is the video decoder's clock."""
    for path in paths(root, "/sys/class/devfreq/*"):
        if re.search(r"gpu-gpc-0$|\.gpu$|\.g[a-z]\d+b$", path):
            return path
    return None


def _devfreq(root: str, folder: Optional[str]) -> Optional[Clock]:
    if folder is None:
        return None
    return {key: _mhz(read_int(root, f"{folder}/{key}_freq"), 1e6) for key in ("min", "cur", "max")}


def _emc(root: str) -> Optional[Clock]:
    """Thor has it among the devfreq devices; before, only root may read it."""
    if read_int(root, "/sys/class/devfreq/bwmgr/cur_freq") is not None:
        return _devfreq(root, "/sys/class/devfreq/bwmgr")
    folder = "/sys/kernel/debug/bpmp/debug/clk/emc"
    if read_int(root, f"{folder}/rate") is None:
        return None
    files = {"min": "min_rate", "cur": "rate", "max": "max_rate"}
    return {key: _mhz(read_int(root, f"{folder}/{file}"), 1e6) for key, file in files.items()}


def _cpu(root: str) -> Optional[Clock]:
    folders = paths(root, "/sys/devices/system/cpu/cpufreq/policy*")
    values = {
        key: [v for v in (read_int(root, f"{folder}/scaling_{key}_freq") for folder in folders) if v is not None]
        for key in ("min", "cur", "max")
    }
    if values["cur"]:
        picks = {"min": min, "cur": max, "max": max}
        return {key: _mhz(picks[key](each), 1e3) if each else None for key, each in values.items()}
    # A virtual machine has no frequency scaling, but tells a clock.
    told = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", read(root, "/proc/cpuinfo") or "", re.MULTILINE)
    return {"min": None, "cur": max(float(each) for each in told), "max": None} if told else None


def _mhz(value: Optional[int], divisor: float) -> Optional[float]:
    return None if value is None else round(value / divisor, 3)


def temperatures_c(root: str = "/") -> Optional[Dict[str, float]]:
    """Degrees by thermal zone, without sensors whose part of the chip is off: they do not answer, or with -256."""
    found: Dict[str, float] = {}
    for name, folder in _zones(root).items():
        value = read_int(root, f"{folder}/temp")
        if value is not None and value > -100000:
            found[name] = value / 1000
    return found or None


def _zones(root: str) -> Dict[str, str]:
    """Folders by name; of zones with one name the second becomes "name 2"."""
    zones: Dict[str, str] = {}
    seen: Dict[str, int] = {}
    for folder in paths(root, "/sys/class/thermal/thermal_zone*"):
        kind = read(root, f"{folder}/type")
        if kind is not None:
            seen[kind] = seen.get(kind, 0) + 1
            zones[kind if seen[kind] == 1 else f"{kind} {seen[kind]}"] = folder
    return zones


class Trip(NamedTuple):
    """From `celsius` on the kernel slows the machine down (passive) or switches it off (hot, critical)."""

    zone: str
    kind: str
    celsius: float


def trips(root: str = "/") -> List[Trip]:
    """Trip points that change what a machine computes: not those that start a fan (active), nor those that only report.

    Orin's at 70 degrees is of the second kind: it is passive, and all that hangs on it is "hot-surface-alert".
    """
    found = []
    for zone, folder in _zones(root).items():
        bound = _bound(root, folder)
        for path in paths(root, f"{folder}/trip_point_*_type"):
            kind, number = read(root, path), path.rsplit("_", 2)[1]
            value = read_int(root, f"{folder}/trip_point_{number}_temp")
            reports = bound.get(number) and all("hot-surface" in name or "fan" in name for name in bound[number])
            # 0 and less stand for "not set".
            if kind in ("passive", "hot", "critical") and value is not None and value > 0 and not reports:
                found.append(Trip(zone, str(kind), value / 1000))
    return found


def _bound(root: str, folder: str) -> Dict[str, List[str]]:
    """What cools at each trip point, by the point's number."""
    bound: Dict[str, List[str]] = {}
    for path in paths(root, f"{folder}/cdev*_trip_point"):
        device = path[: -len("_trip_point")]
        bound.setdefault(read(root, path) or "", []).append((read(root, f"{device}/type") or "").lower())
    return bound


def fan(root: str = "/") -> Optional[Dict[str, Optional[int]]]:
    """{"pwm": 0 to 255, "rpm"}: of the first fan that hwmon knows."""
    pwm: Optional[int] = None
    rpm: Optional[int] = None
    for folder in paths(root, "/sys/class/hwmon/hwmon*"):
        pwm = read_int(root, f"{folder}/pwm1") if pwm is None else pwm
        for file in ("rpm", "fan1_input"):
            rpm = read_int(root, f"{folder}/{file}") if rpm is None else rpm
    return None if pwm is None and rpm is None else {"pwm": pwm, "rpm": rpm}


def memory_mib(root: str = "/") -> Optional[Dict[str, int]]:
    """{"total", "available"}; a Jetson's GPU uses the same memory."""
    told = dict(re.findall(r"^(\w+):\s*(\d+) kB", read(root, "/proc/meminfo") or "", re.MULTILINE))
    if "MemTotal" not in told or "MemAvailable" not in told:
        return None
    return {"total": int(told["MemTotal"]) // 1024, "available": int(told["MemAvailable"]) // 1024}


def uptime_s(root: str = "/") -> Optional[float]:
    found = re.match(r"[\d.]+", read(root, "/proc/uptime") or "")
    return float(found.group(0)) if found else None
