"""Trees of the small files that a board shows under /proc, /sys and /etc, one function for each generation.

Names and forms are those that such boards were seen with; the numbers are chosen so that sums can be checked by hand.
"""

from collections.abc import Callable
from pathlib import Path

Files = dict[str, str]

_MEMORY = "MemTotal:        8000000 kB\nMemFree:          100000 kB\nMemAvailable:    6000000 kB\n"


def put(root: Path, files: Files) -> Path:
    for name, text in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def program(root: Path, path: str, script: str) -> None:
    """A program of the board: a shell script."""
    put(root, {path: f"#!/bin/sh\n{script}\n"})
    (root / path.lstrip("/")).chmod(0o755)


def _tree(model: str, *compatible: str) -> Files:
    return {
        "/proc/device-tree/model": model + "\0",
        "/proc/device-tree/compatible": "\0".join(compatible) + "\0",
        "/proc/meminfo": _MEMORY,
        "/proc/uptime": "3605.25 20000.00\n",
    }


def _ina3221(number: int, *rails: tuple[str, int, int]) -> Files:
    """Label, millivolts and milliamperes of up to three channels, and what else the chip shows."""
    folder = f"/sys/class/hwmon/hwmon{number}"
    files = {f"{folder}/name": "ina3221\n", f"{folder}/in7_label": "sum of shunt voltages\n"}
    files |= {f"{folder}/in7_input": "99\n", f"{folder}/curr4_input": "99999\n", f"{folder}/curr4_crit_alarm": "0\n"}
    for channel, (label, millivolts, milliamperes) in enumerate(rails, 1):
        files |= {
            f"{folder}/in{channel}_label": label + "\n",
            f"{folder}/in{channel}_input": f"{millivolts}\n",
            f"{folder}/curr{channel}_input": f"{milliamperes}\n",
            f"{folder}/in{channel + 3}_input": "17\n",
            f"{folder}/curr{channel}_crit_alarm": "0\n",
            f"{folder}/curr{channel}_max_alarm": "0\n",
        }
    return files


def _over_current(number: int, *counts: int) -> Files:
    folder = f"/sys/class/hwmon/hwmon{number}"
    events = {f"{folder}/oc{n}_event_cnt": f"{count}\n" for n, count in enumerate(counts, 1)}
    return {f"{folder}/name": "soctherm_oc\n", f"{folder}/oc1_throt_en": "1\n"} | events


def _clock(folder: str, low: int, now: int, high: int) -> Files:
    return {f"{folder}/{key}_freq": f"{value}\n" for key, value in (("min", low), ("cur", now), ("max", high))}


def _cpu(policy: int, low: int, now: int, high: int) -> Files:
    return {
        f"/sys/devices/system/cpu/cpufreq/policy{policy}/scaling_{key}_freq": f"{value}\n"
        for key, value in (("min", low), ("cur", now), ("max", high))
    }


def _zone(number: int, kind: str, temp: int, *trips: tuple[str, int, str]) -> Files:
    """Trip points: their type, millidegrees, and what hangs on them."""
    folder = f"/sys/class/thermal/thermal_zone{number}"
    files = {f"{folder}/type": kind + "\n", f"{folder}/temp": f"{temp}\n"}
    for n, (trip, millidegrees, device) in enumerate(trips):
        files |= {f"{folder}/trip_point_{n}_type": trip + "\n", f"{folder}/trip_point_{n}_temp": f"{millidegrees}\n"}
        if device:
            files |= {f"{folder}/cdev{n}_trip_point": f"{n}\n", f"{folder}/cdev{n}/type": device + "\n"}
    return files


def _cooling(*devices: tuple[str, int]) -> Files:
    files: Files = {}
    for n, (kind, state) in enumerate(devices):
        folder = f"/sys/class/thermal/cooling_device{n}"
        files |= {f"{folder}/type": kind + "\n", f"{folder}/cur_state": f"{state}\n"}
    return files


def _nvpmodel(active: int, *modes: str) -> Files:
    lines = ["< PARAM TYPE=FILE NAME=CPU_ONLINE >", "CORE_0 /sys/devices/system/cpu/cpu0/online"]
    for number, name in enumerate(modes):
        lines += [f"< POWER_MODEL ID={number} NAME={name} >", "CPU_ONLINE CORE_0 1", "GPU MAX_FREQ -1"]
    conf = "\n".join([*lines, "< PM_CONFIG DEFAULT=0 >", ""])
    return {"/etc/nvpmodel.conf": conf, "/var/lib/nvpmodel/status": f"pmode:{active:04d}\n"}


