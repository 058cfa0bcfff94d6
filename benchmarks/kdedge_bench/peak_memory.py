"""The most memory that a process has held: this one, or one of its own for each measurement."""

import contextlib
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdedge.errors import RunError
from kdedge.runs import read_json

__all__ = ["measured_apart", "peak_mib"]


def measured_apart(module: str, images: int, flags: Sequence[str], folder: Path) -> dict[str, Any]:
    """What `python -m module` measures at `images` images, in a process of its own whose scratch is `folder`."""
    out = folder / f"{images}.json"
    command = [sys.executable, "-m", module, "--images", str(images), *flags, "--out", str(out), "--one"]
    done = subprocess.run([*command, "--scratch", str(folder)], check=False)
    if done.returncode:
        raise RunError(f"Measuring {images} images ended with exit code {done.returncode}; its output says why.")
    found: dict[str, Any] = read_json(out)
    return found


def peak_mib(*, reset: bool = False) -> float:
    """The largest resident set of this process so far, files it mapped included; with `reset` it starts from now."""
    if reset:
        with contextlib.suppress(OSError):  # proc(5): VmHWM is set to what it is now; elsewhere it stays the peak
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10
