"""NNCF's post-training quantization of an ONNX model: nncf.quantize with its defaults (bias correction included).

`--method mixed` is its preset for networks with activations of either sign; `default` is its default preset.
"""

import argparse
import json
import resource
import time

import numpy as np
import onnx

__all__ = ["main"]


def main() -> None:
    import nncf  # of the environment it runs in

    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("out")
    parser.add_argument("--method", choices=("default", "mixed"), default="default")
    options = parser.parse_args()
    model = onnx.load(options.model)
    name = model.graph.input[0].name
    images = np.load(options.calibration, mmap_mode="r")
    before = time.perf_counter()
    dataset = nncf.Dataset(range(len(images)), lambda i: {name: np.ascontiguousarray(images[i : i + 1])})
    preset = nncf.QuantizationPreset.MIXED if options.method == "mixed" else nncf.QuantizationPreset.PERFORMANCE
    quantized = nncf.quantize(model, dataset, preset=preset, subset_size=len(images))
    onnx.save(quantized, options.out)
    seconds = time.perf_counter() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"seconds": seconds, "peak_mib": peak, "version": f"nncf {nncf.__version__}"}))


if __name__ == "__main__":
    main()