def _l4t(major: int, revision: str) -> Files:
    line = f"# R{major} (release), REVISION: {revision}, GCID: 1, BOARD: generic, EABI: aarch64, DATE: x\n"
    return {"/etc/nv_tegra_release": line}


def _dpkg(**versions: str) -> Files:
    blocks = ["Package: bash\nStatus: install ok installed\nVersion: 5.1"]
    for name, version in versions.items():
        blocks.append(f"Package: {name.replace('_', '-')}\nStatus: install ok installed\nVersion: {version}")
    blocks.append("Package: nvidia-gone\nStatus: deinstall ok config-files\nVersion: 1")
    return {"/var/lib/dpkg/status": "\n\n".join(blocks) + "\n"}


def xavier_nx(root: Path) -> Path:
    """JetPack 5.1.2."""
    gpu = "/sys/class/devfreq/17000000.gv11b"
    return put(
        root,
        _tree("NVIDIA Jetson Xavier NX Developer Kit", "nvidia,p3449-0000+p3668-0000", "nvidia,tegra194")
        | _l4t(35, "4.1")
        | {"/usr/local/cuda/version.json": '{\n "cuda" : {\n "name" : "CUDA SDK",\n "version" : "11.4.19"\n }\n}'}
        | {"/usr/lib/aarch64-linux-gnu/libnvinfer.so.8": "", "/usr/lib/aarch64-linux-gnu/libnvinfer.so.8.5.2": ""}
        | _nvpmodel(2, "MODE_15W_2CORE", "MODE_15W_4CORE", "MODE_15W_6CORE", "MODE_10W_2CORE")
        | _clock(gpu, 114750000, 204000000, 1109250000)
        | _cpu(0, 1190400, 1190400, 1420800)
        | _ina3221(5, ("VDD_IN", 5000, 552), ("VDD_CPU_GPU_CV", 5000, 130), ("VDD_SOC", 5000, 130))
        | _zone(0, "CPU-therm", 46500, ("critical", 96000, ""), ("passive", 95500, "cpu-balanced"))
        | _zone(1, "GPU-therm", 45500)
        | _cooling(("cpufreq-cpu0", 0), ("pwm-fan", 3)),
    )


def agx_xavier(root: Path) -> Path:
    """JetPack 5.1.1: no rail for the whole, six that do not feed each other."""
    return put(
        root,
        _tree("Jetson-AGX", "nvidia,p2972-0000", "nvidia,tegra194")
        | _l4t(35, "3.1")
        | _ina3221(3, ("GPU", 9000, 100), ("CPU", 9000, 200), ("SOC", 9000, 300))
        | _ina3221(4, ("CV", 9000, 0), ("VDDRQ", 9000, 50), ("SYS5V", 5000, 500)),
    )


def orin_nano(root: Path) -> Path:
    """JetPack 6.2 on the super kit. Its trip point at 70 degrees only warns; clocks fall at 99."""
    gpu = "/sys/class/devfreq/17000000.gpu"
    return put(
        root,
        _tree("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "nvidia,p3768", "nvidia,tegra234")
        | _l4t(36, "4.3")
        | _dpkg(nvidia_jetpack="6.2+b77", nvidia_l4t_core="36.4.3-20250107174145")
        | {"/usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.68"}}'}
        | {"/usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0": "", "/usr/lib/aarch64-linux-gnu/libnvinfer.so.10": ""}
        | _nvpmodel(2, "15W", "25W", "MAXN_SUPER", "7W")
        | _clock(gpu, 306000000, 1020000000, 1020000000)
        | _cpu(0, 729600, 1728000, 1728000)
        | _cpu(4, 729600, 883200, 1728000)
        | _ina3221(1, ("VDD_IN", 5000, 1200), ("VDD_CPU_GPU_CV", 5000, 400), ("VDD_SOC", 5000, 300))
        | _over_current(3, 0, 15, 37)
        | {"/sys/class/hwmon/hwmon2/name": "pwmfan\n", "/sys/class/hwmon/hwmon2/pwm1": "120\n"}
        | {"/sys/class/hwmon/hwmon4/name": "pwm_tach\n", "/sys/class/hwmon/hwmon4/rpm": "2140\n"}
        | _zone(
            0,
            "cpu-thermal",
            52125,
            ("passive", 99000, "cpufreq-cpu0"),
            ("critical", 104500, ""),
            ("passive", 50000, "hot-surface-alert"),
            ("active", 35000, "pwm-fan"),
        )
        | _zone(1, "gpu-thermal", 51500, ("passive", 99000, "devfreq-17000000.gpu"))
        | _zone(2, "cv0-thermal", -256000)
        | _cooling(("pwm-fan", 2), ("cpufreq-cpu0", 0), ("devfreq-17000000.gpu", 0), ("hot-surface-alert", 1)),
    )


