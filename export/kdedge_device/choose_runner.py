"""Which runner an artifact gets on this machine: ONNX Runtime, or the TensorRT engine that was built of it."""

import importlib.util
from typing import Optional, Union

from kdedge_device.failures import Failure, RuntimeFailure
from kdedge_device.manifest import Bundle
from kdedge_device.openvino_runner import OpenVinoRunner, artifact_for_openvino
from kdedge_device.runners import OrtRunner
from kdedge_device.trt import load_tensorrt
from kdedge_device.trt_build import BuildOptions
from kdedge_device.trt_bundle import ENGINES, find_engine, has_engines, open_engine, open_precision
from kdedge_device.trt_runner import TrtRunner

__all__ = ["Runner", "only_engines", "open_runner", "runtime_of", "why_not_onnxruntime"]

Runner = Union[OrtRunner, OpenVinoRunner, TrtRunner]


def open_runner(
    bundle: Bundle, artifact: Optional[str] = None, threads: int = 1, runtime: Optional[str] = None
) -> Runner:
    """A runner of an artifact, the shipped one unless named: ONNX Runtime, or the engine built from it on this machine.

    `runtime` "tensorrt" takes an engine also of what ONNX Runtime can run, by precision: int8, fp16 or fp32, the first
    that is here unless named. So does a machine that has engines and no ONNX Runtime. RuntimeFailure where the runtime,
    or the engine, is not here. "openvino" takes FP32's file and, of INT8, the one for TensorRT.
    """
    if runtime == OpenVinoRunner.runtime:
        return OpenVinoRunner(bundle.model_path(artifact_for_openvino(bundle, artifact)), threads)
    if runtime == TrtRunner.runtime or (runtime is None and artifact is None and only_engines(bundle)):
        return _open_precision(bundle, artifact)
    name = bundle.artifact(artifact)
    if runtime_of(bundle, name) == TrtRunner.runtime and runtime is None and has_engines(bundle):
        return open_engine(bundle, name)
    why = why_not_onnxruntime(bundle, name)
    if why:
        runnable = ", ".join(sorted(each for each in bundle.artifacts if not why_not_onnxruntime(bundle, each)))
        raise RuntimeFailure(f"The artifact '{name}' cannot be run by ONNX Runtime: {why}. It runs: {runnable}.")
    return OrtRunner(bundle.model_path(name), threads)


def only_engines(bundle: Bundle) -> bool:
    """Whether this machine has engines and no ONNX Runtime, so that what it runs by itself is one of them."""
    return has_engines(bundle) and importlib.util.find_spec(OrtRunner.runtime) is None


def _open_precision(bundle: Bundle, artifact: Optional[str]) -> TrtRunner:
    if artifact is not None and artifact not in ENGINES:
        raise Failure(f"There is no engine '{artifact}'; --artifact takes one of {', '.join(ENGINES)}.")
    here = load_tensorrt()
    if artifact is not None:
        return open_precision(bundle, ENGINES[artifact], here)
    for precision in ("int8", "fp16"):
        if find_engine(bundle, BuildOptions(precision), here) is not None:
            return open_precision(bundle, precision, here)
    return open_precision(bundle, "fp32", here)


def runtime_of(bundle: Bundle, name: str) -> str:
    return str(bundle.artifacts[name].get("runtime", OrtRunner.runtime))


def why_not_onnxruntime(bundle: Bundle, name: str) -> str:
    """Why an artifact is not for ONNX Runtime; empty where it is. A TensorRT file would load, and be slow or wrong."""
    runtime = runtime_of(bundle, name)
    if runtime == OrtRunner.runtime:
        return ""
    if runtime == TrtRunner.runtime:
        return "it needs TensorRT and an engine, which `python run.pyz build` makes"
    return f"it needs {runtime}"
