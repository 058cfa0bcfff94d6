"""The bundle folder: its files, the manifest that names them with their hashes, and how it takes its final name."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from kdedge.errors import DataError, ExportError, RunError
from kdedge.runs import read_json, sha256_file, write_json
from kdedge_device.manifest import SCHEMA
from kdedge_device.preprocess import Preprocess
from kdedge_device.trt_cache import side_path
from kdedge_export.images import Part

__all__ = [
    "ARTIFACTS",
    "Artifact",
    "eval_part",
    "golden_tolerance",
    "name_engines",
    "new_bundle",
    "write_eval",
    "write_golden",
    "write_manifest",
]


@dataclass(frozen=True)
class Artifact:
    """A model file of the bundle. `golden_tolerance`: of the span of the golden logits, on another machine."""

    file: str
    runtime: str
    precision: str
    golden_tolerance: float


# Another processor adds in another order, and near its border an 8-bit code then becomes its neighbour: INT8 moves by a
# few of the 255 steps, FP32 by its last digits, FP16 by some of its eleven bits. The golden logits of a TensorRT file
# are emulated in float32; the real thing may besides run its float layers in TF32 or FP16.
ARTIFACTS = {
    "fp32": Artifact("model.onnx", "onnxruntime", "fp32", 0.001),
    "int8": Artifact("model.int8.onnx", "onnxruntime", "int8", 0.08),
    "trt": Artifact("model.trt.onnx", "tensorrt", "int8", 0.1),
    "trt-fp16": Artifact("model.trt-fp16.onnx", "tensorrt", "int8", 0.1),
    "fp16": Artifact("model.fp16.onnx", "onnxruntime", "fp16", 0.01),
}


_NO_ROOM = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)


@contextlib.contextmanager
def new_bundle(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place when all went well, and vanishes when not.

    A bundle that is there is replaced; ExportError where `out` is anything else, or cannot be written.
    """
    if out.exists() and not _is_bundle(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out} exists and is no bundle; it is left as it is. Choose another folder with --out.")
    folder: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp lets nobody else read
        _take_place(folder, out)
    except OSError as error:
        if error.filename and error.errno not in _NO_ROOM and not str(error.filename).startswith(str(out.parent)):
            raise ExportError(
                f"Cannot read {error.filename}: {error.strerror or error}. What was there before is untouched. "
                "Bring the file back, or check its disk, and export again."
            ) from error
        raise ExportError(
            f"Cannot write {error.filename or out}: {error.strerror or error}. What was there before is untouched. "
            "Free some space or choose a writable folder with --out."
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _is_bundle(folder: Path) -> bool:
    """A run has a manifest.json as well, and must not be taken for an old bundle."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return False
    try:
        document = read_json(manifest)
    except RunError:
        return False
    return isinstance(document, dict) and isinstance(document.get("artifacts"), dict)


def _umask() -> int:
    """Of this process; it can only be read by being set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _take_place(folder: Path, out: Path) -> None:
    if not out.exists():
        folder.rename(out)
        return
    old = folder.with_name(f"{folder.name}-old")
    out.rename(old)
    try:
        folder.rename(out)
    except BaseException:  # Ctrl-C too
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_golden(path: Path, images: npt.NDArray[np.uint8], logits: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """`images` uint8 [n, H, W, C] and logits__<artifact> float32 [n, K], all as computed on this machine."""
    np.savez_compressed(path, images=images, **{f"logits__{name}": each for name, each in logits.items()})  # type: ignore[arg-type]


def golden_tolerance(name: str, logits: npt.NDArray[np.float32]) -> float:
    """How far a golden logit may be off on another machine."""
    return ARTIFACTS[name].golden_tolerance * max(float(logits.max() - logits.min()), 1e-6)


def eval_part(part: Part, count: int) -> tuple[Part, npt.NDArray[np.int64]]:
    """`count` labelled images, evenly over those of `part`, or all where it has fewer; and their places in it.

    They go to the device to be scored there, beside what the manifest says of the same images, so they are test ones: a
    choice was made on any others. DataError where none has a label.
    """
    known = np.flatnonzero(part.labels >= 0)
    if len(known) == 0:
        raise DataError(
            f"The {part.name} images have no labels, so there is nothing to score on the device. "
            "Leave out --with-eval, or use data with a labelled test split."
        )
    places = known[np.unique(np.linspace(0, len(known) - 1, min(count, len(known))).round().astype(np.int64))]
    return replace(part, indices=part.indices[places], labels=part.labels[places], sha256=None), places


def write_eval(path: Path, part: Part, preprocess: Preprocess) -> None:
    """`images` uint8 [N, H, W, C] as the model takes them before normalisation, and `labels` int64 [N]."""
    np.savez_compressed(path, images=part.load(preprocess), labels=part.labels.astype(np.int64))


def write_manifest(
    folder: Path,
    artifacts: Mapping[str, Mapping[str, Any]],
    preprocess: Preprocess,
    classes: tuple[str, ...],
    shipped: str,
    accuracy: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """manifest.json over every file that lies in `folder`. `artifacts`: what is known of each beside the file."""
    models = {ARTIFACTS[name].file for name in artifacts}
    others = sorted(path for path in folder.iterdir() if path.name not in models)
    document = {
        "schema": SCHEMA,
        "shipped": shipped,
        "artifacts": {name: {**_artifact(folder, name), **known} for name, known in artifacts.items()},
        "input": _input(folder / ARTIFACTS["fp32"].file),
        "output": {"name": "logits", "shape": ["batch", len(classes)], "dtype": "float32"},
        "preprocess": preprocess.to_json(),
        "classes": list(classes),
        "accuracy": dict(accuracy),
        "files": {path.name: _hashed(path) for path in others},
        "provenance": dict(provenance),
    }
    write_json(folder / "manifest.json", document)


def name_engines(folder: Path) -> None:
    """Put the engines that were built in a finished bundle into its manifest, each with what its side file says of it,
    and the proof that they were added to.

    They are of use on this machine only. A bundle that was copied without them is whole: the program that checks it
    says "not here", and builds its own.
    """
    document = read_json(folder / "manifest.json")
    if "proof.json" in document["files"]:
        document["files"]["proof.json"] = _hashed(folder / "proof.json")
    document["engines"] = {path.name: _engine(path) for path in sorted(folder.glob("*.engine"))}
    write_json(folder / "manifest.json", document)


def _engine(path: Path) -> dict[str, Any]:
    mark = read_json(Path(side_path(str(path))))["fingerprint"]
    known = {key: mark[key] for key in ("gpu", "capability", "tensorrt", "cuda", "driver", "onnx_sha256")}
    return {**_hashed(path), "precision": mark["options"]["precision"], **known}


def _artifact(folder: Path, name: str) -> dict[str, Any]:
    """What can be read from the file, and what runs it."""
    kind = ARTIFACTS[name]
    path = folder / kind.file
    model = onnx.load(str(path), load_external_data=False)
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    return {
        "file": kind.file,
        **_hashed(path),
        "precision": kind.precision,
        "runtime": kind.runtime,
        "opset": opset,
        "ir_version": model.ir_version,
    }


def _input(path: Path) -> dict[str, Any]:
    """Name, shape, type and layout as the file has them: pixels come as NHWC, normalised numbers as NCHW."""
    value = onnx.load(str(path), load_external_data=False).graph.input[0]
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return {
        "name": value.name,
        "shape": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
        "dtype": dtype,
        "layout": "NHWC" if dtype == "uint8" else "NCHW",
    }


def _hashed(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}
