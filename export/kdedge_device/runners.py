"""Runtimes behind one shape: a context manager whose `run` takes a batch of N images and gives logits float32 [N, K].

What a batch is the file says: float32 [N, C, H, W], normalised, or the pixels themselves, uint8 [N, H, W, C].

Nothing is loaded before `__enter__`: a runner can be made and passed about on a machine without the runtime.
"""

import os
from types import TracebackType
from typing import Any, Optional, Type, Union

import numpy as np

from kdedge_device.failures import CorruptFailure, Failure, RuntimeFailure, VersionFailure

__all__ = ["OrtRunner"]


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeFailure(
            f"ONNX Runtime cannot be loaded ({error}). Install it with: pip install onnxruntime"
        ) from None
    return onnxruntime


class OrtRunner:
    """ONNX Runtime on the CPU, `threads` threads inside an operator.

    Waiting threads sleep rather than spin: spinning ones are faster by a little and slow down everything else on the
    machine, another session in the same process most of all.
    """

    runtime = "onnxruntime"

    def __init__(self, model_path: Union[str, "os.PathLike[str]"], threads: int = 1) -> None:
        if threads < 1:
            raise Failure(f"{threads} threads were asked for; at least 1 is needed.")
        self.model_path = os.fspath(model_path)
        self.threads = threads
        self._session: Any = None
        self._input = ""

    def __enter__(self) -> "OrtRunner":
        ort = _onnxruntime()
        if not os.path.isfile(self.model_path):
            raise Failure(f"The model {self.model_path} does not exist.")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(self.model_path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the exceptions of ONNX Runtime share no public base class
            raise _refused(self.model_path, ort.__version__, error) from None
        self._input = self._session.get_inputs()[0].name
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._session = None

    @property
    def version(self) -> str:
        return str(_onnxruntime().__version__)

    @property
    def input_shape(self) -> "list[Any]":
        """As in the file: numbers, and names for dynamic axes."""
        return list(self._open().get_inputs()[0].shape)

    @property
    def takes_pixels(self) -> bool:
        """Whether the file normalises by itself and takes uint8 [N, H, W, C]."""
        return str(self._open().get_inputs()[0].type) == "tensor(uint8)"

    def run(self, batch: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        """Logits [N, K] of float32 [N, C, H, W], or of uint8 [N, H, W, C] where the file `takes_pixels`."""
        session = self._open()
        try:
            return np.asarray(session.run(None, {self._input: batch})[0])
        except Exception as error:
            raise Failure(
                f"The model {self.model_path} refused an input of shape {batch.shape} "
                f"and type {batch.dtype}: {_short(error)}"
            ) from None

    def _open(self) -> Any:
        if self._session is None:
            raise Failure(f"The runner of {self.model_path} is not open; use it in a with statement.")
        return self._session


def _refused(path: str, version: str, error: Exception) -> Failure:
    text = str(error)
    if "IR version" in text or "opset" in text.lower():
        return VersionFailure(
            f"ONNX Runtime {version} is too old for {path}: {_short(error)}. Update it with: pip install -U onnxruntime"
        )
    return CorruptFailure(
        f"ONNX Runtime {version} cannot load {path}: {_short(error)}. "
        "The file is damaged or no ONNX model; copy the bundle again."
    )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
