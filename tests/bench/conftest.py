"""A run folder with every file of the contract, made of known numbers in a moment."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

RIGHT = {"baseline": 400, "teacher": 525, "student": 517, "fp32": 517, "int8": 516}
TEST_IMAGES = 540
LATENCY_P90_MS = {"fp32": 0.1532, "int8": 0.0712}
MakeRun = Callable[..., Path]


def write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")


def logits_with(labels: npt.NDArray[np.int64], classes: int, right: int, seed: int) -> npt.NDArray[np.float32]:
    """Logits [N, K] of which exactly the first `right` images of a shuffle have their largest at the label."""
    rng = np.random.default_rng(seed)
    guesses = labels.copy()
    # The same order for every artifact: good networks fail on the same images.
    wrong = np.random.default_rng(0).permutation(len(labels))[right:]
    guesses[wrong] = (labels[wrong] + 1 + wrong % 3) % classes
    logits = rng.normal(0, 0.3, (len(labels), classes))
    logits[np.arange(len(labels)), guesses] += 4 + 3 * rng.random(len(labels))
    return logits.astype(np.float32)


def metrics() -> Iterator[dict[str, Any]]:
    for stage, steps, rate in (("baseline", 300, 0.03), ("outer", 600, 0.03), ("inner", 1000, 0.03)):
        for step in range(20, steps + 1, 20):
            done = step / steps
            line: dict[str, Any] = {
                "stage": stage, "step": step, "total_steps": steps, "loss": 2.2 * (1 - done) ** 2 + 0.04,
                "lr": rate * float(np.cos(7 * np.pi * done / 16)), "images_per_second": 4000.0,
                "loader_wait_fraction": 0.01, "seconds": step / 20,
            }  # fmt: skip
            if stage != "baseline":
                line |= {
                    "loss_labeled": line["loss"] / 2, "loss_unlabeled": line["loss"] / 2,
                    "kept_fraction": 0.2 + 0.7 * done, "pseudo_label_accuracy": 0.8 + 0.16 * done,
                    "pseudo_label_histogram": [0.1] * 10,
                }  # fmt: skip
            yield line


def record(artifact: str, sha256: str, p90_ms: float, **changes: Any) -> dict[str, Any]:
    def spread(p90: float) -> dict[str, float]:
        return {"p50": p90 * 0.9, "p90": p90, "p99": p90 * 1.4, "min": p90 * 0.8, "max": p90 * 2, "mean": p90 * 0.92,
                "std": p90 * 0.05, "count": 1000}  # fmt: skip

    return {
        "schema": 1,
        "machine": {"name": "laptop", "model": "Laptop 7", "cpu": "Example CPU @ 2.0 GHz", "cores": 2, "gpu": None,
                    "architecture": "x86_64"},
        "conditions": {"threads": 1, "batch": 1, "effort": "quick", "power_mode": None,
                       "load_average": {"before": [0.4, 0.5, 0.6], "after": [0.7, 0.5, 0.6]},
                       "temperature_c": {"before": 45.0, "after": 46.0}, "clocks_mhz": None},
        "artifact": {"sha256": sha256, "precision": artifact, "runtime": "onnxruntime", "version": "1.23.0"},
        "latency_ms": {"compute": spread(p90_ms), "with_copies": None, "end_to_end": spread(p90_ms + 0.05)},
        "repeats": 3, "throughput_ips": 1000 / p90_ms,
        "energy_mj_per_inference": None, "flags": {"throttled": None, "unstable": False}, "accuracy": None,
        "started_at": "2026-01-02T03:04:05Z",
    } | changes  # fmt: skip


def build(path: Path, *, classes: list[str] | None = None, labels: npt.NDArray[np.int64] | None = None,
          ids: list[str] | None = None, right: dict[str, int] | None = None, data: str = "digits") -> Path:  # fmt: skip
    """Write the run. `right` changes how many of the test images an artifact gets right."""
    from sklearn.datasets import load_digits

    names = classes or [str(digit) for digit in range(10)]
    index = np.arange(0, TEST_IMAGES * 3, 3)
    truth = np.asarray(load_digits().target[index], dtype=np.int64) if labels is None else labels
    test_ids = ids or [f"digits/{number:04d}" for number in index[: len(truth)]]
    hits = RIGHT | (right or {})
    images = len(truth)
    arrays: dict[str, Any] = {"test_id": np.array(test_ids), "test_label": truth}
    for seed, (artifact, count) in enumerate(hits.items()):
        arrays[f"test_logits__{artifact}"] = logits_with(truth, len(names), count, seed)
    path.mkdir(parents=True)
    np.savez(path / "predictions.npz", **arrays)
    recipe = f"# a recipe\nschema: 1\nname: tiny\nseed: 0\ndata:\n  spec: {data}\n  labels: 40\n"
    (path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    for name, size in (("baseline", 310_000), ("teacher", 1_500_000), ("student", 310_000)):
        (path / f"{name}.safetensors").write_bytes(b"\0" * size)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()), encoding="utf-8")
    plan = {"memory_format": "channels-last", "threads": 2, "precision": "fp32", "compile": False}
    write(path / "manifest.json", {
        "schema": 1, "status": "finished", "stage": None, "versions": {"kdedge": "0.1.0", "torch": "2.11.0"},
        "recipe": {"name": "tiny", "data": {"spec": data}},
        "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(), "data_fingerprint": "d" * 64, "seed": 0,
        "host": {"system": "Linux-6.1", "machine": "x86_64"}, "device": "cpu", "started_at_s": 1767323045.5,
        "engine_plan": {stage: {"plan": plan, "measured": []} for stage in ("baseline", "outer", "inner")},
        "stages": {"baseline": {"sha256": "b" * 64, "seconds": 8.0, "images_per_second": 3000.0},
                   "outer": {"sha256": "c" * 64, "seconds": 30.0, "images_per_second": 3900.4},
                   "trusted": {"sha256": "e" * 64, "seconds": 1.5},
                   "inner": {"sha256": "f" * 64, "seconds": 55.5, "images_per_second": 4100.0}},
    })  # fmt: skip
    write(path / "splits.json", {"schema": 1, "classes": names, "test_is_val": False,
        "splits": {"labeled": {"count": 40, "ids": ["a"] * 40},
        "test": {"count": images, "sha256": "5" * 64, "ids": test_ids}}})  # fmt: skip
    part = {"params": 75_000, "val_accuracy": None, "seconds": 30.0}
    write(path / "result.json", {
        "schema": 1, "recipe": "tiny", "data": data, "labels": 40, "seed": 0,
        "teacher": part | {"arch": "wide-resnet", "params": 370_000, "test_accuracy": hits["teacher"] / images},
        "student": part | {"arch": "mobilenet-v2", "test_accuracy": hits["student"] / images},
        "baseline": part | {"arch": "mobilenet-v2", "test_accuracy": hits["baseline"] / images},
        "trusted": {"size": 610, "coverage": 0.485, "precision": 0.982, "per_class": [61] * 10},
        "images_per_second": {"outer": 3900.0, "inner": 4100.0}, "seconds": 95.0,
    })  # fmt: skip
    np.savez(path / "trusted.npz", index=np.arange(1257), label=np.arange(1257) % 10, confidence=np.full(1257, 0.97),
             cluster=np.arange(1257) % 10, kept=np.arange(1257) < 610,
             why=np.repeat(["kept", "low confidence", "cluster disagrees", "quota"], [610, 400, 150, 97]))  # fmt: skip
    _write_bundle(path, names, hits, images)
    return path


def proof(images: int) -> dict[str, Any]:
    """What a bundle says of its files side by side, as kdedge_export.judging.verify writes it."""

    def file(top1: float, changed: float, noise: float | None, classes: list[dict[str, Any]]) -> dict[str, Any]:
        error = {"max": 0.1, "rms": 0.02, "max_of_span": 0.01, "rms_of_span": 0.002, "sqnr_db": noise}
        return {"top1": top1, "agreement": {"disagreement_points": changed}, "logit_error": error, "classes": classes}

    moved = {"name": "3", "given": 54, "left": 2, "joined": 1, "labeled": 54, "right_before": 52, "right_after": 51}
    layers = [{"tensor": f"layer{place}", "operator": "Conv", "sqnr_db": 40.0 - place, "fall_db": 1.0}
              for place in range(12)]  # fmt: skip
    fall = {"tensor": "layer3", "operator": "Conv", "sqnr_db": 37.0, "fall_db": 9.0}
    found = {"images": 4, "threshold_db": 10.0, "first_to_diverge": None, "steepest_fall": fall, "layers": layers}
    files = {"fp32": file(517 / 540, 0.0, None, []), "int8": file(516 / 540, 0.19, 31.4, [moved])}
    return {"reference": "fp32", "split": "test", "images": images, "files": files, "layers": {"int8": found}}


def quantization() -> dict[str, Any]:
    way = {"images": 400, "disagreement_points": 0.25, "divergence": 0.0012}
    cure = {"cure": "bias correction", "kept": True, "divergence": [0.002, 0.0012], "disagreement_points": [0, 0]}
    return {
        "schema": 2, "chosen": "cured", "ways": {"calibrated": way | {"divergence": 0.002}, "cured": way},
        "cures": [cure], "images": {"from": "calibration", "count": 256, "sha256": "7" * 64},
        "sensitivity": [{"layer": f"backbone.layer{place}", "divergence": 0.01 / (place + 1), "nodes": []}
                        for place in range(15)],
        "fallback": {"held": True, "left_float": ["backbone.layer0"], "why": "1 of 15 layers is in float."},
    }  # fmt: skip


def _write_bundle(path: Path, names: list[str], hits: dict[str, int], images: int) -> None:
    bundle, artifacts = path / "bundle", {}
    bundle.mkdir()
    for artifact, file, size in (("fp32", "model.onnx", 305_000), ("int8", "model.int8.onnx", 98_304)):
        (bundle / file).write_bytes(artifact.encode() * (size // 4))
        content = (bundle / file).read_bytes()
        artifacts[artifact] = {"file": file, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content),
                               "accuracy": hits[artifact] / images, "precision": artifact,
                               "runtime": "onnxruntime", "golden_tolerance": 0.1}  # fmt: skip
    write(bundle / "manifest.json", {
        "schema": 1, "artifacts": artifacts, "classes": names, "files": {}, "shipped": "int8",
        "input": {"name": "input", "shape": ["batch", 1, 8, 8], "dtype": "float32", "layout": "NCHW"},
        "preprocess": {"height": 8, "width": 8, "channels": 1, "resize": "short-side-crop",
                       "mean": [0.3], "std": [0.38]},
        "provenance": {"run": path.name},
    })  # fmt: skip
    write(bundle / "gate.json", {"schema": 1, "shipped": "int8", "targets": {"onnxruntime-cpu": {
        "shipped": "int8", "speedup": 2.15, "drop_points": 0.19, "drop_points_interval": [0.05, 0.9], "verdict": "pass",
        "why": "INT8 is shipped: it runs at 2.15 times the speed of FP32 here, and it gives another class "
               "for 0.19 of 100 gate images."}}})  # fmt: skip
    write(bundle / "proof.json", proof(images))
    write(bundle / "quantization.json", quantization())
    for artifact, p90 in LATENCY_P90_MS.items():
        write(path / "bench" / f"example-cpu-{artifact}.json", record(artifact, artifacts[artifact]["sha256"], p90))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual run, for tests that only read it."""
    return build(tmp_path_factory.mktemp("runs") / "tiny-digits-40-s0")


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(name: str = "tiny-digits-40-s0", **options: Any) -> Path:
        return build(tmp_path / name, **options)

    return make
