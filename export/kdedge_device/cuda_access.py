"""How a program reaches CUDA: one small interface, and three ways behind it that do the same calls.

- "ctypes" (`cuda`), the default: the driver's library alone, nothing to install.
- "pycuda" (`cuda_pycuda`): for machines that use it anyway. It has no CUDA graphs.
- "cuda-python" (`cuda_python`): NVIDIA's own bindings, from Python 3.9 on.

The default can be changed with the environment variable KDEDGE_CUDA. Python 3.8, standard library.
"""

import ctypes
import os
from types import TracebackType
from typing import Callable, Optional, Protocol, Tuple, Type

from kdedge_device.cuda import Cuda
from kdedge_device.cuda_driver import LIBRARY, Gpu
from kdedge_device.failures import Failure

__all__ = ["VARIABLE", "WAYS", "CudaAccess", "chosen_way", "open_cuda"]

WAYS = ("ctypes", "pycuda", "cuda-python")
VARIABLE = "KDEDGE_CUDA"


class CudaAccess(Protocol):
    """The primary context of one device, current in the thread that entered it; leaving it frees what was made here.

    Addresses, streams, events and graphs are whole numbers, and a stream's is CUDA's own handle. Copies and launches
    return at once; errors of the GPU come out of the next wait. Every failure is a CudaFailure.
    """

    how: str

    def __enter__(self) -> "CudaAccess": ...

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None: ...

    @property
    def gpu(self) -> Gpu: ...

    def memory(self) -> Tuple[int, int]: ...

    def allocate(self, size: int) -> int: ...

    def allocate_host(self, size: int) -> "ctypes.Array[ctypes.c_ubyte]": ...

    def device_address(self, host: "ctypes.Array[ctypes.c_ubyte]") -> int: ...

    def copy_in(self, device: int, host: "ctypes.Array[ctypes.c_ubyte]", size: int, stream: int) -> None: ...

    def copy_out(self, host: "ctypes.Array[ctypes.c_ubyte]", device: int, size: int, stream: int) -> None: ...

    def stream(self) -> int: ...

    def synchronize(self, stream: int) -> None: ...

    def event(self) -> int: ...

    def record(self, event: int, stream: int) -> None: ...

    def wait(self, event: int) -> None: ...

    def elapsed_ms(self, start: int, end: int) -> float: ...

    def capture(self, stream: int, work: Callable[[], None]) -> int: ...

    def launch(self, graph: int, stream: int) -> None: ...


def chosen_way(asked: Optional[str] = None) -> str:
    """`asked`, else what KDEDGE_CUDA says, else ctypes. Failure for a way that is not known."""
    way = asked or os.environ.get(VARIABLE) or WAYS[0]
    if way not in WAYS:
        where = "--cuda" if asked else VARIABLE
        raise Failure(f"{where} is {way!r}; one of {', '.join(WAYS)} was expected.")
    return way


def open_cuda(way: str = "ctypes", device: int = 0, library: str = LIBRARY) -> CudaAccess:
    """Not entered yet, so nothing is loaded. `library` is for ctypes: the packages find the driver by themselves."""
    if way == "pycuda":
        from kdedge_device.cuda_pycuda import Pycuda

        return Pycuda(device)
    if way == "cuda-python":
        from kdedge_device.cuda_python import CudaPython

        return CudaPython(device)
    return Cuda(device, library)
