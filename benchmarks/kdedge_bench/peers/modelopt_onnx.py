"""NVIDIA Model-Optimizer's post-training quantization of an ONNX model, on a CPU: entropy (its default) or max.

Its Q/DQ are placed for TensorRT: symmetric, on the inputs of layers. What is not quantized stays FP32 (its default is
FP16, which ONNX Runtime has no kernels for on a CPU).
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING or __package__:
    from kdedge_bench.peers.peer import Array, Peer, main
else:  # run as a program, where it lies beside it and nothing of kdedge is installed
    from peer import Array, Peer, main

__all__ = ["quantize"]


def quantize(model: str, images: Array, out: Path, method: str) -> Path:
    from modelopt.onnx.quantization import quantize as quantize_onnx

    quantize_onnx(
        model,
        quantize_mode="int8",
        calibration_data=np.array(images),
        calibration_method=method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(out),
        log_level="WARNING",
    )
    return out


def version() -> str:
    from importlib.metadata import version

    return f"nvidia-modelopt {version('nvidia-modelopt')}"


if __name__ == "__main__":
    main(Peer(quantize, version, ("entropy", "max")))
