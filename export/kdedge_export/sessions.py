"""ONNX Runtime sessions for the export itself: from bytes, one thread unless told, quiet."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

__all__ = ["open_session", "run_onnx"]


def open_session(content: bytes, threads: int = 1, optimize: bool = True) -> Any:
    """An InferenceSession on the CPU. `optimize=False` runs the graph as written, operator by operator."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run_onnx(content: bytes, batch: npt.NDArray[np.float32], optimize: bool = True) -> npt.NDArray[np.float32]:
    """The first output for `batch`."""
    session = open_session(content, optimize=optimize)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: batch})[0])
