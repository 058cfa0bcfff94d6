"""Everything a run folder says of itself, read once: what is missing is None, and `missing` says how to get it.

N is the number of test images, K the number of classes.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdedge.errors import RunError
from kdedge.runs import Run, read_json
from kdedge_bench.records import Record, measured_under, model_sha256, one_image, read_records

__all__ = ["Facts", "array_file", "read_facts"]

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Facts:
    """One run as its files tell it. Documents keep the layout of the contract."""

    run: Run
    manifest: dict[str, Any]
    result: dict[str, Any] | None = None
    splits: dict[str, Any] | None = None
    metrics: tuple[dict[str, Any], ...] = ()
    predictions: Arrays = field(default_factory=dict)
    trusted: Arrays = field(default_factory=dict)
    bundle: dict[str, Any] | None = None
    gate: dict[str, Any] | None = None
    proof: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    records: tuple[Record, ...] = ()  # the measurements of the bundle's files as they are now, newest first
    stale_records: int = 0  # measurements of files that were exported again since

    @property
    def name(self) -> str:
        """The folder's name, the handle everybody knows a run by."""
        return self.run.path.resolve().name

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits; numbers where nobody wrote them down."""
        for document in (self.bundle, self.splits):
            names = (document or {}).get("classes") or (document or {}).get("class_names")
            if isinstance(names, list) and names:
                return tuple(str(name) for name in names)
        widths = [logits.shape[1] for key, logits in self.predictions.items() if "logits" in key and logits.ndim == 2]
        return tuple(str(index) for index in range(widths[0])) if widths else ()

    @property
    def test_labels(self) -> npt.NDArray[np.int64] | None:
        """int64 [N], or None where no test image has a known class."""
        labels = self.predictions.get("test_label")
        if labels is None or not labels.size or bool((labels < 0).all()):
            return None
        return np.asarray(labels, dtype=np.int64)

    def logits(self, artifact: str) -> npt.NDArray[np.float32] | None:
        """float32 [N, K] of `artifact` on the test images."""
        found = self.predictions.get(f"test_logits__{artifact}")
        return None if found is None else np.asarray(found, dtype=np.float32)

    def right(self, artifact: str) -> npt.NDArray[np.bool_] | None:
        """bool [N]: is the largest logit that of the true class? Images of unknown class are left out."""
        labels, logits = self.test_labels, self.logits(artifact)
        if labels is None or logits is None or len(labels) != len(logits):
            return None
        known = labels >= 0
        return np.asarray(logits[known].argmax(1) == labels[known], dtype=np.bool_)

    @property
    def test_images(self) -> int | None:
        """How many test images have a known class: what the accuracies are shares of."""
        if self.test_labels is not None:
            return int((self.test_labels >= 0).sum())
        scored = ((self.bundle or {}).get("accuracy") or {}).get("images")
        return scored or _split_size(self.splits, "test")

    @property
    def artifacts(self) -> Mapping[str, Any]:
        """What the bundle says of each file; empty before an export."""
        return (self.bundle or {}).get("artifacts") or {}

    @property
    def newest(self) -> Record | None:
        """The measurement whose conditions stand for the run's: the newest of one image at a time, if there is one."""
        return next((each for each in self.records if one_image(each)), next(iter(self.records), None))

    def measured(self, artifact: str) -> tuple[Record, ...]:
        """All measurements of `artifact`, newest first."""
        sha256 = str(self.artifacts.get(artifact, {}).get("sha256"))
        return tuple(each for each in self.records if model_sha256(each) == sha256)

    def record(self, artifact: str) -> Record | None:
        """The newest of `artifact` under the conditions of `newest`, so that rows of a table are comparable.

        In the file's own runtime: a row that says no runtime is not of another.
        """
        own, newest = self.artifacts.get(artifact, {}).get("runtime"), self.newest
        found = (each for each in self.measured(artifact) if one_image(each) and own == each["artifact"].get("runtime"))
        return next((each for each in found if newest and measured_under(each) == measured_under(newest)), None)


def read_facts(run: Run) -> Facts:
    """Read what is there. RunError where a file is damaged; a file that is absent is no error."""
    bundle = _optional_json(run.bundle_path / "manifest.json")
    records, stale = read_records(run.bench_path, bundle)
    return Facts(
        run=run,
        manifest=run.read_manifest(),
        result=_optional_json(run.result_path),
        splits=_optional_json(run.splits_path),
        metrics=_read_metrics(run.metrics_path),
        predictions=array_file(run.predictions_path),
        trusted=array_file(run.trusted_path),
        bundle=bundle,
        gate=_optional_json(run.bundle_path / "gate.json"),
        proof=_optional_json(run.bundle_path / "proof.json"),
        quantization=_optional_json(run.bundle_path / "quantization.json"),
        records=records,
        stale_records=stale,
    )


def array_file(path: Path) -> Arrays:
    """The arrays of an .npz, read without pickle; empty where the file is absent, RunError where it is damaged."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} cannot be read as arrays: {error}. It was damaged or not written by kdedge.") from error


def _optional_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    document = read_json(path)
    if not isinstance(document, dict):
        raise RunError(f"{path} holds a {type(document).__name__}; a JSON object was expected. It was altered.")
    return document


def _read_metrics(path: Path) -> tuple[dict[str, Any], ...]:
    """The lines of metrics.jsonl. A last line cut short by a kill is dropped: the run went on after it."""
    if not path.is_file():
        return ()
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise RunError(f"{path}, line {number}, cannot be read as JSON: {error}.") from error
        if isinstance(entry, dict):
            found.append(entry)
    return tuple(found)


def _split_size(splits: Mapping[str, Any] | None, name: str) -> int | None:
    """Number of images of a split as splits.json says; None where it has none."""
    count = (((splits or {}).get("splits") or {}).get(name) or {}).get("count")
    return count if isinstance(count, int) and count > 0 else None
