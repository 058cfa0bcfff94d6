"""What a bundle says of images: predictions, accuracy over labelled ones, and whether it answers as it did at export.

N images, H x W x C each, K classes.
"""

import os
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from kdedge_device.failures import BudgetFailure, CorruptFailure, DeviceFailure, Failure, RuntimeFailure, VersionFailure
from kdedge_device.manifest import Bundle
from kdedge_device.preprocess import ImageUnreadable, Preprocess
from kdedge_device.runners import OrtRunner
from kdedge_device.trt_bundle import has_engines, open_engine
from kdedge_device.trt_runner import TrtRunner

__all__ = ["check", "evaluate", "input_of", "logits_of", "open_runner", "predict"]

Runner = Union[OrtRunner, TrtRunner]
BATCH = 32


def logits_of(runner: Runner, preprocess: Preprocess, images: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """float32 [N, K] of uint8 [N, H, W, C], N above 0, in batches of BATCH."""
    batches = (images[i : i + BATCH] for i in range(0, len(images), BATCH))
    return np.concatenate([runner.run(input_of(runner, preprocess, batch)) for batch in batches])


def input_of(runner: Runner, preprocess: Preprocess, images: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """What `runner` takes for uint8 [N, H, W, C]: those, or float32 [N, C, H, W], as its file says."""
    return images if runner.takes_pixels else preprocess.normalize(images)


def open_runner(bundle: Bundle, artifact: Optional[str] = None, threads: int = 1) -> Runner:
    """A runner of an artifact, the shipped one unless named: ONNX Runtime, or the engine built from it on this machine.

    RuntimeFailure where the runtime, or the engine, is not here.
    """
    name = bundle.artifact(artifact)
    if _runtime(bundle, name) == "tensorrt" and has_engines(bundle):
        return open_engine(bundle, name)
    why = _not_run_here(bundle, name)
    if why:
        runnable = ", ".join(sorted(each for each in bundle.artifacts if not _not_run_here(bundle, each)))
        raise RuntimeFailure(f"The artifact '{name}' cannot be run by ONNX Runtime: {why}. It runs: {runnable}.")
    return OrtRunner(bundle.model_path(name), threads)


def _runtime(bundle: Bundle, name: str) -> str:
    return str(bundle.artifacts[name].get("runtime", OrtRunner.runtime))


def _not_run_here(bundle: Bundle, name: str) -> str:
    """Why an artifact is not for ONNX Runtime; empty where it is. A TensorRT file would load, and be slow or wrong."""
    runtime = _runtime(bundle, name)
    if runtime == OrtRunner.runtime:
        return ""
    if runtime == "tensorrt":
        return "it needs TensorRT and an engine, which `python run.pyz build` makes"
    return f"it needs {runtime}"


def softmax(logits: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def predict(
    bundle: Bundle, paths: Sequence[str], artifact: Optional[str] = None, threads: int = 1
) -> List[Dict[str, Any]]:
    """One document per path: {path, class, probability, top: [[class, probability] x 5]}, or {path, error}."""
    answers: List[Dict[str, Any]] = []
    with open_runner(bundle, artifact, threads) as runner:
        for path in paths:
            try:
                image = bundle.preprocess.decode(path)
            except ImageUnreadable as error:
                answers.append({"path": path, "error": error.reason})
                continue
            probs = softmax(logits_of(runner, bundle.preprocess, image[None])[0])
            top = [[bundle.classes[k], float(probs[k])] for k in np.argsort(-probs, kind="stable")[:5]]
            answers.append({"path": path, "class": top[0][0], "probability": top[0][1], "top": top})
    return answers


def evaluate(bundle: Bundle, data: str, artifact: Optional[str] = None, threads: int = 1) -> Dict[str, Any]:
    """Accuracy on a folder of class folders, or on an .npz with `images` uint8 [N, h, w, C] and `labels` [N].

    {artifact, accuracy, images, correct, per_class: {class: [correct, images]}, unreadable: [{path, error}]}.
    """
    name = bundle.artifact(artifact)
    unreadable: List[Dict[str, str]] = []
    counts = {cls: [0, 0] for cls in bundle.classes}
    with open_runner(bundle, name, threads) as runner:
        for images, labels in _batches(_labelled(bundle, data, unreadable)):
            hits = logits_of(runner, bundle.preprocess, images).argmax(1) == labels
            for label, hit in zip(labels, hits):
                counts[bundle.classes[label]][0] += int(hit)
                counts[bundle.classes[label]][1] += 1
    correct = sum(pair[0] for pair in counts.values())
    total = sum(pair[1] for pair in counts.values())
    if total == 0:
        raise Failure(f"No image of {data} could be read ({len(unreadable)} unreadable).")
    return {
        "artifact": name,
        "accuracy": correct / total,
        "images": total,
        "correct": correct,
        "per_class": counts,
        "unreadable": unreadable,
    }


def _labelled(
    bundle: Bundle, data: str, unreadable: List[Dict[str, str]]
) -> Iterator[Tuple["np.ndarray[Any, Any]", int]]:
    if os.path.isfile(data):
        yield from _from_arrays(bundle, data)
        return
    if not os.path.isdir(data):
        raise Failure(f"{data} does not exist; a folder of class folders or an .npz was expected.")
    folders = sorted(entry for entry in os.listdir(data) if os.path.isdir(os.path.join(data, entry)))
    strange = [folder for folder in folders if folder not in bundle.classes]
    if strange or not folders:
        raise Failure(
            "{} has the class folders {}; only those the model knows were expected: {}.".format(
                data, strange or "(none)", bundle.classes
            )
        )
    for label, folder in enumerate(bundle.classes):
        for root, _, files in sorted(os.walk(os.path.join(data, folder))):
            for file in sorted(files):
                path = os.path.join(root, file)
                try:
                    yield bundle.preprocess.decode(path), label
                except ImageUnreadable as error:
                    unreadable.append({"path": path, "error": error.reason})


def _from_arrays(bundle: Bundle, data: str) -> Iterator[Tuple["np.ndarray[Any, Any]", int]]:
    try:
        with np.load(data, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (OSError, ValueError, KeyError) as error:
        raise Failure(f"{data} cannot be read ({error}); an .npz with images and labels was expected.") from None
    if len(images) != len(labels) or (
        len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(bundle.classes)
    ):
        raise Failure(
            f"{data} has {len(images)} images and labels {sorted(set(labels.tolist()))}; "
            f"as many labels, from 0 to {len(bundle.classes) - 1}, were expected."
        )
    for image, label in zip(images, labels):
        yield bundle.preprocess.fit(image), int(label)


def _batches(
    pairs: Iterator[Tuple["np.ndarray[Any, Any]", int]],
) -> Iterator[Tuple["np.ndarray[Any, Any]", List[int]]]:
    images: List["np.ndarray[Any, Any]"] = []
    labels: List[int] = []
    for image, label in pairs:
        images.append(image)
        labels.append(label)
        if len(images) == BATCH:
            yield np.stack(images), labels
            images, labels = [], []
    if images:
        yield np.stack(images), labels


def check(bundle: Bundle, threads: int = 1) -> Dict[str, Any]:
    """Hash every file, run the artifacts on the golden images and compare with the logits noted at export.

    {files, golden: {artifact: {max_abs_difference, tolerance, same_class}}, not_run: {artifact: why}}. CorruptFailure
    where a file is altered, BudgetFailure where a logit is further off than the tolerance of the manifest.
    """
    files = bundle.verify()
    golden = bundle.golden()
    found: Dict[str, Any] = {}
    not_run: Dict[str, str] = {}
    for name, entry in sorted(bundle.artifacts.items()):
        engines = _runtime(bundle, name) == "tensorrt" and has_engines(bundle)
        why = "" if engines else _not_run_here(bundle, name)
        if why:
            not_run[name] = why
            continue
        expected = golden.get("logits__" + name)
        if expected is None:
            raise CorruptFailure(f"golden.npz of {bundle.path} has no logits of '{name}'. Copy the bundle again.")
        try:
            with open_runner(bundle, name, threads) as runner:
                logits = logits_of(runner, bundle.preprocess, golden["images"])
        except (RuntimeFailure, VersionFailure, DeviceFailure) as error:
            if not engines:
                raise
            not_run[name] = str(error)  # an engine of another machine is no fault of the bundle
            continue
        found[name] = {
            "max_abs_difference": float(np.abs(logits - expected).max()),
            "tolerance": entry["golden_tolerance"],
            "same_class": float((logits.argmax(1) == expected.argmax(1)).mean()),
        }
    wrong = [name for name, each in found.items() if not each["max_abs_difference"] <= each["tolerance"]]
    if wrong:
        raise BudgetFailure(
            "The golden images give other logits than at export: {}.".format(
                "; ".join(
                    "{} differs by {max_abs_difference:.4g}, tolerated are {tolerance:.4g}".format(n, **found[n])
                    for n in wrong
                )
            )
        )
    return {"files": files, "golden": found, "not_run": not_run}
