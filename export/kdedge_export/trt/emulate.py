"""What a TensorRT file computes on the device, computed on a CPU: the graph as written, operator by operator.

N images, C channels, H x W pixels, K classes.
"""

import importlib.util
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kdedge.errors import ExportError
from kdedge_export.sessions import open_session

__all__ = ["emulate", "emulator", "openvino_emulator"]

BATCH = 16  # without optimizations every tensor of the network is kept

Batch = npt.NDArray[np.float32]
Run = Callable[[Batch], Batch]


def emulate(content: bytes, images: Batch, threads: int = 1) -> Batch:
    """Logits float32 [N, K] of the ONNX file `content` for `images` float32 [N, C, H, W], by ONNX Runtime."""
    return emulator(content, threads)(images)


def emulator(content: bytes, threads: int = 1) -> Run:
    """The same for many calls. Graph optimizations are off: they move Q and DQ, and fuse them into other roundings."""
    session = open_session(content, threads, optimize=False)
    name = session.get_inputs()[0].name
    return lambda images: _in_batches(images, lambda batch: np.asarray(session.run(None, {name: batch})[0]))


def openvino_emulator(content: bytes, threads: int = 1) -> Run | None:
    """A second opinion: OpenVINO runs the Q/DQ of a TensorRT file in integers. None where it is not installed.

    At float32: on processors with bfloat16 it would take that by itself. ExportError where it refuses the file.
    """
    if importlib.util.find_spec("openvino") is None:
        return None
    try:
        import openvino

        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(content), "CPU", options)
        entry = compiled.input(0)  # tried once: some kernels are found to be missing only when they are called
        compiled(
            np.zeros(
                [1 if size.is_dynamic else size.get_length() for size in entry.partial_shape],
                entry.element_type.to_dtype(),
            )
        )
    except Exception as error:  # of OpenVINO, RuntimeErrors and others; of a broken installation, whatever it raises
        raise ExportError(
            f"OpenVINO cannot run the file for TensorRT: {' '.join(str(error).split())[:200].rstrip('.')}. "
            "It is a second opinion; install another version of openvino, or remove it."
        ) from None
    return lambda images: _in_batches(images, lambda batch: np.asarray(compiled(batch)[0]))


def _in_batches(images: Batch, run: Run) -> Batch:
    return np.concatenate([run(images[start : start + BATCH]) for start in range(0, len(images), BATCH)])
