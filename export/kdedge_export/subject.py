"""What is exported: a float model in the canonical form, and the images that it is quantized and judged on.

It comes from a finished run, or from an ONNX file that was trained elsewhere. N images, C x H x W, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from kdedge.errors import DataError
from kdedge.models.weights import load_model
from kdedge.runs import Run, read_json, sha256_file
from kdedge_device.preprocess import Preprocess
from kdedge_export.cpu.lint import lint_float, require_clean
from kdedge_export.float_form.foreign import Reading, open_foreign
from kdedge_export.float_form.onnx_export import export_float, verify
from kdedge_export.images import Part, RunImages, calibration_part, open_run_images

__all__ = ["Original", "Subject", "file_subject", "run_subject", "some_images"]

VERIFIED_IMAGES = 32
Say = Callable[[str], None]
Original = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""Logits [N, K] of images [N, C, H, W], as computed where the model comes from."""


@dataclass(frozen=True)
class Subject:
    """`model`: float, opset 17, checked by value against where it comes from; `checked`: how, for the manifest.

    `original`: torch's own answers; None for a file from elsewhere, which is compared while it is read. `calibration`:
    images for ranges, maybe of another set than `images`. `run`: None for a file.
    """

    model: onnx.ModelProto
    original: Original | None
    checked: dict[str, Any]
    preprocess: Preprocess
    classes: tuple[str, ...]
    images: RunImages
    calibration: Part
    provenance: dict[str, Any]
    run: Run | None = None


def run_subject(run: Run, calibrate: str | None, say: Say) -> Subject:
    """The student of a finished run. `calibrate`: a data SPEC to calibrate on instead of the run's own images."""
    import torch

    images = open_run_images(run)
    loaded = load_model(run.student_path)
    say("Exporting FP32")
    module = loaded.module.eval()
    model = export_float(module, loaded.preprocess, loaded.classes)
    require_clean(lint_float(model), "model.onnx")

    def original(batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(batch)).float().numpy())

    checked = verify(
        module, model, loaded.preprocess.normalize(some_images(images, loaded.preprocess, VERIFIED_IMAGES))
    )
    splits = read_json(run.splits_path)
    provenance = {
        "run": run.path.resolve().name,
        "recipe_sha256": sha256_file(run.recipe_path),
        "student_sha256": sha256_file(run.student_path),
        "arch": loaded.arch,
        "params": loaded.num_params,
        "data": splits["data"],
        "data_fingerprint": splits["fingerprint"],
    }
    judged = (images.gate, images.test)
    calibration = calibration_part(calibrate, judged=judged) if calibrate else images.calibration
    return Subject(
        model,
        original,
        {"verified_against_torch": dict(checked)},
        loaded.preprocess,
        loaded.classes,
        images,
        calibration,
        provenance,
        run,
    )


def file_subject(path: Path, spec: str, reading: Reading, say: Say) -> Subject:
    """A float ONNX file that was trained elsewhere, with the images of the data SPEC."""
    say(f"Reading {path.name}")
    found = open_foreign(path, spec, reading)
    for note in found.notes:
        say(note)
    require_clean(lint_float(found.model), "model.onnx")
    provenance = {"file": path.name, "file_sha256": sha256_file(path), "data": spec, "notes": list(found.notes)}
    return Subject(
        found.model,
        None,
        {"verified_against_original": {"file": path.name, "max_abs_difference": found.max_abs_difference}},
        found.preprocess,
        found.classes,
        found.images,
        found.images.calibration,
        provenance,
    )


def some_images(images: RunImages, preprocess: Preprocess, count: int) -> npt.NDArray[np.uint8]:
    """A few real images, uint8 [n, H, W, C], of the gate, or else of another part; no labels are used."""
    for part in (images.gate, images.calibration, images.test):
        if len(part):
            return part.load(preprocess, slice(0, count))
    raise DataError("There are no images to check the export on. Use a set with some more images.")
