"""Which packages can this Python import, and which version of each? Asked in a process of its own for every one.

Importing is the only proof: a package may be installed for another processor, and then end the process with an illegal
instruction. Python 3.8, standard library.
"""

import os
import signal
import subprocess
from typing import Any, Dict, NamedTuple, Optional

from kdedge_device.children import python

__all__ = ["PACKAGES", "Found", "look_for"]

PACKAGES = {"numpy": "numpy", "pillow": "PIL", "onnxruntime": "onnxruntime", "tensorrt": "tensorrt"}
_ANSWER = "kdedge version: "
_ASK = "import importlib; print({!r} + str(importlib.import_module({!r}).__version__), flush=True)"


class Found(NamedTuple):
    """`version` is None where the package cannot be used, and `reason` then says why in half a sentence."""

    version: Optional[str]
    reason: str


def look_for(packages: Dict[str, str] = PACKAGES, timeout_seconds: float = 120.0) -> Dict[str, Found]:
    """Of each name the package's state; `packages` gives the module to import for it. Never raises."""
    children = {name: _start(module) for name, module in packages.items()}  # all at once: an import takes a second
    return {name: _answer(child, timeout_seconds) for name, child in children.items()}


def _start(module: str) -> Any:
    try:
        return subprocess.Popen(
            python(_ASK.format(_ANSWER, module)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(os.environ, PYTHONWARNINGS="ignore"),
        )
    except OSError as error:
        return error


def _answer(child: Any, timeout_seconds: float) -> Found:
    if isinstance(child, OSError):
        return Found(None, f"no process could be started to look for it ({child})")
    try:
        out, errors = child.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return Found(None, f"importing it did not end in {timeout_seconds:g} seconds")
    for line in out.decode("utf-8", "replace").splitlines():
        if line.startswith(_ANSWER):  # what was printed counts: some runtimes crash when the process ends
            return Found(line[len(_ANSWER) :], "")
    if child.returncode < 0:
        return Found(None, f"importing it crashed ({signal.Signals(-child.returncode).name})")
    last = errors.decode("utf-8", "replace").strip().splitlines()[-1:]
    if last and last[0].startswith("ModuleNotFoundError: No module named"):
        return Found(None, "it is not installed")
    return Found(None, "it cannot be imported ({})".format(last[0] if last else f"exit code {child.returncode}"))
