"""The record: one measurement with its conditions, one JSON document. What was not measured is null, never guessed."""

import datetime
import os
import platform
import re
from typing import Any, Dict, List, Optional

__all__ = ["SCHEMA", "cores_available", "load_average", "machine", "now", "record"]

SCHEMA = 1


def cores_available() -> int:
    """Cores this process may use: a container or taskset often allows fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> Optional[List[float]]:
    """Of 1, 5 and 15 minutes."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _read(path: str) -> Optional[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip("\0\n ") or None
    except OSError:
        return None


def _cpu() -> Optional[str]:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.lower().startswith(("model name", "hardware")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or None


def machine() -> Dict[str, Any]:
    """Model (from a board's device tree, or a PC's DMI), CPU, cores, system. GPU and driver are not probed."""
    board = _read("/proc/device-tree/model")
    cpu, cores = _cpu(), cores_available()
    # The hostname stays out: records are committed and sent around, and it says who, not what.
    name = f"{board or cpu or platform.machine()} {cores} cores"
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-"),
        "model": board or _read("/sys/devices/virtual/dmi/id/product_name"),
        "cpu": cpu,
        "architecture": platform.machine(),
        "gpu": None,
        "cores": cores,
        "jetpack": _read("/etc/nv_tegra_release"),
        "driver": None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def record(
    artifact: Dict[str, Any],
    latency_ms: Dict[str, Optional[Dict[str, Any]]],
    conditions: Dict[str, Any],
    started_at: str,
    unstable: bool,
    repeats: int = 1,
    throughput_ips: Optional[float] = None,
    accuracy: Optional[Dict[str, Any]] = None,
) -> Dict[str, Any]:
    """The document of the contract.

    `artifact`: file, sha256, bytes, precision, runtime, version. `conditions`: what is known of threads, batch, effort,
    load_average; the rest is filled with null. `accuracy`: value, images and the split's hash.
    """
    unknown: Dict[str, Any] = {
        "power_mode": None,
        "clocks_mhz": None,
        "temperature_c": {"before": None, "after": None},
        "threads": None,
        "batch": None,
        "cuda_graph": None,
        "load_average": None,
        "effort": None,
    }
    unknown.update(conditions)
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "conditions": unknown,
        "artifact": artifact,
        "latency_ms": {part: latency_ms.get(part) for part in ("compute", "with_copies", "end_to_end")},
        "repeats": repeats,
        "throughput_ips": throughput_ips,
        "energy_mj_per_inference": None,
        "energy_source": None,
        "flags": {"throttled": None, "unstable": unstable},
        "accuracy": accuracy,
        "started_at": started_at,
    }
