"""What a TensorRT file computes on the device, computed on a CPU: the graph as written, operator by operator.

N images, C channels, H x W pixels, K classes.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kdedge.errors import MissingPackage
from kdedge_export.sessions import open_session

__all__ = ["emulate", "emulate_openvino"]

BATCH = 16  # without optimizations every tensor of the network is kept

Batch = npt.NDArray[np.float32]


def emulate(content: bytes, images: Batch, threads: int = 1) -> Batch:
    """Logits float32 [N, K] of the ONNX file `content` for `images` float32 [N, C, H, W], by ONNX Runtime.

    Its graph optimizations are off: they move Q and DQ, and fuse them into kernels with other roundings.
    """
    session = open_session(content, threads, optimize=False)
    name = session.get_inputs()[0].name
    return _in_batches(images, lambda batch: np.asarray(session.run(None, {name: batch})[0]))


def emulate_openvino(content: bytes, images: Batch, threads: int = 1) -> Batch:
    """The same by OpenVINO, which runs the Q/DQ of a TensorRT file in integers. MissingPackage without openvino.

    At float32: on processors with bfloat16 it would take that by itself.
    """
    try:
        import openvino
    except ImportError:
        raise MissingPackage("openvino", "the second emulation of TensorRT files", "pip install openvino") from None
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(content), "CPU", options)
    return _in_batches(images, lambda batch: np.asarray(compiled(batch)[0]))


def _in_batches(images: Batch, run: Callable[[Batch], Batch]) -> Batch:
    return np.concatenate([run(images[start : start + BATCH]) for start in range(0, len(images), BATCH)])
