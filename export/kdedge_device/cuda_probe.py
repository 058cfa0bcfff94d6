"""Is there a GPU that can be used? Asked in a process of its own, before TensorRT is imported.

TensorRT 11 ends the process with a segmentation fault where there is no driver, and a broken driver may do so itself.
Another process turns that into a sentence. Python 3.8, standard library.
"""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Dict, Tuple

from kdedge_device.children import child
from kdedge_device.cuda import Cuda
from kdedge_device.cuda_driver import LIBRARY, CudaFailure, Driver, Gpu

__all__ = ["Probe", "probe"]


@dataclass(frozen=True)
class Probe:
    """`gpus` in CUDA's order; `reason` says why the first cannot be used, and is empty where it can."""

    gpus: Tuple[Gpu, ...]
    reason: str

    @property
    def usable(self) -> bool:
        return not self.reason


def probe(library: str = LIBRARY, timeout_seconds: float = 60.0) -> Probe:
    """Never raises: whatever is wrong with the driver is the answer's `reason`."""
    command = child("cuda_probe", library)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return Probe((), f"The CUDA driver did not answer in {timeout_seconds:g} seconds. Restart the machine.")
    except OSError as error:
        return Probe((), f"No process could be started to look for a GPU ({error}).")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return Probe((), f"The CUDA driver crashed ({name}) while it was started. Reinstall the NVIDIA driver.")
    try:
        document = json.loads(done.stdout.decode("utf-8"))
        return Probe(tuple(Gpu(**each) for each in document["gpus"]), str(document["reason"]))
    except (ValueError, KeyError, TypeError):
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        return Probe((), "Looking for a GPU failed: {}.".format(last[0] if last else f"exit code {done.returncode}"))


def _look(library: str) -> Dict[str, Any]:
    """All GPUs, and a context made on the first: a GPU that is full or reserved is seen, but not usable."""
    gpus = []
    try:
        driver = Driver(library)
        gpus = [driver.gpu(index)._asdict() for index in range(driver.count())]
        if not gpus:
            return {"gpus": [], "reason": "The CUDA driver finds no GPU. CUDA_VISIBLE_DEVICES may hide it."}
        with Cuda(0, library):
            return {"gpus": gpus, "reason": ""}
    except CudaFailure as error:
        return {"gpus": gpus, "reason": str(error)}


if __name__ == "__main__":
    print(json.dumps(_look(sys.argv[1])))
