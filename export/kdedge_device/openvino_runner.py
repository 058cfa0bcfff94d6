"""OpenVINO behind the shape of every runner, on the CPU: a file as it is, and for INT8 the one with explicit Q/DQ.

It computes in what the file says: left alone, OpenVINO takes bfloat16 for FP32 on processors that have it.
"""

import importlib.util
import os
from types import TracebackType
from typing import Any, Dict, Optional, Type, Union

import numpy as np

from kdedge_device.failures import CorruptFailure, Failure, RuntimeFailure
from kdedge_device.manifest import Bundle

__all__ = ["OpenVinoRunner", "artifact_for_openvino", "why_not_openvino"]


def why_not_openvino() -> str:
    """Empty where it is installed."""
    if importlib.util.find_spec("openvino") is not None:
        return ""
    return "OpenVINO is not installed. Install it with: pip install openvino"


def artifact_for_openvino(bundle: Bundle, name: Optional[str]) -> str:
    """The artifact that it reads for `name`: of INT8 the file for TensorRT, whose scales are symmetric as it wants."""
    chosen = bundle.artifact(name) if name != "int8" else name
    if chosen != "int8":
        return bundle.artifact(chosen)
    if "trt" not in bundle.artifacts:
        raise Failure(f"The bundle {bundle.path} has no INT8 file for OpenVINO. Export it with: kdedge export --int8")
    return "trt"


class OpenVinoRunner:
    """Compiled anew for each size of batch: a graph of open sizes is slower."""

    runtime = "openvino"

    def __init__(self, model_path: Union[str, "os.PathLike[str]"], threads: int = 1) -> None:
        if threads < 1:
            raise Failure(f"{threads} threads were asked for; at least 1 is needed.")
        self.model_path = os.fspath(model_path)
        self.threads = threads
        self._openvino: Any = None
        self._core: Any = None
        self._entry: Any = None
        self._requests: Dict[int, Any] = {}

    def __enter__(self) -> "OpenVinoRunner":
        try:
            import openvino
        except ImportError as error:
            raise RuntimeFailure(
                f"OpenVINO cannot be loaded ({error}). Install it with: pip install openvino"
            ) from None
        if not os.path.isfile(self.model_path):
            raise Failure(f"The model {self.model_path} does not exist.")
        self._openvino, self._core = openvino, openvino.Core()
        try:
            self._entry = self._core.read_model(self.model_path).input(0)
        except Exception as error:  # RuntimeError and others
            raise CorruptFailure(self._refused(error)) from None
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._requests = {}
        self._entry = self._core = None

    @property
    def version(self) -> str:
        """Such as 2025.3.0; what follows is the build."""
        return str(self._openvino.__version__).split("-")[0]

    @property
    def input_shape(self) -> "list[Any]":
        """As in the file: numbers, and "?" for what is left open."""
        return [int(size.get_length()) if size.is_static else "?" for size in self._open().partial_shape]

    @property
    def takes_pixels(self) -> bool:
        """Whether the file normalises by itself and takes uint8 [N, H, W, C]."""
        return bool(self._open().element_type.to_dtype() == np.uint8)

    def run(self, batch: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        """Logits [N, K] of float32 [N, C, H, W], or of uint8 [N, H, W, C] where the file `takes_pixels`."""
        self._open()
        try:
            if len(batch) not in self._requests:
                self._requests[len(batch)] = self._compiled(batch)
            found = self._requests[len(batch)].infer([batch], share_inputs=True)
            return np.array(found[0])  # its own memory is used again by the next call
        except Exception as error:
            raise Failure(f"{self._refused(error)} The input had shape {batch.shape}.") from None

    def _compiled(self, batch: "np.ndarray[Any, Any]") -> Any:
        model = self._core.read_model(self.model_path)
        model.reshape(list(batch.shape))
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        return self._core.compile_model(model, "CPU", settings).create_infer_request()

    def _open(self) -> Any:
        if self._entry is None:
            raise Failure(f"The runner of {self.model_path} is not open; use it in a with statement.")
        return self._entry

    def _refused(self, error: Exception) -> str:
        told = " ".join(str(error).split())[:300]
        return f"OpenVINO {self.version} cannot run {self.model_path}: {told}. Try another version of openvino."