def agx_orin(root: Path) -> Path:
    """JetPack 6.0: no rail for the whole, and VIN_SYS_5V0 feeds VDDQ_VDD2_1V8AO. Root reads the EMC clock."""
    emc = "/sys/kernel/debug/bpmp/debug/clk/emc"
    return put(
        root,
        _tree("NVIDIA Jetson AGX Orin Developer Kit", "nvidia,p3737-0000+p3701-0005", "nvidia,tegra234")
        | _l4t(36, "3.0")
        | _nvpmodel(0, "MAXN", "MODE_15W", "MODE_30W", "MODE_50W")
        | {f"{emc}/rate": "3199000000\n", f"{emc}/min_rate": "204000000\n", f"{emc}/max_rate": "3199000000\n"}
        | _ina3221(3, ("VDD_GPU_SOC", 20000, 120), ("VDD_CPU_CV", 20000, 40), ("VIN_SYS_5V0", 5000, 800))
        | _ina3221(4, ("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 60), ("NC", 0, 0)),
    )


def thor(root: Path) -> Path:
    """JetPack 7.1: an INA238 measures the input, in microwatts. The GPU's sensor is silent while it is off."""
    return put(
        root,
        _tree("NVIDIA Jetson AGX Thor Developer Kit", "nvidia,p3971-0080+p3834-0008", "nvidia,tegra264")
        | _l4t(38, "4.0")
        | _nvpmodel(0, "MAXN", "120W")
        | _clock("/sys/class/devfreq/gpu-gpc-0", 315000000, 1575000000, 1575000000)
        | _clock("/sys/class/devfreq/gpu-nvd-0", 315000000, 999000000, 1692000000)
        | _clock("/sys/class/devfreq/bwmgr", 665600000, 4266000000, 4266000000)
        | _ina3221(3, ("VDD_GPU", 19700, 250), ("VDD_CPU_SOC_MSS", 19700, 400), ("VIN_SYS_5V0", 5000, 1350))
        | {"/sys/class/hwmon/hwmon4/name": "ina238\n", "/sys/class/hwmon/hwmon4/in1_label": "VIN\n"}
        | {"/sys/class/hwmon/hwmon4/in1_input": "20000\n", "/sys/class/hwmon/hwmon4/power1_input": "25530000\n"}
        | _over_current(5, 0, 8, 813)
        | _zone(0, "tj-thermal", 64500, ("critical", 114500, ""))
        | _zone(1, "gpu-thermal", 0),
    )


def raspberry_pi(root: Path) -> Path:
    """A Pi 5: under-voltage at some time since its start, nothing now."""
    return put(
        root,
        _tree("Raspberry Pi 5 Model B Rev 1.0", "raspberrypi,5-model-b", "brcm,bcm2712")
        | _cpu(0, 1500000, 2400000, 2400000)
        | _zone(0, "cpu-thermal", 58900, ("critical", 110000, ""))
        | {"/sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled": "10000\n"}
        | {"/sys/class/hwmon/hwmon1/name": "rpi_volt\n", "/sys/class/hwmon/hwmon1/in0_lcrit_alarm": "0\n"}
        | _cooling(("pwm-fan", 1)),
    )


def x86(root: Path) -> Path:
    """A laptop of two cores: its screen is a cooling device, and root reads the energy counters."""
    rapl, core = "/sys/class/powercap/intel-rapl:0", "/sys/devices/system/cpu/cpu"
    return put(
        root,
        {"/sys/devices/virtual/dmi/id/product_name": "ThinkPad\n", "/proc/meminfo": _MEMORY}
        | _cpu(0, 400000, 3600000, 4200000)
        | _cpu(1, 400000, 3400000, 4200000)
        | {f"{core}{n}/thermal_throttle/core_throttle_count": f"{n + 1}\n" for n in range(2)}
        | {f"{core}{n}/thermal_throttle/package_throttle_count": "7\n" for n in range(2)}
        | {f"{rapl}/name": "package-0\n", f"{rapl}/energy_uj": "262143000000\n"}
        | {f"{rapl}/max_energy_range_uj": "262143328850\n"}
        | {f"{rapl}:0/name": "core\n", f"{rapl}:0/energy_uj": "1\n"}
        | _zone(0, "x86_pkg_temp", 61000, ("passive", 100000, ""), ("passive", -274000, ""))
        | _zone(1, "acpitz", 40000)
        | _zone(2, "acpitz", 41000)
        | _cooling(("Processor", 0), ("Processor", 0), ("LCD", 5), ("intel_powerclamp", -1)),
    )


def jetpack_4(root: Path) -> Path:
    """The first Nano, L4T 32.7.1: rails under iio, in milliwatts."""
    folder = "/sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    rails = {"POM_5V_IN": 3100, "POM_5V_GPU": 400, "POM_5V_CPU": 700}
    return put(
        root,
        _tree("NVIDIA Jetson Nano Developer Kit", "nvidia,p3450-0000", "nvidia,tegra210")
        | _l4t(32, "7.1")
        | {"/usr/local/cuda/version.txt": "CUDA Version 10.2.300\n"}
        | {f"{folder}/rail_name_{n}": f"{name}\n" for n, name in enumerate(rails)}
        | {f"{folder}/in_power{n}_input": f"{value}\n" for n, value in enumerate(rails.values())},
    )


ALL: dict[str, Callable[[Path], Path]] = {
    each.__name__: each for each in (xavier_nx, agx_xavier, orin_nano, agx_orin, thor, raspberry_pi, x86, jetpack_4)
}

# Lines that such boards were seen to print.
TEGRASTATS = {
    "xavier_nx": (
        "07-09-2024 13:31:31 RAM 3168/6851MB (lfb 2x4MB) SWAP 161/3426MB (cached 0MB) CPU [23%@1397,17%@1192,off] "
        "EMC_FREQ 2%@204 GR3D_FREQ 0%@[114] VIC_FREQ 115 APE 150 AUX@45C CPU@46.5C thermal@45.6C "
        "VDD_IN 2763mW/2846mW VDD_CPU_GPU_CV 650mW/670mW VDD_SOC 650mW/711mW"
    ),
    "agx_xavier": "EMC_FREQ 0%@1331 GR3D_FREQ 0%@114 VIC_FREQ 115 APE 150 PMIC@50C GPU 467mW/467mW CPU 467mW/467mW "
    "SOC 1245mW/1245mW CV 0mW/0mW VDDRQ 311mW/311mW SYS5V 2768mW/2768mW",
    "orin_nano": (
        "10-08-2026 04:35:02 RAM 6712/7620MB (lfb 12x4MB) SWAP 369/3810MB (cached 8MB) CPU [38%@1497,2%@729] "
        "EMC_FREQ 61%@2133 GR3D_FREQ 99%@[612] NVDEC off APE 200 cpu@57.125C tj@58.312C "
        "VDD_IN 16321mW/11204mW VDD_CPU_GPU_CV 7104mW/4944mW VDD_SOC 3120mW/2900mW"
    ),
    "agx_orin": (
        "04-11-2025 10:36:27 RAM 4321/62801MB (lfb 1759x4MB) SWAP 19/31400MB (cached 0MB) CPU [0%@729,0%@729] "
        "EMC_FREQ 0%@2133 GR3D_FREQ 0%@[0,0] VIC_FREQ 729 APE 174 CV0@-256C CPU@44.562C VDD_GPU_SOC 2340mW/2340mW "
        "VDD_CPU_CV 390mW/390mW VIN_SYS_5V0 4025mW/4025mW NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW"
    ),
    "thor": (
        "07-23-2026 15:29:26 RAM 9101/125811MB (lfb 19x4MB) SWAP 0/2048MB (cached 0MB) CPU [39%@2160,20%@2160] "
        "EMC_FREQ 7%@3200 GR3D_FREQ @[314,314,314] NVENC0_FREQ @1556 PVA0_FREQ off APE 300 tj@35.906C "
        "VDD_GPU -392mW/4925mW/4925mW VDD_CPU_SOC_MSS 8710mW/8710mW/8710mW VIN_SYS_5V0 6767mW/6767mW/6767mW"
    ),
    "jetpack_4": (
        "RAM 1800/7761MB (lfb 2x4MB) CPU [1%@1190,0%@1190] EMC_FREQ 0% GR3D_FREQ 0% APE 150 MTS fg 0% bg 10% "
        "thermal@32.2C VDD_IN 3875/3875 VDD_CPU_GPU_CV 874/874 VDD_SOC 1037/1037"
    ),
}


def is_gone(pid: int) -> bool:
    """Whether a process is no more, or only waits to be collected."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"
