"""ONNX Runtime's quantize_static: minmax, entropy or percentile, as its documentation has it for x86 with VNNI.

U8 activations, S8 weights per channel, Q/DQ form, its own preprocessing before. The rest are its defaults.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

__all__ = ["main"]

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches of a memory-mapped array, one image each, as its own examples do."""

    def __init__(self, path: str, name: str) -> None:
        self.images, self.name, self.place = np.load(path, mmap_mode="r"), name, 0

    def get_next(self) -> "dict[str, np.ndarray] | None":
        if self.place == len(self.images):
            return None
        self.place += 1
        return {self.name: np.ascontiguousarray(self.images[self.place - 1 : self.place])}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("out")
    parser.add_argument("--method", choices=METHODS, default="minmax")
    options = parser.parse_args()
    name = onnxruntime.InferenceSession(options.model, providers=["CPUExecutionProvider"]).get_inputs()[0].name
    before = time.perf_counter()
    prepared = Path(options.out).with_suffix(".prepared.onnx")
    quant_pre_process(options.model, str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        options.out,
        Reader(options.calibration, name),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=METHODS[options.method],
    )
    seconds = time.perf_counter() - before
    prepared.unlink()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"seconds": seconds, "peak_mib": peak, "version": f"onnxruntime {onnxruntime.__version__}"}))


if __name__ == "__main__":
    main()
