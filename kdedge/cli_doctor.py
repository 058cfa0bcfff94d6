"""`kdedge doctor`: what works on this machine, and the exact reason for what does not."""

import importlib
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
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
        _look("onnx", _package("onnx"), True, "writing ONNX files"),
        _look("onnxruntime", _onnxruntime, True, "running and measuring ONNX files"),
        _look("int8 products", _int8, False, "INT8 that is faster and exact on this processor"),
        _look("board", _board, False, "running bundles here"),
        _look("cuda", _cuda, False, "training on a GPU"),
        _look("tensorrt", _tensorrt, False, "engines on this machine"),
        _look(
            "pycuda", _package("pycuda"), False, "kdedge bench --cuda pycuda; engines run through the driver without it"
        ),
        _look("openvino", _package("openvino"), False, "a second opinion on the file for TensorRT"),
        _look("ssh", _ssh, False, "measuring on a board"),
        _look("timm", _package("timm"), False, "starting weights by timm name"),
        _look("chromium", _chromium, False, "the browser tests of the report"),
        _look("data folder", _data_folder, False, "named data sets (digits needs none)"),
        _look("disk", _disk, False, "runs in the current folder"),
    ]
    commands = [_command(text, needs, findings) for text, needs in _COMMANDS]
    broken = [finding.name for finding in findings if finding.needed and not finding.works]
    end = f"kdedge cannot run here: {', '.join(broken)}." if broken else "kdedge can train, export and measure here."
    lines = [*map(_line, findings), "", *map(_line, commands), "", end]
    return Reply([asdict(f) for f in (*findings, *commands)], "\n".join(lines), exit_code=int(bool(broken)))


# What a command needs beyond itself, by the names of the findings.
_COMMANDS = (
    ("kdedge train-recipe", ("torch", "torchvision", "disk")),
    ("kdedge train-recipe --device cuda", ("torch", "torchvision", "cuda", "disk")),
    ("kdedge export --int8", ("torch", "onnx", "onnxruntime", "disk")),
    ("kdedge export --tensorrt", ("torch", "onnx", "onnxruntime", "tensorrt", "disk")),
    ("kdedge bench", ("onnxruntime", "disk")),
    ("kdedge bench --on ssh://...", ("ssh", "disk")),
    ("kdedge report", ("disk",)),
)


def _command(text: str, needs: tuple[str, ...], findings: Sequence[Finding]) -> Finding:
    lacking = [f.name for f in findings if f.name in needs and not f.works]
    return Finding(text, not lacking, False, f"for want of {', '.join(lacking)}" if lacking else "", "")


def _line(finding: Finding) -> str:
    width = 34 if finding.name.startswith("kdedge ") else 14
    line = f"{finding.name:<{width}} {'works' if finding.works else 'does not':<9} {finding.detail}".rstrip()
    return line if finding.works or not finding.used_for else f"{line} (for {finding.used_for})"


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


def _int8() -> str:
    """Without such instructions 8-bit products of U8 and S8 are added in 16 bits on x86, where they can overflow."""
    from kdedge_device.sysfs import read

    text = read("/", "/proc/cpuinfo") or ""
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)).split())
    found = [name for name in ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm") if name in flags]
    if found:
        return ", ".join(found)
    if platform.machine() in ("x86_64", "AMD64") and flags:
        raise _No("this processor has no VNNI: INT8 gains little, and run.pyz check says whether it is exact")
    raise _No("not told by this system, or not there: kdedge bench says what INT8 is worth")


def _board() -> str:
    from kdedge_device.board import identify, refuse_unsupported
    from kdedge_device.failures import Failure
    from kdedge_device.state import power_mode

    board = identify()
    try:
        refuse_unsupported(board)
    except Failure as error:
        raise _No(str(error)) from None
    mode = power_mode()
    said = [board.model or board.architecture, f"JetPack {board.jetpack}" if board.jetpack else None]
    said.append(f"power mode {mode['name'] or mode['id']}" if mode else None)
    return ", ".join(part for part in said if part)


def _ssh() -> str:
    found = shutil.which("ssh")
    if found is None:
        raise _No("no ssh on PATH; install OpenSSH's client (on Debian: apt install openssh-client)")
    return found


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
