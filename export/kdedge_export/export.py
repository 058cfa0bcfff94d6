"""A finished run -> a bundle: float ONNX checked against torch, INT8 calibrated and decided on, test scored at the end.

N images, K classes.
"""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdedge.errors import DataError
from kdedge.models.weights import LoadedModel, load_model
from kdedge.predictions import add_predictions
from kdedge.runs import Run, read_json, sha256_file, write_json
from kdedge_device.record import now
from kdedge_export.bundle import FILES, golden_tolerance, new_bundle, write_golden, write_manifest
from kdedge_export.gate import Decision, decide
from kdedge_export.images import Part, RunImages, calibration_part, open_run_images
from kdedge_export.latency import measure_alone, speedup
from kdedge_export.lint import lint_float, require_clean
from kdedge_export.onnx_export import Verification, export_float, verify
from kdedge_export.pyz import build_pyz
from kdedge_export.quantize import Quantized, quantize

__all__ = ["TARGET", "export_run"]

TARGET = "onnxruntime-cpu"
GOLDEN_IMAGES = 8
VERIFIED_IMAGES = 32
Say = Callable[[str], None]
Logits = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class _Work:
    """What the steps share: the bundle being made, and everything it is made from."""

    folder: Path
    run: Run
    model: LoadedModel
    images: RunImages
    threads: int
    say: Say


def export_run(
    run: Run,
    *,
    int8: bool,
    out: Path | None = None,
    max_drop_points: float = 1.0,
    calibrate: str | None = None,
    threads: int = 1,
    display: Say | None = None,
) -> dict[str, Any]:
    """Write the bundle of `run` and give the document of `kdedge export --json`.

    `max_drop_points`: of 100 gate images, how many may get another class (or lose accuracy) for INT8 to ship.
    `calibrate`: a data SPEC to calibrate on instead of the run's own images. `threads`: of the measured latency.
    `display`: told each step in a sentence. Raises RunError, DataError, ExportError; a bundle is complete or absent.
    """
    images = open_run_images(run)
    calibration = calibration_part(calibrate) if calibrate else images.calibration
    model = load_model(run.student_path)
    target = run.bundle_path if out is None else out
    with new_bundle(target) as folder:
        work = _Work(folder, run, model, images, threads, display or (lambda sentence: None))
        verified = _float_file(work)
        quantized = _int8_file(work, calibration) if int8 else None
        names = ["fp32", "int8"] if quantized else ["fp32"]
        records = _latencies(work) if quantized else {}
        ratio = speedup(records["fp32"], records["int8"]) if quantized else None
        decision = decide(quantized.agreement if quantized else None, ratio, max_drop_points)
        golden = _golden(work, names)
        # Every choice is made. Only now the test images are looked at, and nothing below changes because of them.
        work.say(f"Scoring {len(images.test)} test images")
        test = _logits(work, images.test, names)
        accuracy = {name: _accuracy(test[name], images.test.labels) for name in names}
        gate = _gate(decision, quantized, max_drop_points, records)
        write_json(folder / "gate.json", gate)
        if quantized:
            write_json(folder / "quantization.json", quantized.document)
        build_pyz(folder / "run.pyz")
        _manifest(work, accuracy, golden, verified, decision, calibration if quantized else None)
        document = _document(folder, accuracy, records, decision, gate, target)
    _add_predictions(run, images, test, quantized)
    return document


def _float_file(work: _Work) -> Verification:
    """model.onnx, compared with torch on real images: gate images, else test ones where the run has no others."""
    work.say("Exporting FP32")
    model, preprocess = work.model, work.model.preprocess
    exported = export_float(model.module, preprocess, model.classes)
    require_clean(lint_float(exported), "model.onnx")
    images = _some(work, VERIFIED_IMAGES)
    found = verify(model.module, exported, preprocess.normalize(images))
    (work.folder / FILES["fp32"]).write_bytes(exported.SerializeToString())
    return found


def _some(work: _Work, count: int) -> npt.NDArray[np.uint8]:
    """A few real images, uint8 [n, H, W, C], of the gate, or else of another part; no labels are used."""
    for part in (work.images.gate, work.images.calibration, work.images.test):
        if len(part):
            return part.load(work.model.preprocess, slice(0, count))
    raise DataError(f"The run {work.run.path} has no images left to check the export on. Train with more images.")


def _int8_file(work: _Work, calibration: Part) -> Quantized:
    import onnx

    exported = onnx.load(str(work.folder / FILES["fp32"]))
    found = quantize(
        exported, work.model.preprocess, calibration, work.images.gate, work.folder, work.threads, work.say
    )
    (work.folder / FILES["int8"]).write_bytes(found.model.SerializeToString())
    return found


