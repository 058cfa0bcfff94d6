"""`kdedge doctor`: what works on this machine, and the exact reason for what does not."""

import importlib
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from kdedge.cli_common import Reply, command_output

__all__ = ["doctor"]

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `detail` is the version, or the reason in the words of whoever refused."""

    name: str
    works: bool
    needed: bool
    detail: str
    used_for: str


@click.command()
@command_output
def doctor() -> Reply:
    """What works on this machine, and why the rest does not.

    Exits with 1 where kdedge itself cannot run.
    """
    findings = [
        _look("python", _python, True, "everything"),
        _look("torch", _torch, True, "training"),
        _look("torchvision", _package("torchvision"), True, "networks and their weights"),
        _look("onnxruntime", _onnxruntime, True, "running and measuring ONNX files"),
        _look("cuda", _cuda, False, "training on a GPU"),
        _look("tensorrt", _tensorrt, False, "engines on this machine"),
        _look("pycuda", _package("pycuda"), False, "nothing of ours: engines run through the driver"),
        _look("timm", _package("timm"), False, "starting weights by timm name"),
        _look("chromium", _chromium, False, "the browser tests of the report"),
        _look("data folder", _data_folder, False, "named data sets (digits needs none)"),
        _look("disk", _disk, False, "runs in the current folder"),
    ]
    broken = [finding.name for finding in findings if finding.needed and not finding.works]
    words = {True: "works", False: "does not"}
    lines = [
        f"{f.name:<12} {words[f.works]:<9} {f.detail}" + ("" if f.works else f" (for {f.used_for})") for f in findings
    ]
    end = f"kdedge cannot run here: {', '.join(broken)}." if broken else "kdedge can train, export and measure here."
    return Reply([asdict(f) for f in findings], "\n".join([*lines, "", end]), exit_code=int(bool(broken)))


def _look(name: str, probe: Callable[[], str], needed: bool, used_for: str) -> Finding:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Finding(name, True, needed, probe(), used_for)
    except Exception as error:  # a broken package may raise anything on import, and that is what we came to hear
        reason = str(error).strip().splitlines() or [""]
        shown = reason[0] if isinstance(error, _No) else f"{type(error).__name__}: {reason[0]}"
        return Finding(name, False, needed, shown, used_for)


class _No(Exception):
    """A probe's own reason."""


def _python() -> str:
    return f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores, {sys.executable}"


def _package(name: str) -> Callable[[], str]:
    def probe() -> str:
        try:
            return str(importlib.import_module(name).__version__)
        except ModuleNotFoundError as error:
            if error.name == name:
                raise _No(f"not installed; pip install {name}") from None
            raise

    return probe


def _torch() -> str:
    import torch

    total = float(torch.ones(3).sum())  # a wheel for another processor imports and then fails here
    if total != 3.0:
        raise _No(f"1 + 1 + 1 is {total}")
    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _onnxruntime() -> str:
    import onnxruntime

    return f"{onnxruntime.__version__}, {', '.join(onnxruntime.get_available_providers())}"


def _cuda() -> str:
    import torch

    if torch.version.cuda is None:
        raise _No(f"torch {torch.__version__} is built without CUDA")
    torch.zeros(1, device="cuda")  # raises with the driver's own reason
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _tensorrt() -> str:
    """The GPU is probed in a process of its own first: without a driver TensorRT 11 takes the process with it."""
    from kdedge_device.failures import Failure
    from kdedge_device.trt import load_tensorrt

    try:
        here = load_tensorrt()
    except Failure as error:
        raise _No(str(error)) from None
    return f"{here.version}, {here.gpu.name} (compute capability {here.gpu.capability}, CUDA {here.gpu.cuda})"


def _chromium() -> str:
    for name in _BROWSERS:
        if found := shutil.which(name):
            return found
    raise _No(f"none of {', '.join(_BROWSERS)} is on PATH")


def _data_folder() -> str:
    folder = Path(os.environ.get("KDEDGE_DATA") or "~/.cache/kdedge/data").expanduser()
    if not folder.is_dir():
        raise _No(f"{folder} does not exist yet; it is made by the first download, KDEDGE_DATA moves it")
    return str(folder)


def _disk() -> str:
    free_gib = shutil.disk_usage(".").free / 2**30
    if not os.access(".", os.W_OK):
        raise _No(f"the current folder {Path.cwd()} is read-only; give --out")
    if free_gib < 1:
        raise _No(f"{free_gib:.2f} GiB free")
    return f"{free_gib:.0f} GiB free"
