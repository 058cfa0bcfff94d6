"""The engines of a bundle: which of its ONNX files each is built from, and whether one that fits is there already."""

import os
from typing import Any, Dict, Optional, Tuple

from kdedge_device.failures import Failure, RuntimeFailure, VersionFailure
from kdedge_device.manifest import Bundle
from kdedge_device.trt import Here, load_tensorrt
from kdedge_device.trt_build import BuildOptions, build_engine
from kdedge_device.trt_cache import engine_name, fingerprint, read_engine, write_engine
from kdedge_device.trt_runner import TrtRunner
from kdedge_device.trt_timing import default_timing_folder

__all__ = ["build_for_bundle", "engine_path", "has_engines", "open_engine", "source_artifact"]

# The files to take, the first that the bundle has: while precisions are flags, and when they are written in the graph.
_WEAK: Dict[str, Tuple[str, ...]] = {
    "int8": ("model.trt.onnx",),
    "fp16": ("model.fp16.onnx", "model.onnx"),
    "fp32": ("model.onnx",),
}
_STRONG: Dict[str, Tuple[str, ...]] = {
    "int8": ("model.trt-fp16.onnx",),
    "fp16": ("model.fp16.onnx",),
    "fp32": ("model.onnx",),
}


def _sources(here: Here) -> Dict[str, Tuple[str, ...]]:
    return _WEAK if here.weakly_typed else _STRONG


def source_artifact(bundle: Bundle, precision: str, here: Here) -> str:
    """The artifact to build from with this TensorRT. Failure says how to export it where the bundle has none."""
    wanted = _sources(here)[precision]
    for file in wanted:
        for name, entry in sorted(bundle.artifacts.items()):
            if entry.get("file") == file:
                return name
    flag = {"int8": " --int8", "fp16": " --fp16", "fp32": ""}[precision]
    raise Failure(
        f"The bundle {bundle.path} has no {wanted[0]}, which an {precision.upper()} engine for TensorRT {here.version} "
        f"is built from. Export it with: kdedge export{flag}"
    )


def engine_path(bundle: Bundle, options: BuildOptions, here: Here, folder: Optional[str] = None) -> str:
    """Where the engine of `options` for this machine lies, or will lie: in `folder`, by default in the bundle."""
    return _place(bundle, _mark(bundle, source_artifact(bundle, options.precision, here), options, here), folder)


def _mark(bundle: Bundle, artifact: str, options: BuildOptions, here: Here) -> Dict[str, Any]:
    return fingerprint(here, str(bundle.artifacts[artifact]["sha256"]), options.checked()._asdict())


def _place(bundle: Bundle, mark: Dict[str, Any], folder: Optional[str]) -> str:
    return os.path.join(bundle.path if folder is None else folder, engine_name(mark))


def has_engines(bundle: Bundle) -> bool:
    """Whether any lies in the bundle, for whatever machine. Looking for the right one needs TensorRT."""
    return any(name.endswith(".engine") for name in os.listdir(bundle.path))


def open_engine(bundle: Bundle, artifact: str, here: Optional[Here] = None) -> TrtRunner:
    """A runner of the engine that was built from an artifact on this machine, one image a call.

    RuntimeFailure without TensorRT or such an engine, VersionFailure where this TensorRT takes another artifact.
    """
    here = load_tensorrt() if here is None else here
    options = BuildOptions(str(bundle.artifacts[artifact]["precision"]))
    wanted = _sources(here)[options.checked().precision]
    if bundle.artifacts[artifact]["file"] not in wanted:
        raise VersionFailure(f"The artifact '{artifact}' is not for TensorRT {here.version}, which takes {wanted[0]}.")
    path = engine_path(bundle, options, here)
    if not os.path.isfile(path):
        raise RuntimeFailure(
            f"There is no engine of '{artifact}' for this machine. Build it with: python run.pyz build "
            f"--artifact {options.precision}"
        )
    return TrtRunner(path, here)


def build_for_bundle(
    bundle: Bundle,
    options: BuildOptions,
    folder: Optional[str] = None,
    rebuild: bool = False,
    here: Optional[Here] = None,
    timing_folder: Optional[str] = None,
) -> Dict[str, Any]:
    """Build an engine from the bundle, or keep the one that fits: {engine, reused, why, artifact, side}.

    `why` says for what reason it was built, `side` is what its side file says. The model's hash is checked against the
    manifest before it is read.
    """
    options = options.checked()
    here = load_tensorrt() if here is None else here
    artifact = source_artifact(bundle, options.precision, here)
    model = bundle.model_path(artifact)
    mark = _mark(bundle, artifact, options, here)
    path = _place(bundle, mark, folder)
    why: Optional[str] = "there was none"
    if os.path.exists(path) and not rebuild:
        try:
            side = read_engine(path, here, mark)[1]
            return {"engine": path, "reused": True, "why": None, "artifact": artifact, "side": side}
        except Failure as error:
            why = str(error)
    _make(os.path.dirname(path))
    timing = default_timing_folder() if timing_folder is None else timing_folder
    content, report = build_engine(model, options, here, timing)
    write_engine(path, content, dict(mark, onnx_sha256=report["onnx_sha256"]), os.path.basename(model), report)
    side = read_engine(path, here, mark)[1]
    return {"engine": path, "reused": False, "why": "asked for" if rebuild else why, "artifact": artifact, "side": side}


def _make(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise Failure(f"Cannot make the folder {folder}: {error.strerror}. Choose another with --engines.") from None
