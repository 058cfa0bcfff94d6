"""What `kdedge doctor` looks at: each probe tells what it found, or raises with the reason and what to do about it.

They run in a process of their own: a wheel for another processor, or a broken driver, ends Python where it is imported.
"""

import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

__all__ = ["OTHERS", "PROBES", "Probe", "tell"]

OTHERS = {
    "click": "click", "jinja2": "jinja2", "matplotlib": "matplotlib", "numpy": "numpy", "onnxscript": "onnxscript",
    "PIL": "pillow", "pydantic": "pydantic", "rich": "rich", "ruamel": "ruamel.yaml", "safetensors": "safetensors",
    "sklearn": "scikit-learn", "scipy": "scipy",
}  # fmt: skip
"""What kdedge needs beside the packages that have a line of their own: module -> package."""

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_LEAST_GIB = 1.0


class Probe(NamedTuple):
    """`look` answers with a version or the like. Without what is `needed` kdedge cannot run."""

    name: str
    look: Callable[[], str]
    needed: bool
    used_for: str


class _No(Exception):
    """A probe's own reason."""


def tell(first: int) -> None:
    """Look through PROBES from number `first` on: [works, detail] as JSON, a line each, on standard output.

    What libraries print goes to standard error.
    """
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for probe in PROBES[first:]:
            print(json.dumps(_answer(probe)), file=out, flush=True)


def _answer(probe: Probe) -> tuple[bool, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return True, probe.look()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a broken package may raise anything on import, SystemExit too: we came to hear it
        reason = next(iter(str(error).strip().splitlines()), "")
        return False, reason if isinstance(error, _No) else f"{type(error).__name__}: {reason}"


def _python() -> str:
    told = f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores, {sys.executable}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise _No(f"{told}; install 3.11, 3.12 or 3.13")
    return told


def _package(name: str, install: str = "", module: str = "") -> Callable[[], str]:
    """`module` is what has to be importable, where that is not the package itself."""

    def look() -> str:
        try:
            package = importlib.import_module(name)
            importlib.import_module(module or name)
        except ModuleNotFoundError as error:
            if error.name == name:
                raise _No(f"not installed; pip install {install or name}") from None
            raise
        return str(getattr(package, "__version__", None) or metadata.version(name))

    return look


def _others() -> str:
    lacking = [package for module, package in OTHERS.items() if importlib.util.find_spec(module) is None]
    if lacking:
        raise _No(f"{', '.join(lacking)}: not installed; pip install {' '.join(lacking)}")
    return ", ".join(OTHERS.values())


def _torch() -> str:
    version = _package("torch")()
    import torch

    total = float(torch.ones(3).sum())  # a wheel for another processor imports and then fails here
    if total != 3.0:
        raise _No(f"1 + 1 + 1 is {total}; install torch anew")
    return f"{version}, {torch.get_num_threads()} threads"


def _onnxruntime() -> str:
    version = _package("onnxruntime")()
    import onnxruntime

    return f"{version}, {', '.join(onnxruntime.get_available_providers())}"


def _cuda() -> str:
    import torch

    if torch.version.cuda is None:
        raise _No(f"torch {torch.__version__} is built without CUDA; with an NVIDIA GPU, install PyTorch's CUDA build")
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
        raise _No(
            "this processor has no VNNI: INT8 gains little, and kdedge export ships FP32 where it gains nothing; "
            "run.pyz check says whether it is exact"
        )
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
    jetpack = "no JetPack" if board.jetpack is None else f"JetPack {board.jetpack}"
    power = "no power modes" if mode is None else f"power mode {mode['name'] or mode['id']}"
    return f"{board.model or board.architecture}, {jetpack}, {power}"


def _ssh() -> str:
    found = shutil.which("ssh")
    if found is None:
        raise _No("no ssh on PATH; install OpenSSH's client (on Debian: apt install openssh-client)")
    return found


def _chromium() -> str:
    for name in _BROWSERS:
        if found := shutil.which(name):
            return found
    raise _No(f"none of {', '.join(_BROWSERS)} is on PATH; on Debian: apt install chromium")


def _data_folder() -> str:
    folder = Path(os.environ.get("KDEDGE_DATA") or "~/.cache/kdedge/data").expanduser()
    if not folder.is_dir():
        raise _No(f"{folder} does not exist yet; it is made by the first download, KDEDGE_DATA moves it")
    return str(folder)


def _disk() -> str:
    free_gib = shutil.disk_usage(".").free / 2**30
    if not os.access(".", os.W_OK):
        raise _No(f"the current folder {Path.cwd()} is read-only; go to another, or give --out")
    if free_gib < _LEAST_GIB:
        raise _No(f"{free_gib:.2f} GiB free; make room, or give --out on another disk")
    return f"{free_gib:.0f} GiB free"


PROBES = (
    Probe("python", _python, True, "everything"),
    Probe("packages", _others, True, "everything"),
    Probe("torch", _torch, True, "training"),
    Probe("torchvision", _package("torchvision"), True, "networks and their weights"),
    Probe("onnx", _package("onnx"), True, "writing ONNX files"),
    Probe("onnxruntime", _onnxruntime, True, "running and measuring ONNX files"),
    Probe("int8 products", _int8, False, "INT8 that is faster and exact on this processor"),
    Probe("board", _board, False, "running bundles here"),
    Probe("cuda", _cuda, False, "training on a GPU"),
    Probe("tensorrt", _tensorrt, False, "engines on this machine"),
    Probe("pycuda", _package("pycuda", "'kdedge[pycuda]'", "pycuda.driver"), False, "run.pyz bench --cuda pycuda"),
    Probe("openvino", _package("openvino"), False, "suites with OpenVINO, and a second opinion on TensorRT's file"),
    Probe("ssh", _ssh, False, "measuring on a board"),
    Probe("timm", _package("timm", "'kdedge[timm]'"), False, "networks and starting weights by timm's names"),
    Probe("chromium", _chromium, False, "the browser tests of the report"),
    Probe("data folder", _data_folder, False, "named data sets, but for digits"),
    Probe("disk", _disk, False, "runs in the current folder"),
)  # fmt: skip
