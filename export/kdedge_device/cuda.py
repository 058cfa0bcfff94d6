"""The CUDA driver through ctypes: the few calls that running an engine needs, each checked.

The driver library is on every machine with a usable NVIDIA GPU, its symbols are stable, and nothing has to be
installed. TensorRT lives in the *primary* context of a device, so that one is retained and made current; a context of
our own would not see TensorRT's memory. Device memory and handles are plain integers. Python 3.8, standard library.
"""

import ctypes
import os
from contextlib import suppress
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from types import TracebackType
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Type

from kdedge_device.failures import RuntimeFailure

__all__ = ["LIBRARY", "Cuda", "CudaFailure", "Driver", "Gpu"]

LIBRARY = "libcuda.so.1"

_HANDLE = POINTER(c_void_p)
# Literal names: the headers alias some of them, and cuEventElapsedTime_v2 exists from CUDA 12.8 only.
_SIGNATURES: Dict[str, Tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (_HANDLE, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxGetCurrent": (_HANDLE,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (_HANDLE, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_uint64), c_void_p, c_uint),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (_HANDLE, c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuEventCreate": (_HANDLE, c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuEventDestroy_v2": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _HANDLE),
    "cuGraphInstantiateWithFlags": (_HANDLE, c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
}
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no hidden waiting for the default stream
_MAPPED = 2  # CU_MEMHOSTALLOC_DEVICEMAP: page-locked, and the GPU can read it where it is
_BLOCKING_SYNC = 1  # CU_EVENT_BLOCKING_SYNC: a waiting thread sleeps
_CAPTURE_THREAD_LOCAL = 1
_OUT_OF_MEMORY = 2


class CudaFailure(RuntimeFailure):
    """A call of the driver that failed; `code` is CUDA's number, 0 where the driver itself could not be loaded."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Gpu(NamedTuple):
    """One device. `capability` as "8.7"; `cuda` is what the driver supports, "12.6"; `driver` its version or L4T's."""

    name: str
    capability: str
    memory_bytes: int
    cuda: str
    driver: Optional[str]


class Driver:
    """The library, with every call checked. Making one loads and initialises it; CudaFailure says why it cannot be."""

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise CudaFailure(
                f"No CUDA driver can be loaded ({error}). Install the NVIDIA driver of this machine; "
                "in a container, start it with the NVIDIA runtime."
            ) from None
        self._calls: Dict[str, Callable[..., int]] = {}
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """One driver call. CudaFailure with CUDA's own name of the error."""
        code = self._function(name)(*arguments)
        if code:
            hint = (
                " Close other programs on the GPU, or lower the batch or workspace." if code == _OUT_OF_MEMORY else ""
            )
            raise CudaFailure(f"The CUDA driver refused {name}: {self._error_name(code)} (error {code}).{hint}", code)

    def _function(self, name: str) -> Callable[..., int]:
        if name not in self._calls:
            try:
                function = getattr(self._library, name)
            except AttributeError:
                raise CudaFailure(f"The CUDA driver has no {name}; it is too old. Update the NVIDIA driver.") from None
            function.argtypes = _SIGNATURES[name]
            function.restype = c_int
            self._calls[name] = function
        return self._calls[name]

    def _error_name(self, code: int) -> str:
        text = c_char_p()
        if self._function("cuGetErrorName")(code, byref(text)) or not text.value:
            return "an unknown error"
        return text.value.decode("ascii", "replace")

    def number(self, name: str, *arguments: Any) -> int:
        """A call that answers through a leading int pointer."""
        value = c_int()
        self.call(name, byref(value), *arguments)
        return value.value

    def handle(self, name: str, *arguments: Any) -> int:
        """A call that makes something and answers its handle."""
        value = c_void_p()
        self.call(name, byref(value), *arguments)
        return int(value.value or 0)

    def count(self) -> int:
        return self.number("cuDeviceGetCount")

    def gpu(self, index: int) -> Gpu:
        device = self.number("cuDeviceGet", index)
        name, memory = ctypes.create_string_buffer(256), c_size_t()
        self.call("cuDeviceGetName", name, len(name), device)
        self.call("cuDeviceTotalMem_v2", byref(memory), device)
        capability = [
            self.number("cuDeviceGetAttribute", each, device) for each in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR)
        ]
        version = self.number("cuDriverGetVersion")
        return Gpu(
            name.value.decode("utf-8", "replace"),
            "{}.{}".format(*capability),
            memory.value,
            f"{version // 1000}.{version % 1000 // 10}",
            _driver_version(),
        )


class Cuda:
    """The primary context of one device, current in the thread that entered it. Leaving it frees what was made here.

    Copies and launches return at once; `synchronize` waits for them. One thread uses one Cuda.
    """

    def __init__(self, device: int = 0, library: str = LIBRARY) -> None:
        self._index = device
        self._path = library
        self._opened: Optional[Driver] = None
        self._device = -1
        self._before = 0
        self._live: List[Tuple[str, int]] = []  # (the call that frees it, handle), in the order they were made

    def __enter__(self) -> "Cuda":
        driver = Driver(self._path)
        if self._index >= driver.count():
            raise CudaFailure(f"GPU {self._index} was asked for; this machine has {driver.count()}.")
        self._device = driver.number("cuDeviceGet", self._index)
        self._before = driver.handle("cuCtxGetCurrent")
        context = driver.handle("cuDevicePrimaryCtxRetain", self._device)
        try:
            driver.call("cuCtxSetCurrent", context)
        except CudaFailure:
            driver.call("cuDevicePrimaryCtxRelease_v2", self._device)
            raise
        self._opened = driver
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        driver, self._opened = self._driver, None
        calls: List[Tuple[str, Optional[int]]] = list(reversed(self._live))
        calls += [("cuCtxSetCurrent", self._before or None), ("cuDevicePrimaryCtxRelease_v2", self._device)]
        self._live.clear()
        failures = []
        for name, handle in calls:
            try:
                driver.call(name, handle)
            except CudaFailure as failure:  # after a fault on the GPU every call fails; free what can be freed
                failures.append(failure)
        if failures and error is None:
            raise failures[0]

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
        self._live.append((free, handle))
        return handle

    def allocate(self, size: int) -> int:
        """`size` bytes on the device: their address there."""
        address = c_uint64()
        self._driver.call("cuMemAlloc_v2", byref(address), size)
        return self._keep(address.value, "cuMemFree_v2")

    def allocate_host(self, size: int) -> "ctypes.Array[ctypes.c_ubyte]":
        """`size` page-locked bytes of this process; only such can be copied without waiting."""
        address = self._keep(self._driver.handle("cuMemHostAlloc", size, _MAPPED), "cuMemFreeHost")
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
        return self._keep(self._driver.handle("cuStreamCreate", _NON_BLOCKING), "cuStreamDestroy_v2")

    def synchronize(self, stream: int) -> None:
        """Wait until all of `stream` is done. Errors of earlier, asynchronous calls come out here."""
        self._driver.call("cuStreamSynchronize", stream)

    def event(self) -> int:
        return self._keep(self._driver.handle("cuEventCreate", _BLOCKING_SYNC), "cuEventDestroy_v2")

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
        self._driver.call("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD_LOCAL)
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


def _driver_version() -> Optional[str]:
    """ "550.54.14" of a PC's kernel module, "R36 REVISION: 4.3" of a Jetson's L4T; None where neither says."""
    for path in ("/sys/module/nvidia/version", "/etc/nv_tegra_release"):
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                parts = file.readline().lstrip("# ").split(",")
            return parts[0].replace("(release)", "").strip() + "".join(parts[1:2]).rstrip()
    return None
