"""The CUDA driver's library through ctypes: the few calls that running an engine needs, each checked.

It is on every machine with a usable NVIDIA GPU, its symbols are stable, and nothing has to be installed. Python 3.8,
standard library.
"""

import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from kdedge_device.failures import RuntimeFailure

__all__ = [
    "BLOCKING_SYNC",
    "CAPABILITY",
    "CAPTURE_THREAD_LOCAL",
    "INTEGRATED",
    "LIBRARY",
    "MAPPED",
    "NON_BLOCKING",
    "CudaFailure",
    "Driver",
    "Gpu",
    "driver_version",
    "free_all",
    "refused",
    "too_many",
    "version_words",
]

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
# CUDA's numbers, which no version has changed.
CAPABILITY = (75, 76)  # CUdevice_attribute: major, minor
INTEGRATED = 18  # CUdevice_attribute: the GPU has no memory of its own
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no hidden waiting for the default stream
MAPPED = 2  # CU_MEMHOSTALLOC_DEVICEMAP: page-locked, and the GPU can read it where it is
BLOCKING_SYNC = 1  # CU_EVENT_BLOCKING_SYNC: a waiting thread sleeps
CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads do meanwhile does not end it
_OUT_OF_MEMORY = 2


class CudaFailure(RuntimeFailure):
    """A call of the driver that failed; `code` is CUDA's number, 0 where the driver itself could not be loaded."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Gpu(NamedTuple):
    """One device. `capability` as "8.7"; `cuda` is what the driver supports, "12.6"; `driver` its version or L4T's.

    `integrated`: it shares the memory of the CPU, as on every Jetson.
    """

    name: str
    capability: str
    memory_bytes: int
    cuda: str
    driver: Optional[str]
    integrated: bool = False


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
            raise refused(name, self._error_name(code), code)

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
        attributes = [self.number("cuDeviceGetAttribute", each, device) for each in (*CAPABILITY, INTEGRATED)]
        return Gpu(
            name.value.decode("utf-8", "replace"),
            "{}.{}".format(*attributes),
            memory.value,
            version_words(self.number("cuDriverGetVersion")),
            driver_version(),
            bool(attributes[2]),
        )


def refused(call: str, error: str, code: int) -> CudaFailure:
    hint = " Close other programs on the GPU, or lower the batch or workspace." if code == _OUT_OF_MEMORY else ""
    return CudaFailure(f"The CUDA driver refused {call}: {error} (error {code}).{hint}", code)


def too_many(index: int, count: int) -> CudaFailure:
    return CudaFailure(f"GPU {index} was asked for; this machine has {count}.")


def free_all(frees: List[Callable[[], Any]], error: Optional[BaseException]) -> None:
    """Calls each, the last made first. The first failure is raised where no `error` is on its way already."""
    failures = []
    while frees:
        try:
            frees.pop()()
        except CudaFailure as failure:  # after a fault on the GPU every call fails; free what can be freed
            failures.append(failure)
    if failures and error is None:
        raise failures[0]


def version_words(number: int) -> str:
    """ "12.6" of CUDA's 12060."""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_version() -> Optional[str]:
    """ "550.54.14" of a PC's kernel module, "R36 REVISION: 4.3" of a Jetson's L4T; None where neither says."""
    for path in ("/sys/module/nvidia/version", "/etc/nv_tegra_release"):
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                parts = file.readline().lstrip("# ").split(",")
            return parts[0].replace("(release)", "").strip() + "".join(parts[1:2]).rstrip()
    return None
