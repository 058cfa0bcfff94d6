"""Latency of one model in this process: the session's run alone, and the whole way from an encoded image to logits.

One process measures one artifact. Two sessions in one process share its thread pool and caches and spoil each other.
"""

import os
from io import BytesIO
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np

from kdedge_device.clock import Effort, measure, summarize, unstable
from kdedge_device.failures import Failure
from kdedge_device.manifest import Bundle, sha256_file
from kdedge_device.preprocess import Preprocess
from kdedge_device.record import load_average, now, record
from kdedge_device.runners import OrtRunner

__all__ = ["Subject", "bench", "open_subject"]


class Subject(NamedTuple):
    """What is measured: a model file, and where it lies in a bundle also its preprocessing and golden images."""

    model_path: str
    precision: Optional[str]
    preprocess: Optional[Preprocess]
    images: Optional["np.ndarray[Any, Any]"]  # uint8 [n, H, W, C]
    classes: List[str]


def open_subject(path: str, artifact: Optional[str] = None) -> Subject:
    """A bundle folder (its shipped artifact, or the one named) or a model file, with the bundle around it if any."""
    if os.path.isdir(path):
        bundle = Bundle(path)
        return _from_bundle(bundle, bundle.artifact(artifact))
    if artifact is not None:
        raise Failure(f"{path} is a file; --artifact names one of a bundle folder.")
    if not os.path.isfile(path):
        raise Failure(f"{path} does not exist; a bundle folder or an .onnx file was expected.")
    folder, file = os.path.split(os.path.abspath(path))
    if os.path.isfile(os.path.join(folder, "manifest.json")):
        bundle = Bundle(folder)
        for name, entry in bundle.artifacts.items():
            if entry["file"] == file:
                return _from_bundle(bundle, name)
    return Subject(path, None, None, None, [])


def _from_bundle(bundle: Bundle, name: str) -> Subject:
    images = bundle.golden()["images"] if "golden.npz" in bundle.document["files"] else None
    precision = bundle.artifacts[name].get("precision")
    return Subject(bundle.model_path(name), precision, bundle.preprocess, images, bundle.classes)


def bench(subject: Subject, effort: Effort, effort_name: str, threads: int = 1, batch: int = 1) -> Dict[str, Any]:
    """The record of `subject`. End to end is null without Pillow or without the images of a bundle."""
    if batch < 1:
        raise Failure(f"A batch of {batch} was asked for; at least 1 is needed.")
    started_at, load_before = now(), load_average()
    with OrtRunner(subject.model_path, threads) as runner:
        inputs = _inputs(subject, runner, batch)
        compute = summarize(measure(lambda i: runner.run(inputs[i % len(inputs)]), effort))
        encoded = _encoded(subject) if batch == 1 else []
        end_to_end = (
            summarize(measure(lambda i: _whole(subject, runner, encoded[i % len(encoded)]), effort))
            if encoded
            else None
        )
        version = runner.version
    return record(
        artifact={
            "file": os.path.basename(subject.model_path),
            "sha256": sha256_file(subject.model_path),
            "bytes": os.path.getsize(subject.model_path),
            "precision": subject.precision,
            "runtime": OrtRunner.runtime,
            "version": version,
        },
        latency_ms={"compute": compute, "end_to_end": end_to_end},
        conditions={
            "threads": threads,
            "batch": batch,
            "effort": effort_name,
            "load_average": {"before": load_before, "after": load_average()},
            "input_shape": list(inputs[0].shape),
            "inputs": "golden images" if subject.images is not None else "random numbers",
            "end_to_end_from": "PNG bytes in memory, at the input's size" if encoded else None,
        },
        started_at=started_at,
        unstable=unstable(compute),
        throughput_ips=batch * 1e3 / compute["mean"],
    )


def _inputs(subject: Subject, runner: OrtRunner, batch: int) -> List["np.ndarray[Any, Any]"]:
    """A few different batches, so that no cache is flattered by one input only."""
    if subject.preprocess is not None and subject.images is not None:
        values = subject.preprocess.normalize(subject.images)
        return [
            np.ascontiguousarray(np.take(values, range(i, i + batch), axis=0, mode="wrap")) for i in range(len(values))
        ]
    shape = [batch] + runner.input_shape[1:]
    if len(shape) != 4 or not all(isinstance(size, int) for size in shape):
        raise Failure(
            f"{subject.model_path} takes an input of shape {runner.input_shape}; "
            "[batch, C, H, W] with only the batch left open was expected."
        )
    rng = np.random.RandomState(0)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(8)]


def _encoded(subject: Subject) -> List[bytes]:
    if subject.preprocess is None or subject.images is None:
        return []
    try:
        from PIL import Image
    except ImportError:
        return []
    files = []
    for image in subject.images:
        buffer = BytesIO()
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def _whole(subject: Subject, runner: OrtRunner, encoded: bytes) -> "np.ndarray[Any, Any]":
    assert subject.preprocess is not None
    return runner.run(subject.preprocess.normalize(subject.preprocess.decode(encoded)[None]))