def _latencies(work: _Work) -> dict[str, dict[str, Any]]:
    """Records of both files. A near tie is measured again in the other order; the quieter measurement stands."""
    records = {name: _latency(work, name) for name in FILES}
    if 0.9 < speedup(records["fp32"], records["int8"]) < 1.1:
        for name in reversed(FILES):
            again = _latency(work, name)
            quieter = min(records[name], again, key=lambda record: record["latency_ms"]["compute"]["p50"])
            records[name] = quieter | {"repeats": 2}
    return records


def _latency(work: _Work, name: str) -> dict[str, Any]:
    work.say(f"Measuring {name.upper()} on {work.threads} thread{'s' if work.threads > 1 else ''}")
    return measure_alone(work.folder / FILES[name], work.threads)


def _golden(work: _Work, names: list[str]) -> Logits:
    from kdedge_device.evaluate import logits_of
    from kdedge_device.runners import OrtRunner

    images = _some(work, GOLDEN_IMAGES)
    logits: Logits = {}
    for name in names:
        with OrtRunner(work.folder / FILES[name]) as runner:
            logits[name] = logits_of(runner, work.model.preprocess, images)
    write_golden(work.folder / "golden.npz", images, logits)
    return logits


def _logits(work: _Work, part: Part, names: list[str]) -> Logits:
    found = part.logits([work.folder / FILES[name] for name in names], work.model.preprocess, work.threads)
    return dict(zip(names, found, strict=True))


def _accuracy(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float | None:
    """Share of images of known class that are right; None where there are none."""
    known = labels >= 0
    return float((logits.argmax(1) == labels)[known].mean()) if known.any() else None


def _gate(
    decision: Decision, quantized: Quantized | None, max_drop_points: float, records: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    entry = decision.to_json(quantized.agreement if quantized else None, max_drop_points)
    kept = ("conditions", "repeats", "started_at")
    entry["latency"] = {
        name: {"compute_ms": record["latency_ms"]["compute"], **{key: record[key] for key in kept}}
        for name, record in records.items()
    }
    return {"schema": 1, "shipped": decision.shipped, "targets": {TARGET: entry}}


def _manifest(
    work: _Work,
    accuracy: dict[str, float | None],
    golden: Logits,
    verified: Verification,
    decision: Decision,
    calibration: Part | None,
) -> None:
    images, model = work.images, work.model
    artifacts: dict[str, dict[str, Any]] = {
        name: {
            "runtime": "onnxruntime",
            "opset": 17,
            "ir_version": 8,
            "accuracy": accuracy[name],
            "golden_tolerance": golden_tolerance(name, golden[name]),
        }
        for name in accuracy
    }
    artifacts["fp32"]["verified_against_torch"] = dict(verified)
    scored = {
        "split": "val" if images.test_is_val else "test",
        "images": int((images.test.labels >= 0).sum()),
        "sha256": images.test.sha256,
        **accuracy,
    }
    write_manifest(
        work.folder,
        artifacts,
        model.preprocess,
        model.classes,
        decision.shipped,
        scored,
        _provenance(work, calibration),
    )


def _provenance(work: _Work, calibration: Part | None) -> dict[str, Any]:
    splits = read_json(work.run.splits_path)
    packages = ("kdedge", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    return {
        "run": work.run.path.resolve().name,
        "recipe_sha256": sha256_file(work.run.recipe_path),
        "student_sha256": sha256_file(work.run.student_path),
        "arch": work.model.arch,
        "params": work.model.num_params,
        "data": splits["data"],
        "data_fingerprint": splits["fingerprint"],
        "calibration": {"images": len(calibration), "sha256": calibration.sha256} if calibration else None,
        "versions": {name: metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "exported_at": now(),
    }


def _add_predictions(run: Run, images: RunImages, test: Logits, quantized: Quantized | None) -> None:
    """The logits of the exported files beside those of training."""
    add_predictions(run, "test", images.test.ids, images.test.labels, test)
    if quantized:
        logits = {"fp32": quantized.gate_fp32, "int8": quantized.gate_int8}
        add_predictions(run, "gate", images.gate.ids, images.gate.labels, logits)


def _document(
    folder: Path,
    accuracy: dict[str, float | None],
    records: dict[str, dict[str, Any]],
    decision: Decision,
    gate: dict[str, Any],
    target: Path,
) -> dict[str, Any]:
    artifacts: dict[str, dict[str, Any]] = {}
    for name, value in accuracy.items():
        artifacts[name] = {"accuracy": value, "bytes": (folder / FILES[name]).stat().st_size}
        if name in records:
            compute = records[name]["latency_ms"]["compute"]
            artifacts[name] |= {f"latency_ms_{key}": compute[key] for key in ("p50", "p90")}
    return {
        "artifacts": artifacts,
        "drop_points": decision.drop_points,
        "speedup": decision.speedup,
        "shipped": decision.shipped,
        "why": decision.why,
        "targets": gate["targets"],
        "bundle": str(target),
    }
