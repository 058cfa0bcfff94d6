"""The engines of a bundle: which of its ONNX files each is built from, and whether one that fits is there already."""

import json
import os
from typing import Any, Dict, List, Optional, Tuple

from kdedge_device.failures import Failure, RuntimeFailure, VersionFailure
from kdedge_device.manifest import Bundle, engines_in
from kdedge_device.own_key import is_own, own_key
from kdedge_device.trt import Here, load_tensorrt
from kdedge_device.trt_build import BuildOptions, build_engine
from kdedge_device.trt_cache import engine_name, fingerprint, read_engine, read_side, write_engine
from kdedge_device.trt_launch import PLAIN, Access
from kdedge_device.trt_runner import TrtRunner
from kdedge_device.trt_timing import default_timing_folder

__all__ = [
    "ENGINES",
    "build_for_bundle",
    "find_engine",
    "fitting_engines",
    "has_engines",
    "open_engine",
    "open_precision",
    "source_artifact",
]

# What a person may call an engine -> its precision.
ENGINES = {"trt": "int8", "trt-fp16": "int8", "int8": "int8", "fp16": "fp16", "fp32": "fp32"}

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


def _mark(bundle: Bundle, artifact: str, options: BuildOptions, here: Here) -> Dict[str, Any]:
    return fingerprint(here, str(bundle.artifacts[artifact]["sha256"]), options.checked()._asdict())


def _place(bundle: Bundle, mark: Dict[str, Any], folder: Optional[str]) -> str:
    return os.path.join(bundle.path if folder is None else folder, engine_name(mark))


def has_engines(bundle: Bundle) -> bool:
    """Whether any lies in the bundle, for whatever machine. Looking for the right one needs TensorRT."""
    return bool(engines_in(bundle.path))


def find_engine(
    bundle: Bundle, options: BuildOptions, here: Here, folder: Optional[str] = None
) -> Optional[Tuple[str, Dict[str, Any]]]:
    """(path, fingerprint) of the engine to run for `options`, from `folder` and the bundle; None where none fits.

    It was built on a machine like this from this bundle's model, in that precision. One of exactly these options comes
    first, then one for that very batch, then one that takes it, then any. It is checked in full when it is opened.
    """
    exact = _mark(bundle, source_artifact(bundle, options.precision, here), options, here)
    fits: List[Tuple[int, str, Dict[str, Any]]] = []
    for place in [bundle.path] if folder is None else [folder, bundle.path]:
        path = _place(bundle, exact, place)
        if os.path.lexists(path):
            return path, exact
        for path, mark in fitting_engines(bundle, options.precision, here, place).items():
            fits.append((_distance(mark["options"]["batch"], options.batch[1]), path, mark))
    return min(fits, key=lambda each: each[:2])[1:] if fits else None


def fitting_engines(
    bundle: Bundle, precision: str, here: Here, folder: Optional[str] = None
) -> Dict[str, Dict[str, Any]]:
    """{path: fingerprint} of every engine that says it was built of this model, in this precision, on such a machine.

    They lie in `folder`, by default the bundle. Each is checked in full when it is opened.
    """
    sha256 = str(bundle.artifacts[source_artifact(bundle, precision, here)]["sha256"])
    fits: Dict[str, Dict[str, Any]] = {}
    for path in engines_in(bundle.path if folder is None else folder):
        built = _options_of(path)
        if built is None or built["precision"] != precision:
            continue
        mark = fingerprint(here, sha256, built)
        if read_side(path)["fingerprint"] == json.loads(json.dumps(mark)):
            fits[path] = mark
    return fits


def _options_of(path: str) -> Optional[Dict[str, Any]]:
    """What an engine was built with; None where its side file cannot be read, is not this user's or does not say."""
    try:
        side = read_side(path)
        if not is_own(side):
            return None
        options = side["fingerprint"].get("options")
        BuildOptions(options["precision"], tuple(options["batch"]), options["workspace_mib"]).checked()
    except (Failure, KeyError, TypeError):
        return None
    return dict(options)


def _distance(batch: List[int], wanted: int) -> int:
    if batch == [wanted] * 3:
        return 0
    return 1 if batch[0] <= wanted <= batch[2] else 2


def open_engine(
    bundle: Bundle, artifact: str, here: Optional[Here] = None, access: Access = PLAIN, batch: int = 1
) -> TrtRunner:
    """A runner of an engine that was built from an artifact on this machine, best one for `batch` images a call.

    RuntimeFailure without TensorRT or such an engine, VersionFailure where this TensorRT takes another artifact.
    """
    here = load_tensorrt() if here is None else here
    precision = str(bundle.artifacts[artifact]["precision"])
    wanted = _sources(here)[BuildOptions(precision).checked().precision]
    if bundle.artifacts[artifact]["file"] not in wanted:
        raise VersionFailure(f"The artifact '{artifact}' is not for TensorRT {here.version}, which takes {wanted[0]}.")
    return open_precision(bundle, precision, here, access, batch, name=artifact)


def open_precision(
    bundle: Bundle,
    precision: str,
    here: Optional[Here] = None,
    access: Access = PLAIN,
    batch: int = 1,
    folder: Optional[str] = None,
    name: Optional[str] = None,
) -> TrtRunner:
    """A runner of an engine of a precision, whichever of the bundle's files it is built from; else RuntimeFailure.

    `folder`: where to look before the bundle. `name`: what the message calls it.
    """
    here = load_tensorrt() if here is None else here
    if batch < 1:
        raise Failure(f"A batch of {batch} was asked for; at least 1 is needed.")
    found = find_engine(bundle, BuildOptions(precision, (batch,) * 3), here, folder)
    if found is None:
        others = " Those that are here were built elsewhere, or from another model." if has_engines(bundle) else ""
        raise RuntimeFailure(
            f"There is no engine of '{name or precision}' for this machine.{others} Build it with: "
            f"python run.pyz build --artifact {precision}"
        )
    return TrtRunner(found[0], here, found[1], access)


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
    own_key()  # that it cannot be kept is told before minutes of building, not after
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
