"""TensorRT's Python module, loaded late and only where it can work: versions 8.5 to 11, by names.

One code path serves them all, because tensors are addressed by name since 8.5. What a version lacks is asked with
`hasattr`, never by comparing version numbers. Enum integers moved between versions, so flags are made from names.
"""

import importlib
import importlib.util
import os
import sys
from typing import Any, List, NamedTuple

from kdedge_device.cuda_driver import LIBRARY, Gpu
from kdedge_device.cuda_probe import probe
from kdedge_device.failures import RuntimeFailure, VersionFailure

__all__ = ["INSTALL", "Here", "Log", "flag_bits", "load_tensorrt", "new_log"]

INSTALL = "pip install 'kdedge[tensorrt]'"
_OLDEST = "8.5"


class Here(NamedTuple):
    """What engines are built with and run on: the module, its version, GPU 0, and the driver's library."""

    trt: Any
    version: str
    gpu: Gpu
    library: str = LIBRARY

    @property
    def weakly_typed(self) -> bool:
        """Before 11 the builder chooses precisions by flags; from 11 on the types in the graph are the precisions."""
        return hasattr(self.trt.BuilderFlag, "INT8")


def load_tensorrt(library: str = LIBRARY) -> Here:
    """Checks that the package is there, then the GPU, then imports. RuntimeFailure, or VersionFailure before 8.5."""
    if "tensorrt" not in sys.modules and importlib.util.find_spec("tensorrt") is None:
        raise RuntimeFailure(f"TensorRT is not installed for {sys.executable}. {_how_to_install()}")
    found = probe(library)
    if not found.usable:
        raise RuntimeFailure(f"TensorRT needs a GPU. {found.reason}")
    try:
        trt = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise RuntimeFailure(f"TensorRT is installed, but cannot be loaded ({error}). {_how_to_install()}") from None
    version = str(trt.__version__)
    if not hasattr(trt.ICudaEngine, "num_io_tensors"):
        raise VersionFailure(
            f"TensorRT is {version}; {_OLDEST} or newer is needed. On a Jetson that is JetPack 5 or newer."
        )
    return Here(trt, version, found.gpus[0], library)


def _how_to_install() -> str:
    if os.path.exists("/etc/nv_tegra_release"):
        return (
            "On a Jetson it comes with JetPack: sudo apt install nvidia-jetpack, then use the system's python3, "
            "or a virtual environment made with --system-site-packages."
        )
    # A board has run.pyz alone, and often an older Python than kdedge wants.
    return "Install it with: {}".format(INSTALL if importlib.util.find_spec("kdedge") else "pip install tensorrt")


def flag_bits(enum: Any, *names: str) -> int:
    """The bits of those members of a flag enum that this version has."""
    bits = 0
    for name in names:
        if hasattr(enum, name):
            bits |= 1 << int(getattr(enum, name))
    return bits


class Log:
    """What TensorRT said, oldest first. It explains itself only through its logger: calls answer None or False."""

    def __init__(self) -> None:
        self.errors: List[str] = []
        self.warnings: List[str] = []
        self.logger: Any = None


def new_log(trt: Any) -> Log:
    """A Log whose `logger` is to be given to TensorRT; it has to outlive whatever it was given to."""
    log = Log()

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base is known only at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants its own __init__ called by name

        def log(self, severity: Any, text: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                log.errors.append(str(text))
            elif severity.name == "WARNING":
                log.warnings.append(str(text))

    log.logger = Logger()
    return log
