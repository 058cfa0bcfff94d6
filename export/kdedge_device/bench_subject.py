"""What is measured: a model file or an engine, and the inputs that it is given.

A pool of 64 different samples goes round, so that no cache is flattered by one input that is always the same.
"""

import os
from io import BytesIO
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np

from kdedge_device.choose_runner import Runner, only_engines
from kdedge_device.evaluate import input_of
from kdedge_device.failures import Failure
from kdedge_device.manifest import Bundle
from kdedge_device.openvino_runner import OpenVinoRunner, artifact_for_openvino
from kdedge_device.preprocess import Preprocess
from kdedge_device.runners import OrtRunner
from kdedge_device.trt import Here, load_tensorrt
from kdedge_device.trt_bundle import ENGINES, open_engine, open_precision, source_artifact
from kdedge_device.trt_launch import PLAIN, Access
from kdedge_device.trt_runner import TrtRunner

__all__ = ["POOL", "Pool", "Runner", "Subject", "encoded", "input_pool", "open_subject", "runner_of"]

POOL = 64
_POOL_BYTES = 256 << 20  # a board with 4 GB has little more to spare


class Subject(NamedTuple):
    """A model file, and where it lies in a bundle also its preprocessing and golden images.

    `name` is the artifact's; `expected` the fingerprint that an engine has to have, and `here` the machine it fits.
    """

    model_path: str
    precision: Optional[str]
    preprocess: Optional[Preprocess]
    images: Optional["np.ndarray[Any, Any]"]  # uint8 [n, H, W, C]
    classes: List[str]
    name: Optional[str] = None
    expected: Optional[Dict[str, Any]] = None
    here: Optional[Here] = None
    openvino: bool = False


class Pool(NamedTuple):
    """`batches` as the runner takes them; how many of their samples are different; and where they come from."""

    batches: "List[np.ndarray[Any, Any]]"
    samples: int
    source: str


def open_subject(
    path: str,
    artifact: Optional[str] = None,
    batch: int = 1,
    tensorrt: bool = False,
    engines: Optional[str] = None,
    openvino: bool = False,
) -> Subject:
    """A bundle folder (its shipped artifact, or the one named) or a model file, with the bundle around it if any.

    `tensorrt`: `artifact` names a precision, whose engine for this machine is taken, from the folder `engines` first;
    without one the first that is there of INT8, FP16 and FP32. So is done too where there are engines and nothing was
    named, but ONNX Runtime is not installed. `openvino`: that runs it.
    """
    if openvino:
        return _for_openvino(path, artifact, batch)
    if os.path.isdir(path):
        bundle = Bundle(path)
        if tensorrt or (artifact is None and only_engines(bundle)):
            return _engine(bundle, artifact, batch, engines)
        return _from_bundle(bundle, bundle.artifact(artifact), batch)
    if artifact is not None or tensorrt:
        raise Failure(f"{path} is no bundle folder; --artifact and --runtime choose among what one holds.")
    if not os.path.isfile(path):
        raise Failure(f"{path} does not exist; a bundle folder or an .onnx file was expected.")
    folder, file = os.path.split(os.path.abspath(path))
    if os.path.isfile(os.path.join(folder, "manifest.json")):
        bundle = Bundle(folder)
        if file.endswith(".engine"):
            return _around(bundle, path, None)
        for name, entry in bundle.artifacts.items():
            if entry["file"] == file:
                return _from_bundle(bundle, name, batch)
    return Subject(path, None, None, None, [])


def _from_bundle(bundle: Bundle, name: str, batch: int) -> Subject:
    entry = bundle.artifacts[name]
    if entry.get("runtime") != TrtRunner.runtime:
        return _around(bundle, bundle.model_path(name), entry.get("precision"))._replace(name=name)
    here = load_tensorrt()
    return _built(bundle, open_engine(bundle, name, here, batch=batch), here, name)


def _for_openvino(path: str, artifact: Optional[str], batch: int) -> Subject:
    if not os.path.isdir(path):
        return open_subject(path, artifact, batch)._replace(openvino=True)
    bundle = Bundle(path)
    name = artifact_for_openvino(bundle, artifact)
    subject = _around(bundle, bundle.model_path(name), bundle.artifacts[name].get("precision"))
    return subject._replace(name=name, openvino=True)


