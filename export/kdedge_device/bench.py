"""Latency of one model in this process: the session's run alone, and the whole way from an encoded image to logits.

One process measures one artifact. Two sessions in one process share its thread pool and caches and spoil each other.
"""

import os
from io import BytesIO
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import numpy as np

from kdedge_device.clock import Effort, measure, summarize, unstable
from kdedge_device.evaluate import input_of
from kdedge_device.failures import Failure
from kdedge_device.manifest import Bundle, sha256_file
from kdedge_device.preprocess import Preprocess
from kdedge_device.record import load_average, now, record
from kdedge_device.runners import OrtRunner
from kdedge_device.trt_bundle import open_engine
from kdedge_device.trt_runner import TrtRunner

__all__ = ["Subject", "bench", "open_subject"]


Runner = Union[OrtRunner, TrtRunner]


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
        if file.endswith(".engine"):
            return _around(bundle, path, None)
        for name, entry in bundle.artifacts.items():
            if entry["file"] == file:
                return _from_bundle(bundle, name)
    return Subject(path, None, None, None, [])


def _from_bundle(bundle: Bundle, name: str) -> Subject:
    entry = bundle.artifacts[name]
    engine = entry.get("runtime") == TrtRunner.runtime
    path = open_engine(bundle, name).model_path if engine else bundle.model_path(name)
    return _around(bundle, path, entry.get("precision"))


def _around(bundle: Bundle, path: str, precision: Optional[str]) -> Subject:
    """A model or engine with its bundle's preprocessing and images."""
    images = bundle.golden()["images"] if "golden.npz" in bundle.document["files"] else None
    return Subject(path, precision, bundle.preprocess, images, bundle.classes)


def bench(subject: Subject, effort: Effort, effort_name: str, threads: int = 1, batch: int = 1) -> Dict[str, Any]:
    """The record of `subject`. End to end is null without Pillow or without the images of a bundle."""
    if batch < 1:
        raise Failure(f"A batch of {batch} was asked for; at least 1 is needed.")
    started_at, load_before = now(), load_average()
    with _runner(subject, threads) as runner:
        inputs = _inputs(subject, runner, batch)
        compute, with_copies = _latencies(runner, inputs, effort)
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
            "precision": subject.precision or _precision(runner),
            "runtime": runner.runtime,
            "version": version,
        },
        latency_ms={"compute": compute, "with_copies": with_copies, "end_to_end": end_to_end},
        conditions={
            "threads": threads if isinstance(runner, OrtRunner) else None,
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


def _runner(subject: Subject, threads: int) -> Runner:
    return (
        TrtRunner(subject.model_path)
        if subject.model_path.endswith(".engine")
        else OrtRunner(subject.model_path, threads)
    )


def _precision(runner: Runner) -> Optional[str]:
    """Of an engine, from its side file; a bare ONNX file does not say."""
    return runner.precision if isinstance(runner, TrtRunner) else None


def _latencies(
    runner: Runner, inputs: List["np.ndarray[Any, Any]"], effort: Effort
) -> Tuple[Dict[str, Any], Optional[Dict[str, Any]]]:
    """(compute, with copies). On a CPU nothing is copied, so there is no second number."""
    if isinstance(runner, OrtRunner):
        return summarize(measure(lambda i: runner.run(inputs[i % len(inputs)]), effort)), None
    runner.put(inputs[0])
    compute = summarize(measure(lambda i: runner.compute(), effort))
    return compute, summarize(measure(lambda i: runner.run(inputs[i % len(inputs)]), effort))


def _inputs(subject: Subject, runner: Runner, batch: int) -> List["np.ndarray[Any, Any]"]:
    """A few different batches, so that no cache is flattered by one input only."""
    if subject.preprocess is not None and subject.images is not None:
        values = input_of(runner, subject.preprocess, subject.images)
        return [
            np.ascontiguousarray(np.take(values, range(i, i + batch), axis=0, mode="wrap")) for i in range(len(values))
        ]
    shape = [batch] + runner.input_shape[1:]
    if len(shape) != 4 or not all(isinstance(size, int) for size in shape):
        raise Failure(
            f"{subject.model_path} takes an input of shape {runner.input_shape}; "
            "[batch, C, H, W], or [batch, H, W, C] of pixels, with only the batch left open was expected."
        )
    rng = np.random.RandomState(0)
    if runner.takes_pixels:
        return [rng.randint(0, 256, shape).astype(np.uint8) for _ in range(8)]
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


def _whole(subject: Subject, runner: Runner, encoded: bytes) -> "np.ndarray[Any, Any]":
    assert subject.preprocess is not None
    return runner.run(input_of(runner, subject.preprocess, subject.preprocess.decode(encoded)[None]))
