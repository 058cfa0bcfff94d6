"""CUDA through NVIDIA's cuda-python (the package cuda-bindings), with its driver API. Python 3.9, numpy not needed.

Every call answers a tuple whose first value is the error. Handles are classes that turn into whole numbers, and whole
numbers are taken in their place.
"""

import ctypes
import importlib
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Callable, List, Optional, Tuple, Type

from kdedge_device.cuda_driver import (
    BLOCKING_SYNC,
    MAPPED,
    NON_BLOCKING,
    CudaFailure,
    Gpu,
    driver_version,
    free_all,
    refused,
    too_many,
    version_words,
)

__all__ = ["CudaPython"]

_MODULES = ("cuda.bindings.driver", "cuda.cuda")  # since 12.6, and up to 12.x


def _driver_module() -> Any:
    for name in _MODULES:
        with suppress(ImportError):
            return importlib.import_module(name)
    raise CudaFailure(
        "cuda-python is not installed; --cuda cuda-python needs it. Install it with: pip install cuda-python, "
        "or leave --cuda out: ctypes needs no package."
    )


class CudaPython:
    """As `cuda.Cuda`, by another way."""

    how = "cuda-python"

    def __init__(self, device: int = 0) -> None:
        self._index = device
        self._module: Any = None
        self._open = False
        self._device: Any = None
        self._frees: List[Callable[[], Any]] = []

    def __enter__(self) -> "CudaPython":
        self._module = _driver_module()
        self._call("cuInit", 0)
        count = int(self._call("cuDeviceGetCount"))
        if self._index >= count:
            raise too_many(self._index, count)
        self._device = self._call("cuDeviceGet", self._index)
        before = int(self._call("cuCtxGetCurrent"))
        context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._frees = [partial(self._call, "cuDevicePrimaryCtxRelease", self._device)]
        try:
            self._call("cuCtxSetCurrent", context)
        except CudaFailure as error:
            free_all(self._frees, error)
            raise
        self._frees.append(partial(self._call, "cuCtxSetCurrent", before))
        self._open = True
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._open = False
        free_all(self._frees, error)

    def _call(self, name: str, *arguments: Any) -> Any:
        """What the call answers beside its error: nothing, one value, or a tuple."""
        try:
            error, *values = getattr(self._module, name)(*arguments)
            code, text = int(error), str(error.name)
        except (RuntimeError, ValueError) as failure:  # no driver or an old one; an error number it does not know
            raise CudaFailure(f"cuda-python cannot do {name}: {failure}.") from None
        if code:
            raise refused(name, text, code)
        return values[0] if len(values) == 1 else tuple(values)

    @property
    def _driver(self) -> Any:
        if not self._open:
            raise CudaFailure("The CUDA context is not open; use it in a with statement.")
        return self._module

    def _do(self, name: str, *arguments: Any) -> Any:
        self._driver  # noqa: B018  # raises where it is not open
        return self._call(name, *arguments)

    def _keep(self, handle: Any, free: str) -> int:
        self._frees.append(partial(self._call, free, handle))
        return int(handle)

    @property
    def gpu(self) -> Gpu:
        names = self._driver.CUdevice_attribute
        major, minor, integrated = (
            int(self._do("cuDeviceGetAttribute", each, self._device))
            for each in (
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                names.CU_DEVICE_ATTRIBUTE_INTEGRATED,
            )
        )
        return Gpu(
            self._do("cuDeviceGetName", 256, self._device).split(b"\0")[0].decode("utf-8", "replace"),
            f"{major}.{minor}",
            int(self._do("cuDeviceTotalMem", self._device)),
            version_words(int(self._do("cuDriverGetVersion"))),
            driver_version(),
            bool(integrated),
        )

    def memory(self) -> Tuple[int, int]:
        free, total = self._do("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        return self._keep(self._do("cuMemAlloc", size), "cuMemFree")

    def allocate_host(self, size: int) -> "ctypes.Array[ctypes.c_ubyte]":
        address = self._keep(self._do("cuMemHostAlloc", size, MAPPED), "cuMemFreeHost")
        return (ctypes.c_ubyte * size).from_address(address)

    def device_address(self, host: "ctypes.Array[ctypes.c_ubyte]") -> int:
        return int(self._do("cuMemHostGetDevicePointer", ctypes.addressof(host), 0))

    def copy_in(self, device: int, host: "ctypes.Array[ctypes.c_ubyte]", size: int, stream: int) -> None:
        self._do("cuMemcpyHtoDAsync", device, ctypes.addressof(host), size, stream)

    def copy_out(self, host: "ctypes.Array[ctypes.c_ubyte]", device: int, size: int, stream: int) -> None:
        self._do("cuMemcpyDtoHAsync", ctypes.addressof(host), device, size, stream)

    def stream(self) -> int:
        return self._keep(self._do("cuStreamCreate", NON_BLOCKING), "cuStreamDestroy")

    def synchronize(self, stream: int) -> None:
        self._do("cuStreamSynchronize", stream)

    def event(self) -> int:
        return self._keep(self._do("cuEventCreate", BLOCKING_SYNC), "cuEventDestroy")

    def record(self, event: int, stream: int) -> None:
        self._do("cuEventRecord", event, stream)

    def wait(self, event: int) -> None:
        self._do("cuEventSynchronize", event)

    def elapsed_ms(self, start: int, end: int) -> float:
        return float(self._do("cuEventElapsedTime", start, end))

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        modes = self._driver.CUstreamCaptureMode
        self._do("cuStreamBeginCapture", stream, modes.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            work()
        except BaseException:
            with suppress(CudaFailure):  # a stream left capturing refuses everything else
                self._keep(self._do("cuStreamEndCapture", stream), "cuGraphDestroy")
            raise
        graph = self._do("cuStreamEndCapture", stream)
        self._keep(graph, "cuGraphDestroy")
        # From 12 on the short name takes flags; before, it is another call.
        short = "cuGraphInstantiate"
        name = short + "WithFlags" if hasattr(self._module, short + "WithFlags") else short
        return self._keep(self._do(name, graph, 0), "cuGraphExecDestroy")

    def launch(self, graph: int, stream: int) -> None:
        self._do("cuGraphLaunch", graph, stream)
