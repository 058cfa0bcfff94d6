"""The record: one measurement with its conditions, one JSON document. What was not measured is null, never guessed."""

import datetime
import os
import platform
import re
from typing import Any, Dict, List, Optional

from kdedge_device.board import identify
from kdedge_device.sysfs import read

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


def _cpu() -> Optional[str]:
    for line in (read("/", "/proc/cpuinfo") or "").splitlines():
        if line.lower().startswith(("model name", "hardware")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or None


def machine(gpu: Optional[str] = None, driver: Optional[str] = None) -> Dict[str, Any]:
    """Model (from a board's device tree, or a PC's DMI), CPU, cores, system. GPU and driver are told, not probed."""
    board = identify()
    cpu, cores = _cpu(), cores_available()
    tree = read("/", "/proc/device-tree/model")
    # The hostname stays out: records are committed and sent around, and it says who, not what.
    name = f"{tree or cpu or platform.machine()} {cores} cores"
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-"),
        "model": board.model,
        "cpu": cpu,
        "architecture": platform.machine(),
        "gpu": gpu,
        "cores": cores,
        "jetpack": board.jetpack,
        "l4t": board.l4t,
        "driver": driver,
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
    throttled: Optional[bool] = None,
    stability: Optional[Dict[str, Any]] = None,
    energy: Optional[Dict[str, Any]] = None,
    gpu: Optional[str] = None,
    driver: Optional[str] = None,
) -> Dict[str, Any]:
    """The document of the contract.

    `artifact`: file, sha256, bytes, precision, runtime, version. `conditions`: what is known of threads, batch, effort,
    load_average and, from `watch.Watch.conditions`, of the board; the rest is filled with null. `accuracy`: value,
    images and the split's hash. `stability`: of `Watch.verdict`, stable and why. `energy`: of `Watch.energy`.
    """
    energy = energy or {}
    return {
        "schema": SCHEMA,
        "machine": machine(gpu, driver),
        "conditions": {**_unknown(), **conditions},
        "artifact": artifact,
        "latency_ms": {part: latency_ms.get(part) for part in ("compute", "with_copies", "end_to_end")},
        "repeats": repeats,
        "throughput_ips": throughput_ips,
        "energy_mj_per_inference": energy.get("energy_mj_per_inference"),
        "energy_source": energy.get("energy_source"),
        "flags": {"throttled": throttled, "unstable": unstable},
        "stability": None if stability is None else {"stable": stability["stable"], "why": stability["why"]},
        "accuracy": accuracy,
        "started_at": started_at,
    }


def _unknown() -> Dict[str, Any]:
    moments = {"before": None, "after": None}
    return {
        "power_mode": None,
        "clocks_mhz": None,
        "temperature_c": dict(moments),
        "throttle": dict(moments),
        "fan": None,
        "memory_mib": None,
        "uptime_s": None,
        "board": None,
        "threads": None,
        "batch": None,
        "cuda_graph": None,
        "load_average": None,
        "effort": None,
    }
