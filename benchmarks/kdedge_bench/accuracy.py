"""Accuracy of the very file that was measured: on the run's own test images, else on the images that a bundle carries.

Scored once for the same bytes, images and runtime, and kept in the user's cache. What cannot be scored is null and said
so, never taken from elsewhere.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from kdedge.errors import KdedgeError, RunError
from kdedge.runs import Run, read_json, write_json
from kdedge_bench.records import Record
from kdedge_device.bench_subject import Runner
from kdedge_device.choose_runner import open_runner
from kdedge_device.evaluate import checked_logits, evaluate
from kdedge_device.failures import Failure
from kdedge_device.manifest import Bundle, sha256_file
from kdedge_device.record import cores_available

__all__ = ["Exam", "accuracy_of", "carried_exam", "exams_of", "keep", "kept", "scores_folder", "told"]

CHUNK = 256  # images in memory at a time
Say = Callable[[str], None]
Accuracy = dict[str, Any]


@final
@dataclass(frozen=True)
class Exam:
    """The images that files of a bundle are scored on. `run`: whose test split it is; None: the bundle's eval.npz.

    `sha256`: of that file, or of the names of a run's images, whose pixels and labels are in `fingerprint`.
    """

    bundle: Path
    split: str
    sha256: str
    run: Path | None = None
    fingerprint: str | None = None


def scores_folder() -> Path:
    """Where scores are kept, whatever they were measured for: in KDEDGE_CACHE, else in ~/.cache/kdedge."""
    return Path(os.environ.get("KDEDGE_CACHE") or "~/.cache/kdedge").expanduser() / "scored"


def exams_of(path: Path) -> list[Exam]:
    """Of a bundle's folder, or of a model file in one, the best first; none where it has no labelled images."""
    folder = path if path.is_dir() else path.parent
    if not (folder / "manifest.json").is_file():
        return []
    return [exam for exam in (_test_exam(folder), carried_exam(folder)) if exam is not None]


def _test_exam(folder: Path) -> Exam | None:
    """The test images of the run that a bundle lies in; None where it is in none, or the run cannot say."""
    run = Run(folder.parent)
    if folder.name != run.bundle_path.name or not run.splits_path.is_file():
        return None
    try:
        splits = read_json(run.splits_path)
        test = splits["splits"]["test"]
        count, sha256, fingerprint = test["count"], test["sha256"], splits.get("fingerprint")
    except (RunError, KeyError, TypeError):
        return None
    split = "val" if splits.get("test_is_val") else "test"
    return Exam(folder, split, str(sha256), run.path, fingerprint) if count and sha256 else None


def carried_exam(folder: Path) -> Exam | None:
    """The labelled images in a bundle, its eval.npz; None where it has none."""
    try:
        entry = Bundle(folder).document["files"].get("eval.npz")
    except Failure:
        return None
    return None if entry is None else Exam(folder, "eval", str(entry["sha256"]))


def accuracy_of(record: Record, path: Path, say: Say) -> Accuracy | None:
    """{"value", "correct", "images", "split", "sha256"} of the file that `record` names, which lies in or at `path`.

    None without labelled images, and where the file is no longer the one that was measured.
    """
    for exam in exams_of(path):
        found = kept(record, exam)
        if found is None:
            try:
                found = _scored(record, exam, say)
            except (KdedgeError, Failure) as error:
                say(f"{record['artifact']['name']} is not scored on the {exam.split} images: {error}")
                continue
            keep(record, exam, found)
        return found
    return None


def kept(record: Record, exam: Exam) -> Accuracy | None:
    """What was found before for the same bytes, images, runtime and machine."""
    path = _path(record, exam)
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(document, dict) and document.get("of") == _key(record, exam)
    return document.get("accuracy") if same else None


def keep(record: Record, exam: Exam, found: Accuracy) -> None:
    """Where the cache cannot be written, it is scored again the next time."""
    with contextlib.suppress(RunError):
        write_json(_path(record, exam), {"schema": 1, "of": _key(record, exam), "accuracy": found})


def _key(record: Record, exam: Exam) -> dict[str, Any]:
    """Another processor or runtime adds in another order, and may give another class."""
    artifact = record["artifact"]
    return {
        "sha256": artifact["sha256"],
        "images_sha256": exam.sha256,
        "data_fingerprint": exam.fingerprint,
        "runtime": artifact.get("runtime"),
        "version": artifact.get("version"),
        "machine": record["machine"].get("name"),
    }


def _path(record: Record, exam: Exam) -> Path:
    artifact = record["artifact"]
    runtime = f"{artifact.get('runtime')}-{record['machine'].get('architecture')}"
    return scores_folder() / f"{str(artifact['sha256'])[:16]}-{exam.sha256[:16]}-{runtime}.json"


def _scored(record: Record, exam: Exam, say: Say) -> Accuracy:
    """Failure where the file of the bundle is another one by now."""
    artifact = record["artifact"]
    bundle = Bundle(exam.bundle)
    runtime = None if artifact.get("runtime") == "onnxruntime" else str(artifact.get("runtime"))
    name = str(artifact["precision"]) if runtime == "tensorrt" else _artifact(bundle, str(artifact["sha256"]))
    if exam.run is None:
        say(f"Scoring {artifact['name']} on the bundle's eval images; kept for the next time")
        found = evaluate(bundle, None, name, cores_available(), runtime)
        _same(str(found["sha256"]), artifact)
        return told(found["correct"], found["images"], exam)
    with open_runner(bundle, name, cores_available(), runtime) as runner:
        _same(sha256_file(runner.model_path), artifact)
        correct, images = _on_test(bundle, runner, exam.run, str(artifact["name"]), say)
    return told(correct, images, exam)


def _artifact(bundle: Bundle, sha256: str) -> str:
    for name, entry in bundle.artifacts.items():
        if entry["sha256"] == sha256:
            return name
    raise Failure(f"no file of {bundle.path} has the sha256 {sha256[:12]}... that was measured; it was exported again.")


def _same(sha256: str, artifact: Mapping[str, Any]) -> None:
    if sha256 != artifact["sha256"]:
        raise Failure(f"the file is {sha256[:12]}... now, and {str(artifact['sha256'])[:12]}... was measured.")


def _on_test(bundle: Bundle, runner: Runner, run: Path, name: str, say: Say) -> tuple[int, int]:
    """(right, images) of the test images whose class is known."""
    part = _test_of(run)
    known = part.labels >= 0
    if not known.any():
        raise Failure("the class of no test image is known.")
    say(f"Scoring {name} on {int(known.sum()):,} test images; kept for the next time")
    correct = start = 0
    for images in part.chunks(bundle.preprocess, CHUNK):
        labels = part.labels[start : start + len(images)]
        guesses = checked_logits(bundle, runner, images).argmax(1)
        correct += int(((guesses == labels) & (labels >= 0)).sum())
        start += len(images)
    return correct, int(known.sum())


@functools.lru_cache(maxsize=1)
def _test_of(run: Path) -> Any:
    """Opened once for all files of a run: looking through a large folder takes seconds."""
    from kdedge_export.images import open_run_images  # with it comes torch, which a kept result does not need

    return open_run_images(Run(run)).test


def told(correct: int, images: int, exam: Exam) -> Accuracy:
    """What a record says."""
    return {
        "value": correct / images,
        "correct": correct,
        "images": images,
        "split": exam.split,
        "sha256": exam.sha256,
    }
