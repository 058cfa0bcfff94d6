"""CUDA through pycuda, for machines that use it anyway: the primary context, pushed here and detached here.

Never pycuda.autoinit: it makes a context of its own at import, which TensorRT does not use, and pops it when the
program ends. pycuda has no CUDA graphs; `capture` says so. Its objects free themselves when nothing holds them, so
they are held here, by the numbers that stand for them. Python 3.8, numpy.
"""

import ctypes
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Callable, Dict, List, Optional, Tuple, Type

import numpy as np

from kdedge_device.cuda_driver import (
    BLOCKING_SYNC,
    NON_BLOCKING,
    CudaFailure,
    Gpu,
    driver_version,
    free_all,
    too_many,
    version_words,
)

__all__ = ["Pycuda"]


def _driver_module() -> Any:
    try:
        import pycuda.driver as driver
    except ImportError as error:  # also where it was built for another CUDA
        raise CudaFailure(
            f"pycuda cannot be loaded ({error}). Install it with: pip install pycuda (it needs the CUDA toolkit), "
            "or leave --cuda out: ctypes needs no package."
        ) from None
    return driver


class Pycuda:
    """As `cuda.Cuda`, by another way."""

    how = "pycuda"

    def __init__(self, device: int = 0) -> None:
        self._index = device
        self._module: Any = None
        self._context: Any = None
        self._device: Any = None
        self._host: Dict[int, Any] = {}  # address -> array over page-locked bytes
        self._memory: Dict[int, Any] = {}  # address -> allocation on the device
        self._streams: Dict[int, Any] = {}  # CUDA's handle -> stream
        self._events: Dict[int, Any] = {}  # a number of ours: pycuda tells no handle

    def __enter__(self) -> "Pycuda":
        driver = _driver_module()
        if not hasattr(driver.Device, "retain_primary_context"):
            raise CudaFailure("pycuda is older than 2020.1 and cannot use TensorRT's context; update it.")
        self._module = driver
        self._do(driver.init)
        count = int(self._do(driver.Device.count))
        if self._index >= count:
            raise too_many(self._index, count)
        self._device = self._do(driver.Device, self._index)
        context = self._do(self._device.retain_primary_context)
        try:
            self._do(context.push)
        except CudaFailure:
            with suppress(CudaFailure):
                self._do(context.detach)
            raise
        self._context = context
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._driver  # noqa: B018  # raises where it is not open
        frees: List[Callable[[], Any]] = [self._leave]
        frees += [partial(self._do, each.base.free) for each in self._host.values()]
        frees += [partial(self._do, each.free) for each in self._memory.values()]
        for held in (self._events, self._streams, self._host, self._memory):
            held.clear()  # events and streams are destroyed with their last reference, and before the context goes
        free_all(frees, error)

    def _leave(self) -> None:
        """Takes it off pycuda's stack, and makes the one below current. Left to its destructor (or popped before),
        pycuda 2026.1 calls cuCtxDetach, which a primary context refuses."""
        context, self._context = self._context, None
        self._do(context.detach)

    def _do(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return call(*arguments, **named)
        except self._module.Error as error:
            raise CudaFailure(f"pycuda: {error}.") from None

    @property
    def _driver(self) -> Any:
        if self._context is None:
            raise CudaFailure("The CUDA context is not open; use it in a with statement.")
        return self._module

    @property
    def gpu(self) -> Gpu:
        driver, device = self._driver, self._device
        integrated = self._do(device.get_attribute, driver.device_attribute.INTEGRATED)
        return Gpu(
            str(self._do(device.name)),
            "{}.{}".format(*self._do(device.compute_capability)),
            int(self._do(device.total_memory)),
            version_words(int(self._do(driver.get_driver_version))),
            driver_version(),
            bool(integrated),
        )

    def memory(self) -> Tuple[int, int]:
        free, total = self._do(self._driver.mem_get_info)
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        allocation = self._do(self._driver.mem_alloc, size)
        self._memory[int(allocation)] = allocation
        return int(allocation)

    def allocate_host(self, size: int) -> "ctypes.Array[ctypes.c_ubyte]":
        driver = self._driver
        array = self._do(driver.pagelocked_empty, size, np.uint8, mem_flags=driver.host_alloc_flags.DEVICEMAP)
        self._host[array.ctypes.data] = array
        return (ctypes.c_ubyte * size).from_address(array.ctypes.data)

    def device_address(self, host: "ctypes.Array[ctypes.c_ubyte]") -> int:
        self._driver  # noqa: B018
        return int(self._do(self._host[ctypes.addressof(host)].base.get_device_pointer))

    def copy_in(self, device: int, host: "ctypes.Array[ctypes.c_ubyte]", size: int, stream: int) -> None:
        array = self._host[ctypes.addressof(host)][:size]
        self._do(self._driver.memcpy_htod_async, device, array, self._streams[stream])

    def copy_out(self, host: "ctypes.Array[ctypes.c_ubyte]", device: int, size: int, stream: int) -> None:
        array = self._host[ctypes.addressof(host)][:size]
        self._do(self._driver.memcpy_dtoh_async, array, device, self._streams[stream])

    def stream(self) -> int:
        stream = self._do(self._driver.Stream, NON_BLOCKING)
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def synchronize(self, stream: int) -> None:
        self._driver  # noqa: B018
        self._do(self._streams[stream].synchronize)

    def event(self) -> int:
        number = len(self._events) + 1
        self._events[number] = self._do(self._driver.Event, BLOCKING_SYNC)
        return number

    def record(self, event: int, stream: int) -> None:
        self._driver  # noqa: B018
        self._do(self._events[event].record, self._streams[stream])

    def wait(self, event: int) -> None:
        self._driver  # noqa: B018
        self._do(self._events[event].synchronize)

    def elapsed_ms(self, start: int, end: int) -> float:
        self._driver  # noqa: B018
        return float(self._do(self._events[start].time_till, self._events[end]))

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        raise CudaFailure("pycuda has no CUDA graphs; use --cuda ctypes for them.")

    def launch(self, graph: int, stream: int) -> None:
        raise CudaFailure("pycuda has no CUDA graphs; use --cuda ctypes for them.")