def _engine(bundle: Bundle, named: Optional[str], batch: int, folder: Optional[str]) -> Subject:
    if named is not None and named not in ENGINES:
        raise Failure(f"There is no engine '{named}'; --artifact takes one of {', '.join(ENGINES)}.")
    here = load_tensorrt()
    reasons = []
    for precision in ("int8", "fp16", "fp32") if named is None else (ENGINES[named],):
        try:
            runner = open_precision(bundle, precision, here, batch=batch, folder=folder)
            name = source_artifact(bundle, precision, here) if precision == "int8" else precision
            return _built(bundle, runner, here, name)
        except Failure as error:
            reasons.append(error)
    raise reasons[0]


def _built(bundle: Bundle, runner: TrtRunner, here: Here, name: str) -> Subject:
    subject = _around(bundle, runner.model_path, None)
    return subject._replace(name=name, expected=runner.expected, here=here)


def _around(bundle: Bundle, path: str, precision: Optional[str]) -> Subject:
    """A model or engine with its bundle's preprocessing and images."""
    images = bundle.golden()["images"] if "golden.npz" in bundle.document["files"] else None
    return Subject(path, precision, bundle.preprocess, images, bundle.classes)


def runner_of(subject: Subject, threads: int = 1, access: Access = PLAIN) -> Runner:
    if subject.model_path.endswith(".engine"):
        return TrtRunner(subject.model_path, subject.here, subject.expected, access)
    if subject.openvino:
        return OpenVinoRunner(subject.model_path, threads)
    return OrtRunner(subject.model_path, threads)


def _samples(images: "np.ndarray[Any, Any]", start: int, count: int) -> "np.ndarray[Any, Any]":
    """`count` of the endless row of images uint8 [n, H, W, C] that begins with those: then each moved aside by one."""
    numbers = range(start, start + count)
    return np.stack([np.roll(images[number % len(images)], number // len(images), axis=1) for number in numbers])


def input_pool(subject: Subject, runner: Runner, batch: int) -> Pool:
    """At least POOL samples, as far as they fit into 256 MiB; at least two batches."""
    shape = [batch] + runner.input_shape[1:]
    if len(shape) != 4 or not all(isinstance(size, int) for size in shape):
        raise Failure(
            f"{subject.model_path} takes an input of shape {runner.input_shape}; "
            "[batch, C, H, W], or [batch, H, W, C] of pixels, with only the batch left open was expected."
        )
    if isinstance(runner.input_shape[0], int) and runner.input_shape[0] != batch:
        raise Failure(
            f"{subject.model_path} takes batches of {runner.input_shape[0]} only; use --batch {runner.input_shape[0]}."
        )
    bytes_each = int(np.prod(shape)) * (1 if runner.takes_pixels else 4)
    count = max(2, min(-(-POOL // batch), _POOL_BYTES // bytes_each))
    if subject.preprocess is not None and subject.images is not None and len(subject.images):
        pixels = (_samples(subject.images, i * batch, batch) for i in range(count))
        batches = [np.ascontiguousarray(input_of(runner, subject.preprocess, each)) for each in pixels]
        source = "golden images"
    else:
        rng = np.random.RandomState(0)
        batches = [_random(rng, shape, runner.takes_pixels) for _ in range(count)]
        source = "random numbers"
    return Pool(batches, len({sample.tobytes() for each in batches for sample in each}), source)


def _random(rng: "np.random.RandomState", shape: List[int], pixels: bool) -> "np.ndarray[Any, Any]":
    return rng.randint(0, 256, shape).astype(np.uint8) if pixels else rng.standard_normal(shape).astype(np.float32)


def encoded(subject: Subject) -> List[bytes]:
    """POOL images as PNG, at the input's size; none without Pillow, or without images of a bundle."""
    if subject.preprocess is None or subject.images is None or not len(subject.images):
        return []
    try:
        from PIL import Image
    except ImportError:
        return []
    files = []
    for image in _samples(subject.images, 0, POOL):
        buffer = BytesIO()
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG", compress_level=1)
        files.append(buffer.getvalue())
    return files
