"""`kdedge export --tensorrt`: the engines of a bundle, built on this machine's GPU by the bundle's own program.

The build runs in a process of its own: torch and TensorRT bring their own CUDA libraries, and a crash of TensorRT must
not take the export with it. What is built here fits this machine; a board builds its own with `run.pyz build`.
"""

import importlib.util
import json
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdedge.errors import BundleError, DeviceError, ExportError, KdedgeError, MissingPackage
from kdedge_device.children import child
from kdedge_device.trt import INSTALL

__all__ = ["build_here", "engine_logits", "require_tensorrt"]

# The device's failure classes that are not about the machine.
_ERRORS: dict[str, type[KdedgeError]] = {"Failure": ExportError, "CorruptFailure": BundleError}


def build_here(
    bundle: Path,
    precisions: Sequence[str] = ("int8", "fp16"),
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, dict[str, Any]]:
    """An engine for each of `precisions` ("int8", "fp16", "fp32") in the finished `bundle`, or kept from before.

    {precision: {engine, reused, why, artifact, side}}; `side` is the engine's side file: GPU, versions, hashes, and
    the report with its layers by type. Raises MissingPackage without TensorRT, DeviceError without a GPU or where
    TensorRT fails, BundleError for an altered bundle, ExportError where a file to build from is missing.
    """
    require_tensorrt()
    found = {}
    for precision in precisions:
        say(f"Building a TensorRT engine, {precision.upper()}")
        found[precision] = _build(bundle, precision)
    return found


def require_tensorrt() -> None:
    """MissingPackage where there is none; a process that is started for the build would say the same, later."""
    if importlib.util.find_spec("tensorrt") is None:
        raise MissingPackage("tensorrt", "building an engine (--tensorrt)", INSTALL)


def engine_logits(bundle: Path, precision: str, images: Path) -> npt.NDArray[np.float32]:
    """Logits [N, K] of the engine that was built in `bundle`, for uint8 [N, H, W, C] in the .npy file `images`.

    Raises what `build_here` raises. A file of the logits is left beside `images`.
    """
    logits = images.with_name(f"{images.stem}-{precision}.npy")
    command = child("engine_logits", str(bundle), precision, str(images), str(logits))
    _run(command, f"ran the {precision.upper()} engine of {bundle}")
    return np.asarray(np.load(logits), np.float32)


def _build(bundle: Path, precision: str) -> dict[str, Any]:
    command = child("__main__", "build", str(bundle), "--artifact", precision, "--json")
    return _run(command, f"built an engine from {bundle}")


def _run(command: Sequence[str], doing: str) -> dict[str, Any]:
    """The document that `command` prints; what it tells instead is raised."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise DeviceError(
            f"TensorRT ended with {name} while it {doing}. "
            "Update the NVIDIA driver and TensorRT, or build on the device with: python run.pyz build"
        )
    try:
        document: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DeviceError(f"The process that {doing} failed: {last}") from None
    if "error" in document:
        raise _ERRORS.get(document["class"], DeviceError)(document["error"])
    return document
