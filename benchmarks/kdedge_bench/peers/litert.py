"""LiteRT: onnx2tf's conversion, Google's quantizer for LiteRT files (int8 weights and activations), LiteRT's runtime.

The batch is fixed to 1 before: with an open one the converter pads by operations that compute shapes, which nothing
quantizes. Of the quantizer these are its defaults, min-max, by which a file may take and give INT8: its image is then
quantized here, which is not timed, and its logits made float. The runtime computes through XNNPACK, its default, on one
thread.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from kdedge_bench.peers.peer import Array, Peer, Runner, main
else:  # run as a program, where it lies beside it and nothing of kdedge is installed
    from peer import Array, Peer, Runner, main

__all__ = ["open_file", "quantize"]


def quantize(model: str, images: Array, out: Path, method: str) -> Path:
    file = out.with_suffix(".tflite")
    with tempfile.TemporaryDirectory() as scratch:
        content = _converted(model, Path(scratch))
    if method != "float":
        content = _quantized(content, images)
    file.write_bytes(content)
    return file


def _converted(model: str, scratch: Path) -> bytes:
    import onnx
    import onnx2tf

    network = onnx.load(model)
    network.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    network.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(network, str(scratch / "model.onnx"))
    onnx2tf.convert(str(scratch / "model.onnx"), output_folder_path=str(scratch / "out"), non_verbose=True)
    return (scratch / "out" / "model_float32.tflite").read_bytes()


def _quantized(content: bytes, images: Array) -> bytes:
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    signatures = Interpreter(model_content=content).get_signature_list()
    (name, signature), *_ = signatures.items()
    made = quantizer.Quantizer(content, recipe.static_wi8_ai8())
    ranges = made.calibrate({name: _Samples(signature["inputs"][0], images)}, num_threads=1)
    return bytes(made.quantize(ranges).quantized_model)


class _Samples:
    """One image at a time, as often as it is asked: the quantizer counts them before it begins."""

    def __init__(self, name: str, images: Array) -> None:
        self.name, self.images = name, images

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return ({self.name: _nhwc(self.images[i : i + 1])} for i in range(len(self.images)))


def _nhwc(image: Array) -> Array:
    return np.ascontiguousarray(image.transpose(0, 2, 3, 1))


def open_file(file: str) -> Runner:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(file, num_threads=1)
    interpreter.allocate_tensors()
    entry, exit_ = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def prepare(image: Array) -> Array:
        return _quantized_as(entry, _nhwc(image))

    def run(image: Array) -> Array:
        interpreter.set_tensor(entry["index"], image)
        interpreter.invoke()
        return interpreter.get_tensor(exit_["index"])

    return Runner(prepare, lambda image: _float_as(exit_, run(image)))


def _quantized_as(tensor: Mapping[str, Any], values: Array) -> Array:
    """In the type that the file takes."""
    if tensor["dtype"] == np.float32:
        return values
    scale, zero = tensor["quantization"]
    limits = np.iinfo(tensor["dtype"])
    return np.clip(np.rint(values / scale) + zero, limits.min, limits.max).astype(tensor["dtype"])


def _float_as(tensor: Mapping[str, Any], values: Array) -> Array:
    if tensor["dtype"] == np.float32:
        return values
    scale, zero = tensor["quantization"]
    return np.asarray((values.astype(np.float32) - zero) * scale)


def version() -> str:
    from importlib.metadata import version

    return f"ai-edge-quantizer {version('ai-edge-quantizer')}, onnx2tf {version('onnx2tf')}"


def runtime() -> str:
    from importlib.metadata import version

    return f"ai-edge-litert {version('ai-edge-litert')}"


if __name__ == "__main__":
    main(Peer(quantize, version, ("default", "float"), runtime, open_file))
