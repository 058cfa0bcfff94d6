"""Engines behind the shape of every runner: a context manager whose `run` takes float32 [N, C, H, W], gives [N, K].

The parts of a run can be called apart, to be timed apart: `put` copies a batch in, `launch` computes, `get` copies the
logits out. Nothing is loaded before `__enter__`.

Two kinds of buffers: "pinned", page-locked memory that is copied to the device's and back; and "zero-copy", which the
GPU reads and writes where it is. On a Jetson, where CPU and GPU share their memory, that saves both copies; across a
PCIe bus it is slower.
"""

import os
from types import TracebackType
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Type, Union

import numpy as np

from kdedge_device.cuda_access import CudaAccess, chosen_way, open_cuda
from kdedge_device.failures import Failure
from kdedge_device.trt import Here, Log, load_tensorrt, new_log
from kdedge_device.trt_cache import read_engine
from kdedge_device.trt_errors import must
from kdedge_device.trt_launch import PLAIN, Access, Launcher

__all__ = ["TrtRunner"]

# tensorrt.nptype cannot be used: that of 8.5 needs a numpy alias that is gone.
_TYPES: Dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
}


class _Tensor(NamedTuple):
    """An input or output: its largest shape, and where its bytes are, here and on the device."""

    name: str
    shape: Tuple[int, ...]
    array: "np.ndarray[Any, Any]"  # over the page-locked bytes
    host: Any
    device: int

    def size(self, count: int) -> int:
        """Bytes of `count` images."""
        return count * int(self.array[0].nbytes)


