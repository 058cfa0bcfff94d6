"""CUDA through ctypes on the driver's library: the default of the ways that `cuda_access` knows.

TensorRT lives in the *primary* context of a device, so that one is retained and made current; a context of our own
would not see TensorRT's memory. Device memory and handles are plain integers. Python 3.8, standard library.
"""

import ctypes
from contextlib import suppress
from ctypes import byref, c_float, c_size_t, c_uint64, c_void_p
from functools import partial
from types import TracebackType
from typing import Callable, List, Optional, Tuple, Type

from kdedge_device.cuda_driver import (
    BLOCKING_SYNC,
    CAPTURE_THREAD_LOCAL,
    LIBRARY,
    MAPPED,
    NON_BLOCKING,
    CudaFailure,
    Driver,
    Gpu,
    free_all,
    too_many,
)

__all__ = ["Cuda"]


class Cuda:
    """The primary context of one device, current in the thread that entered it. Leaving it frees what was made here.

    Copies and launches return at once; `synchronize` waits for them. One thread uses one Cuda.
    """

    how = "ctypes"

    def __init__(self, device: int = 0, library: str = LIBRARY) -> None:
        self._index = device
        self._path = library
        self._opened: Optional[Driver] = None
        self._frees: List[Callable[[], None]] = []

    def __enter__(self) -> "Cuda":
        driver = Driver(self._path)
        if self._index >= driver.count():
            raise too_many(self._index, driver.count())
        device = driver.number("cuDeviceGet", self._index)
        before = driver.handle("cuCtxGetCurrent")
        context = driver.handle("cuDevicePrimaryCtxRetain", device)
        try:
            driver.call("cuCtxSetCurrent", context)
        except CudaFailure:
            driver.call("cuDevicePrimaryCtxRelease_v2", device)
            raise
        self._opened = driver
        self._frees = [
            partial(driver.call, "cuDevicePrimaryCtxRelease_v2", device),
            partial(driver.call, "cuCtxSetCurrent", before or None),
        ]
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._opened = None
        free_all(self._frees, error)

    @property
    def _driver(self) -> Driver:
        if self._opened is None:
            raise CudaFailure("The CUDA context is not open; use it in a with statement.")
        return self._opened

    @property
    def gpu(self) -> Gpu:
        return self._driver.gpu(self._index)

    def memory(self) -> Tuple[int, int]:
        """(free, total) bytes. On a Jetson it is the system's memory."""
        free, total = c_size_t(), c_size_t()
        self._driver.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def _keep(self, handle: int, free: str) -> int:
        self._frees.append(partial(self._driver.call, free, handle))
        return handle

    def allocate(self, size: int) -> int:
        """`size` bytes on the device: their address there."""
        address = c_uint64()
        self._driver.call("cuMemAlloc_v2", byref(address), size)
        return self._keep(address.value, "cuMemFree_v2")

    def allocate_host(self, size: int) -> "ctypes.Array[ctypes.c_ubyte]":
        """`size` page-locked bytes of this process; only such can be copied without waiting."""
        address = self._keep(self._driver.handle("cuMemHostAlloc", size, MAPPED), "cuMemFreeHost")
        return (ctypes.c_ubyte * size).from_address(address)

    def device_address(self, host: "ctypes.Array[ctypes.c_ubyte]") -> int:
        """Where the GPU sees bytes of `allocate_host`. No copy is needed where both share their memory (Jetson)."""
        address = c_uint64()
        self._driver.call("cuMemHostGetDevicePointer_v2", byref(address), ctypes.addressof(host), 0)
        return address.value

    def copy_in(self, device: int, host: "ctypes.Array[ctypes.c_ubyte]", size: int, stream: int) -> None:
        self._driver.call("cuMemcpyHtoDAsync_v2", device, ctypes.addressof(host), size, stream)

    def copy_out(self, host: "ctypes.Array[ctypes.c_ubyte]", device: int, size: int, stream: int) -> None:
        self._driver.call("cuMemcpyDtoHAsync_v2", ctypes.addressof(host), device, size, stream)

    def stream(self) -> int:
        return self._keep(self._driver.handle("cuStreamCreate", NON_BLOCKING), "cuStreamDestroy_v2")

    def synchronize(self, stream: int) -> None:
        """Wait until all of `stream` is done. Errors of earlier, asynchronous calls come out here."""
        self._driver.call("cuStreamSynchronize", stream)

    def event(self) -> int:
        return self._keep(self._driver.handle("cuEventCreate", BLOCKING_SYNC), "cuEventDestroy_v2")

    def record(self, event: int, stream: int) -> None:
        self._driver.call("cuEventRecord", event, stream)

    def wait(self, event: int) -> None:
        self._driver.call("cuEventSynchronize", event)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Between two events that were recorded and waited for."""
        value = c_float()
        self._driver.call("cuEventElapsedTime", byref(value), start, end)
        return float(value.value)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """What `work` puts on `stream`, as a graph to be launched as often as wanted; nothing runs yet.

        Addresses and shapes are frozen in it. Run the same work once plainly first: first calls allocate.
        """
        self._driver.call("cuStreamBeginCapture_v2", stream, CAPTURE_THREAD_LOCAL)
        try:
            work()
        except BaseException:
            with suppress(CudaFailure):  # it may be invalid by now; a stream left capturing refuses everything else
                self._end_capture(stream)
            raise
        graph = self._end_capture(stream)
        return self._keep(self._driver.handle("cuGraphInstantiateWithFlags", graph, 0), "cuGraphExecDestroy")

    def _end_capture(self, stream: int) -> int:
        graph = c_void_p()
        self._driver.call("cuStreamEndCapture", stream, byref(graph))
        return self._keep(int(graph.value or 0), "cuGraphDestroy")

    def launch(self, graph: int, stream: int) -> None:
        self._driver.call("cuGraphLaunch", graph, stream)
