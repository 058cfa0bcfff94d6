"""NNCF's post-training quantization of an OpenVINO model, run by OpenVINO: nncf.quantize with its defaults.

FP32 stays FP32: on processors with bfloat16 OpenVINO would take that unless it is told not to, and the ratio would be
of two things at once. `mixed` is NNCF's preset for networks with activations of either sign.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING or __package__:
    from kdedge_bench.peers.peer import Array, Peer, Runner, main
else:  # run as a program, where it lies beside it and nothing of kdedge is installed
    from peer import Array, Peer, Runner, main

__all__ = ["open_file", "quantize"]


def quantize(model: str, images: Array, out: Path, method: str) -> Path:
    import openvino

    network = openvino.convert_model(model)
    if method != "float":
        import nncf

        dataset = nncf.Dataset(range(len(images)), lambda i: np.ascontiguousarray(images[i : i + 1]))
        preset = nncf.QuantizationPreset.MIXED if method == "mixed" else nncf.QuantizationPreset.PERFORMANCE
        network = nncf.quantize(network, dataset, preset=preset, subset_size=len(images))
    file = out.with_suffix(".xml")
    openvino.save_model(network, str(file), compress_to_fp16=False)
    return file


def open_file(file: str) -> Runner:
    import openvino

    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(file, "CPU", hints)
    request, output = compiled.create_infer_request(), compiled.output(0)
    return Runner(prepare=lambda image: [image], run=lambda image: request.infer(image)[output])


def versions() -> str:
    import nncf

    return f"nncf {nncf.__version__}"


def runtime() -> str:
    import openvino

    return f"openvino {openvino.__version__.split('-')[0]}"


if __name__ == "__main__":
    main(Peer(quantize, versions, ("default", "mixed", "float"), runtime, open_file))