class TrtRunner:
    """An engine that was built on this machine; any other is refused before TensorRT sees it (trt_cache).

    A batch larger than the engine's is run in parts; a smaller one fills up an engine of a fixed batch. `expected` is
    the whole fingerprint that the engine has to have, where it is known.
    """

    runtime = "tensorrt"

    def __init__(
        self,
        model_path: Union[str, "os.PathLike[str]"],
        here: Optional[Here] = None,
        expected: Optional[Dict[str, Any]] = None,
        access: Access = PLAIN,
    ) -> None:
        self.model_path = os.fspath(model_path)
        self.side: Dict[str, Any] = {}
        self.access = access
        self._here = here
        self.expected = expected
        self._cuda: Optional[CudaAccess] = None
        self._zero_copy = False
        self._log: Optional[Log] = None
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._stream = 0
        self._declared: Tuple[int, ...] = ()
        self._used = 0  # images that the next launch computes
        self._launcher: Optional[Launcher] = None

    def __enter__(self) -> "TrtRunner":
        self._here = load_tensorrt() if self._here is None else self._here
        content, self.side = read_engine(self.model_path, self._here, self.expected)
        cuda = open_cuda(chosen_way(self.access.cuda), 0, self._here.library)
        cuda.__enter__()
        self._cuda = cuda
        try:
            self._load(content)
            self._allocate(cuda)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        # In this order: what was made from something goes before it, and the CUDA context last.
        self._launcher = None
        self._context = None
        self._engine = None
        self._runtime = None
        self._log = None
        cuda, self._cuda = self._cuda, None
        if cuda is not None:
            cuda.__exit__(kind, error, trace)

    def _load(self, content: bytes) -> None:
        assert self._here is not None
        trt = self._here.trt
        self._log = new_log(trt)
        self._runtime = trt.Runtime(self._log.logger)
        what = f"TensorRT {self._here.version} cannot run {self.model_path}"
        self._engine = must(self._runtime.deserialize_cuda_engine(content), self._log.errors, what)
        self._context = must(self._engine.create_execution_context(), self._log.errors, what)

    def _allocate(self, cuda: CudaAccess) -> None:
        buffers = self.access.buffers
        self._zero_copy = buffers == "zero-copy" or (buffers == "auto" and cuda.gpu.integrated)
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name).name == "INPUT"]
        if len(inputs) != 1 or len(names) != 2:
            raise Failure(f"{self.model_path} has the tensors {names}; one input and one output were expected.")
        (output,) = set(names) - set(inputs)
        self._declared = tuple(engine.get_tensor_shape(inputs[0]))
        shape = self._declared
        if shape[0] < 0:
            shape = tuple(engine.get_tensor_profile_shape(inputs[0], 0)[2])  # the largest of (min, best, max)
            self._check(self._context.set_input_shape(inputs[0], shape), f"an input of shape {shape}")
        self._used, self._stream = 0, cuda.stream()
        self._launcher = Launcher(cuda, self._stream, self._enqueue, self.access.graph)
        self._input = self._tensor(cuda, inputs[0], shape)
        self._output = self._tensor(cuda, output, tuple(self._context.get_tensor_shape(output)))
        if self._output.shape[:1] != shape[:1] or len(self._output.shape) != 2:
            raise Failure(f"{self.model_path} gives {self._output.shape}; logits of shape [N, K] were expected.")

    def _tensor(self, cuda: CudaAccess, name: str, shape: Tuple[int, ...]) -> _Tensor:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _TYPES:
            raise Failure(
                f"The tensor {name} of {self.model_path} has type {kind}; one of {list(_TYPES)} was expected."
            )
        size = int(np.prod(shape)) * np.dtype(_TYPES[kind]).itemsize
        host = cuda.allocate_host(size)
        device = cuda.device_address(host) if self._zero_copy else cuda.allocate(size)
        array = np.frombuffer(memoryview(host), dtype=_TYPES[kind]).reshape(shape)
        self._check(self._context.set_tensor_address(name, device), f"the address of {name}")
        return _Tensor(name, shape, array, host, device)

    @property
    def version(self) -> str:
        return self._opened()[0].version

    @property
    def precision(self) -> Optional[str]:
        """What it was built for: "int8", "fp16" or "fp32"; None where its side file does not say."""
        options = self.side.get("fingerprint", {}).get("options")
        return str(options["precision"]) if isinstance(options, dict) and "precision" in options else None

    @property
    def input_shape(self) -> List[Any]:
        """As in the engine: numbers, and "batch" where several sizes are possible."""
        self._opened()
        return ["batch" if size < 0 else size for size in self._declared]

    @property
    def largest_batch(self) -> int:
        """What one launch computes at most."""
        self._opened()
        return self._input.shape[0]

    @property
    def takes_pixels(self) -> bool:
        """True where the input is uint8 [N, H, W, C] and normalisation is part of the engine."""
        self._opened()
        return bool(self._input.array.dtype == np.uint8)

    def run(self, batch: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        """Logits float32 [N, K] of [N, C, H, W]: in parts of the engine's batch, if need be."""
        self._opened()
        largest = self._input.shape[0]
        parts = []
        for start in range(0, len(batch), largest):
            count = self.put(batch[start : start + largest])
            self.launch()
            parts.append(self.get(count))
        if not parts:
            raise Failure(
                f"{self.model_path} was given an input of shape {batch.shape}; at least one image was expected."
            )
        return np.concatenate(parts)

    def put(self, batch: "np.ndarray[Any, Any]") -> int:
        """Begins to copy at most one engine's batch to the device: how many images it is."""
        cuda = self._opened()[1]
        kind = self._input.array.dtype
        count = len(batch)
        floats = kind.kind == "f" and batch.dtype.kind == "f"
        fits = batch.shape[1:] == self._input.shape[1:] and count <= self._input.shape[0]
        if not fits or not (floats or batch.dtype == kind):
            raise Failure(
                f"{self.model_path} refused an input of shape {batch.shape} and type {batch.dtype}; "
                f"{kind} {list(self._input.shape)} was expected."
            )
        used = self.computed(count)
        if self._declared[0] < 0 and used != self._used:
            self._check(self._context.set_input_shape(self._input.name, (used,) + batch.shape[1:]), f"{used} images")
        self._used = used
        self._input.array[:count] = batch
        self._input.array[count:used] = 0
        if not self._zero_copy:
            cuda.copy_in(self._input.device, self._input.host, self._input.size(used), self._stream)
        return count

    def computed(self, count: int) -> int:
        """How many images a launch computes for `count` of them: more, where the engine takes no so small batch."""
        self._opened()
        if self._declared[0] >= 0:
            return self._input.shape[0]
        smallest = int(tuple(self._engine.get_tensor_profile_shape(self._input.name, 0)[0])[0])
        return max(count, smallest)

    def launch(self) -> None:
        """Begins to compute on what was put."""
        self._started().launch(self._used)

    def _enqueue(self) -> None:
        self._check(self._context.execute_async_v3(self._stream), "to run")

    def compute(self) -> None:
        """Computes on what was put, and waits: no copies."""
        self.launch()
        self._opened()[1].synchronize(self._stream)

    def compute_ns(self) -> int:
        """As `compute`, and the nanoseconds that passed on the GPU between its beginning and its end."""
        return self._started().compute_ns(self._used)

    def conditions(self) -> Dict[str, Any]:
        """For a record, after a run: how CUDA was reached, the buffers, and whether a CUDA graph was launched."""
        return {
            "input_name": self._input.name,
            "input_declared": self.input_shape,
            "cuda": self._opened()[1].how,
            "buffers": "zero-copy" if self._zero_copy else "pinned",
            "cuda_graph": self._started().captured,
            "cuda_graph_why_not": self._started().why_not,
        }

    def get(self, count: int) -> "np.ndarray[Any, Any]":
        """Waits for the logits of the first `count` images: float32 [count, K], a copy."""
        cuda = self._opened()[1]
        if not self._zero_copy:
            cuda.copy_out(self._output.host, self._output.device, self._output.size(count), self._stream)
        cuda.synchronize(self._stream)
        return self._output.array[:count].astype(np.float32)

    def _check(self, done: Any, what: str) -> None:
        """TensorRT answers False instead of raising."""
        must(done, self._log.errors if self._log else [], f"The engine {self.model_path} refused {what}")

    @property
    def here(self) -> Here:
        return self._opened()[0]

    def _started(self) -> Launcher:
        self._opened()
        assert self._launcher is not None
        return self._launcher

    def _opened(self) -> Tuple[Here, CudaAccess]:
        if self._cuda is None or self._here is None:
            raise Failure(f"The runner of {self.model_path} is not open; use it in a with statement.")
        return self._here, self._cuda
