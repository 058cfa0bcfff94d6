"""Latency for the gate: one child process for each measurement, as every measurement of kdedge."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kdedge_device
from kdedge.errors import DeviceError

__all__ = ["measure_alone", "speedup"]


def measure_alone(model: Path, threads: int, arguments: Sequence[str] = ("--effort", "quick")) -> dict[str, Any]:
    """The record of `python -m kdedge_device bench MODEL`. DeviceError with the child's message where it fails."""
    command = [
        sys.executable,
        "-m",
        "kdedge_device",
        "bench",
        str(model),
        "--threads",
        str(threads),
        "--json",
        *arguments,
    ]
    roots = str(Path(kdedge_device.__file__).parent.parent)
    path = os.pathsep.join(part for part in (roots, os.environ.get("PYTHONPATH", "")) if part)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False)
    try:
        document = json.loads(done.stdout)
    except ValueError:
        document = {}
    if done.returncode != 0 or not isinstance(document, dict) or "latency_ms" not in document:
        told = document.get("error") if isinstance(document, dict) else None
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DeviceError(
            f"Measuring {model.name} failed with exit code {done.returncode}: {told or last[0]}. "
            "Its latency was expected. Try: kdedge doctor"
        )
    return document


def speedup(fp32: dict[str, Any], int8: dict[str, Any]) -> float:
    """FP32's median of compute over INT8's."""
    return float(fp32["latency_ms"]["compute"]["p50"] / int8["latency_ms"]["compute"]["p50"])
