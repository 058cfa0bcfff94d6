"""The bundle folder: its files, the manifest that names them with their hashes, and how it takes its final name."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdedge.errors import ExportError
from kdedge.runs import sha256_file, write_json
from kdedge_device.manifest import SCHEMA
from kdedge_device.preprocess import Preprocess

__all__ = ["FILES", "golden_tolerance", "new_bundle", "write_golden", "write_manifest"]

FILES = {"fp32": "model.onnx", "int8": "model.int8.onnx"}
# Of the span of the golden logits. Another processor adds in another order, and near its border an 8-bit code then
# becomes its neighbour: INT8 moves by a few of the 255 steps, FP32 by its last digits.
_GOLDEN_TOLERANCE = {"fp32": 0.001, "int8": 0.08}


@contextlib.contextmanager
def new_bundle(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place when all went well, and vanishes when not.

    A bundle that is there is replaced; ExportError where `out` is anything else, or cannot be written.
    """
    if out.exists() and not (out / "manifest.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out} exists and is no bundle; it is left as it is. Choose another folder with --out.")
    folder: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
        yield folder
        folder.chmod(out.parent.stat().st_mode & 0o777)  # mkdtemp lets nobody else read
        _take_place(folder, out)
    except OSError as error:
        raise ExportError(
            f"Cannot write {error.filename or out}: {error.strerror or error}. What was there before is untouched. "
            "Free some space or choose a writable folder with --out."
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _take_place(folder: Path, out: Path) -> None:
    if not out.exists():
        folder.rename(out)
        return
    old = folder.with_name(f"{folder.name}-old")
    out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_golden(path: Path, images: npt.NDArray[np.uint8], logits: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """`images` uint8 [n, H, W, C] and logits__<artifact> float32 [n, K], all as computed on this machine."""
    np.savez_compressed(path, images=images, **{f"logits__{name}": each for name, each in logits.items()})  # type: ignore[arg-type]


def golden_tolerance(name: str, logits: npt.NDArray[np.float32]) -> float:
    """How far a golden logit may be off on another machine."""
    return _GOLDEN_TOLERANCE[name] * max(float(logits.max() - logits.min()), 1e-6)


def write_manifest(
    folder: Path,
    artifacts: Mapping[str, Mapping[str, Any]],
    preprocess: Preprocess,
    classes: tuple[str, ...],
    shipped: str,
    accuracy: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """manifest.json over every file that lies in `folder`. `artifacts`: what is known of each beside file and hash."""
    entries = {
        name: {"file": FILES[name], **_hashed(folder / FILES[name]), "precision": name, **known}
        for name, known in artifacts.items()
    }
    others = sorted(path for path in folder.iterdir() if path.name not in FILES.values())
    write_json(
        folder / "manifest.json",
        {
            "schema": SCHEMA,
            "shipped": shipped,
            "artifacts": entries,
            "input": {
                "name": "input",
                "shape": ["batch", preprocess.channels, preprocess.height, preprocess.width],
                "dtype": "float32",
                "layout": "NCHW",
            },
            "output": {"name": "logits", "shape": ["batch", len(classes)], "dtype": "float32"},
            "preprocess": preprocess.to_json(),
            "classes": list(classes),
            "accuracy": dict(accuracy),
            "files": {path.name: _hashed(path) for path in others},
            "provenance": dict(provenance),
        },
    )


def _hashed(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}
