"""The modules of cuda-python and pycuda, over the fake driver: with the names of the real ones, and no others.

The names are those of cuda_api.json: of cuda-python's from the real wheels, which import without a driver; of pycuda's
from its C++ sources, where they are bound. What is written below and is not in a version's table fails when it is made.
"""

import ctypes
import enum
import json
import types
from pathlib import Path
from typing import Any

import numpy as np

TABLE: dict[str, Any] = json.loads(Path(__file__).with_name("cuda_api.json").read_text())
KINDS = {"i": ctypes.c_int, "u": ctypes.c_uint, "p": ctypes.c_void_p, "q": ctypes.c_uint64, "z": ctypes.c_size_t}
KINDS |= {"f": ctypes.c_float}
# Each call as the driver exports it and its arguments; ">" is what it answers through a pointer.
CALLS = {
    "cuInit": ("cuInit", "u"),
    "cuDriverGetVersion": ("cuDriverGetVersion", ">i"),
    "cuDeviceGetCount": ("cuDeviceGetCount", ">i"),
    "cuDeviceGet": ("cuDeviceGet", ">i i"),
    "cuDeviceGetAttribute": ("cuDeviceGetAttribute", ">i i i"),
    "cuDeviceTotalMem": ("cuDeviceTotalMem_v2", ">z i"),
    "cuDevicePrimaryCtxRetain": ("cuDevicePrimaryCtxRetain", ">p i"),
    "cuDevicePrimaryCtxRelease": ("cuDevicePrimaryCtxRelease_v2", "i"),
    "cuCtxGetCurrent": ("cuCtxGetCurrent", ">p"),
    "cuCtxSetCurrent": ("cuCtxSetCurrent", "p"),
    "cuMemGetInfo": ("cuMemGetInfo_v2", ">z >z"),
    "cuMemAlloc": ("cuMemAlloc_v2", ">q z"),
    "cuMemFree": ("cuMemFree_v2", "q"),
    "cuMemHostAlloc": ("cuMemHostAlloc", ">p z u"),
    "cuMemFreeHost": ("cuMemFreeHost", "p"),
    "cuMemHostGetDevicePointer": ("cuMemHostGetDevicePointer_v2", ">q p u"),
    "cuMemcpyHtoDAsync": ("cuMemcpyHtoDAsync_v2", "q p z p"),
    "cuMemcpyDtoHAsync": ("cuMemcpyDtoHAsync_v2", "p q z p"),
    "cuStreamCreate": ("cuStreamCreate", ">p u"),
    "cuStreamSynchronize": ("cuStreamSynchronize", "p"),
    "cuStreamDestroy": ("cuStreamDestroy_v2", "p"),
    "cuEventCreate": ("cuEventCreate", ">p u"),
    "cuEventRecord": ("cuEventRecord", "p p"),
    "cuEventSynchronize": ("cuEventSynchronize", "p"),
    "cuEventElapsedTime": ("cuEventElapsedTime", ">f p p"),
    "cuEventDestroy": ("cuEventDestroy_v2", "p"),
    "cuStreamBeginCapture": ("cuStreamBeginCapture_v2", "p i"),
    "cuStreamEndCapture": ("cuStreamEndCapture", "p >p"),
    "cuGraphInstantiate": ("cuGraphInstantiateWithFlags", ">p p q"),
    "cuGraphInstantiateWithFlags": ("cuGraphInstantiateWithFlags", ">p p q"),
    "cuGraphLaunch": ("cuGraphLaunch", "p p"),
    "cuGraphExecDestroy": ("cuGraphExecDestroy", "p"),
    "cuGraphDestroy": ("cuGraphDestroy", "p"),
}
CODES = {0: "CUDA_SUCCESS", 1: "CUDA_ERROR_INVALID_VALUE", 2: "CUDA_ERROR_OUT_OF_MEMORY", 100: "CUDA_ERROR_NO_DEVICE"}
CODES |= {201: "CUDA_ERROR_INVALID_CONTEXT", 400: "CUDA_ERROR_INVALID_HANDLE", 600: "CUDA_ERROR_NOT_READY"}
CODES |= {700: "CUDA_ERROR_ILLEGAL_ADDRESS", 900: "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}
NUMBERS = {"COMPUTE_CAPABILITY_MAJOR": 75, "COMPUTE_CAPABILITY_MINOR": 76, "INTEGRATED": 18, "CAN_MAP_HOST_MEMORY": 19}


class Handle:
    """What cuda-python answers: no number, but one when asked."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __int__(self) -> int:
        return self.value


def call(library: Any, name: str, *arguments: Any) -> tuple[int, list[Any]]:
    """(error, answers) of the driver's call."""
    exported, form = CALLS[name]
    given, answers, passed = iter(arguments), [], []
    for word in form.split():
        if word.startswith(">"):
            answers.append(KINDS[word[1]]())
            passed.append(ctypes.byref(answers[-1]))
        else:
            passed.append(KINDS[word](int(next(given))))
    assert not list(given), f"{name} takes {form}"
    return getattr(library, exported)(*passed), [each.value or 0 for each in answers]


def make_cuda_python(version: str, library: Any) -> dict[str, types.ModuleType]:
    """What goes into sys.modules."""
    table = TABLE["cuda-python"]
    column = table["versions"].index(version)
    name = table["modules"][column]
    module = types.ModuleType(name)
    results = enum.IntEnum("CUresult", {text: code for code, text in CODES.items()})  # type: ignore[misc]

    def bound(which: str) -> Any:
        def function(*arguments: Any) -> tuple[Any, ...]:
            code, answers = call(library, which, *arguments)
            if code:
                return (results(code), *[None for _ in answers])
            return (results(0), *[each if isinstance(each, float) else Handle(each) for each in answers])

        return function

    for which in CALLS:
        if table["functions"][which][column] == "x":
            setattr(module, which, bound(which))

    def cuDeviceGetName(length: int, device: Any) -> tuple[Any, bytes]:
        buffer = ctypes.create_string_buffer(length)
        return results(library.cuDeviceGetName(buffer, length, int(device))), buffer.raw

    assert table["functions"]["cuDeviceGetName"][column] == "x"
    module.cuDeviceGetName = cuDeviceGetName  # type: ignore[attr-defined]
    members = {key: NUMBERS[key.replace("CU_DEVICE_ATTRIBUTE_", "")] for key in table["enums"]["CUdevice_attribute"]}
    module.CUdevice_attribute = enum.IntEnum("CUdevice_attribute", members)  # type: ignore[attr-defined]
    modes = {each: number for number, each in enumerate(("GLOBAL", "THREAD_LOCAL", "RELAXED"))}
    members = {f"CU_STREAM_CAPTURE_MODE_{each}": number for each, number in modes.items()}
    assert set(members) == set(table["enums"]["CUstreamCaptureMode"])
    module.CUstreamCaptureMode = enum.IntEnum("CUstreamCaptureMode", members)  # type: ignore[attr-defined]
    parents = {part: types.ModuleType(part) for part in ("cuda", "cuda.bindings") if name.startswith(part + ".")}
    for parent in parents.values():
        parent.__path__ = []
    return {**parents, name: module}


def make_pycuda(version: str, library: Any) -> dict[str, types.ModuleType]:
    """What goes into sys.modules. There is no pycuda.autoinit: importing it fails."""
    module = types.ModuleType("pycuda.driver")
    made = _pycuda(library)
    table = TABLE["pycuda"]
    column = table["versions"].index(version)
    for name, value in made.items():
        names = table["classes"].get(name)
        if names is None:
            assert "x" in table["classes"][""].get(name, ""), f"no pycuda has {name}"
            if table["classes"][""][name][column] == "-":
                continue
        for each in [] if names is None else [each for each in vars(value) if not each.startswith("_")]:
            kinds = {**table["classes"]["HostPointer"], **names}[each]
            assert "x" in kinds, f"no pycuda has {name}.{each}"
            if kinds[column] == "-":
                delattr(value, each)
        setattr(module, name, value)
    package = types.ModuleType("pycuda")
    package.__path__ = []
    package.driver = module  # type: ignore[attr-defined]
    return {"pycuda": package, "pycuda.driver": module}


def _pycuda(library: Any) -> dict[str, Any]:
    class Error(Exception):
        pass

    class LogicError(Error):
        pass

    def do(name: str, *arguments: Any) -> Any:
        code, answers = call(library, name, *arguments)
        if code:
            raise LogicError(f"{name} failed: {CODES.get(code, 'unknown').removeprefix('CUDA_ERROR_').lower()}")
        return answers[0] if len(answers) == 1 else tuple(answers)

    class Context:
        _stack: list[Any] = []  # noqa: RUF012

        def __init__(self, device: int) -> None:
            self._handle, self._device = do("cuDevicePrimaryCtxRetain", device), device

        def push(self) -> None:
            do("cuCtxSetCurrent", self._handle)
            Context._stack.append(self)

        def detach(self) -> None:
            """As the real one: what lies below becomes current; where there is nothing, it stays itself."""
            if self in Context._stack:
                assert Context._stack.pop() is self
            do("cuDevicePrimaryCtxRelease", self._device)
            self._handle = None
            if Context._stack:
                do("cuCtxSetCurrent", Context._stack[-1]._handle)

        def __del__(self) -> None:
            if getattr(self, "_handle", None) is not None:
                raise LogicError("cuCtxDetach failed: a primary context was left to its destructor")

    class Device:
        def __init__(self, index: int) -> None:
            self._device = do("cuDeviceGet", index)

        @staticmethod
        def count() -> int:
            return int(do("cuDeviceGetCount"))

        def name(self) -> str:
            buffer = ctypes.create_string_buffer(256)
            library.cuDeviceGetName(buffer, 256, self._device)
            return buffer.value.decode()

        def compute_capability(self) -> tuple[int, int]:
            return tuple(do("cuDeviceGetAttribute", each, self._device) for each in (75, 76))  # type: ignore[return-value]

        def total_memory(self) -> int:
            return int(do("cuDeviceTotalMem", self._device))

        def get_attribute(self, which: int) -> int:
            return int(do("cuDeviceGetAttribute", which, self._device))

        def retain_primary_context(self) -> Context:
            return Context(self._device)

    class Stream:
        def __init__(self, flags: int = 0) -> None:
            self.__dict__["_stream"] = do("cuStreamCreate", flags)

        @property
        def handle(self) -> int:
            return int(self._stream)

        def synchronize(self) -> None:
            do("cuStreamSynchronize", self._stream)

        def __del__(self) -> None:
            do("cuStreamDestroy", self._stream)

    class Event:
        def __init__(self, flags: int = 0) -> None:
            self._event = do("cuEventCreate", flags)

        def record(self, stream: Any = None) -> "Event":
            do("cuEventRecord", self._event, stream.handle)
            return self

        def synchronize(self) -> "Event":
            do("cuEventSynchronize", self._event)
            return self

        def time_till(self, other: "Event") -> float:
            return float(do("cuEventElapsedTime", self._event, other._event))

        def __del__(self) -> None:
            do("cuEventDestroy", self._event)

    class DeviceAllocation:
        def __init__(self, size: int) -> None:
            self._address = do("cuMemAlloc", size)

        def __int__(self) -> int:
            return int(self._address)

        def free(self) -> None:
            do("cuMemFree", self._address)

    class PagelockedHostAllocation:
        def __init__(self, size: int, flags: int) -> None:
            self._address = do("cuMemHostAlloc", size, flags)
            self.__dict__["__array_interface__"] = {
                "data": (self._address, False),
                "shape": (size,),
                "typestr": "|u1",
                "version": 3,
            }

        def get_device_pointer(self) -> int:
            return int(do("cuMemHostGetDevicePointer", self._address, 0))

        def free(self) -> None:
            do("cuMemFreeHost", self._address)

    def pagelocked_empty(shape: int, dtype: Any, order: str = "C", mem_flags: int = 0) -> "np.ndarray[Any, Any]":
        assert dtype is np.uint8
        return np.asarray(PagelockedHostAllocation(shape, mem_flags))

    def memcpy_htod_async(dest: int, src: "np.ndarray[Any, Any]", stream: Any = None) -> None:
        do("cuMemcpyHtoDAsync", dest, src.ctypes.data, src.nbytes, stream.handle)

    def memcpy_dtoh_async(dest: "np.ndarray[Any, Any]", src: int, stream: Any = None) -> None:
        do("cuMemcpyDtoHAsync", dest.ctypes.data, src, dest.nbytes, stream.handle)

    attributes = type("device_attribute", (), dict(NUMBERS))
    return {
        "Error": Error,
        "LogicError": LogicError,
        "Context": Context,
        "Device": Device,
        "Stream": Stream,
        "Event": Event,
        "DeviceAllocation": DeviceAllocation,
        "PagelockedHostAllocation": PagelockedHostAllocation,
        "device_attribute": attributes,
        "host_alloc_flags": type("host_alloc_flags", (), {"DEVICEMAP": 2}),
        "init": lambda flags=0: do("cuInit", flags),
        "get_driver_version": lambda: do("cuDriverGetVersion"),
        "mem_get_info": lambda: do("cuMemGetInfo"),
        "mem_alloc": DeviceAllocation,
        "pagelocked_empty": pagelocked_empty,
        "memcpy_htod_async": memcpy_htod_async,
        "memcpy_dtoh_async": memcpy_dtoh_async,
    }
