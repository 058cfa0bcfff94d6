"""What a bundle says of images: predictions, and accuracy over labelled ones.

N images, H x W x C each, K classes.
"""

import os
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from kdedge_device.arrays import read_npz
from kdedge_device.choose_runner import Runner, open_runner
from kdedge_device.failures import BudgetFailure, CorruptFailure, Failure
from kdedge_device.manifest import Bundle, sha256_file
from kdedge_device.preprocess import ImageUnreadable, Preprocess
from kdedge_device.trt_runner import TrtRunner

__all__ = ["checked_logits", "evaluate", "images_a_call", "input_of", "logits_of", "predict"]

_BATCH = 32
_BATCH_BYTES = 128 << 20  # as float32; a manifest may ask for images of 4096 x 4096, and a board has 4 GB


def images_a_call(preprocess: Preprocess) -> int:
    """How many images are computed at once: 32, or as many as fit into 128 MiB of float32, but one at least."""
    bytes_each = 4 * preprocess.height * preprocess.width * preprocess.channels
    return max(1, min(_BATCH, _BATCH_BYTES // bytes_each))


def logits_of(runner: Runner, preprocess: Preprocess, images: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """float32 [N, K] of uint8 [N, H, W, C], N above 0, in batches of `images_a_call`."""
    count = images_a_call(preprocess)
    batches = (images[i : i + count] for i in range(0, len(images), count))
    return np.concatenate([runner.run(input_of(runner, preprocess, batch)) for batch in batches])


def input_of(runner: Runner, preprocess: Preprocess, images: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """What `runner` takes for uint8 [N, H, W, C]: those, or float32 [N, C, H, W], as its file says."""
    return images if runner.takes_pixels else preprocess.normalize(images)


def softmax(logits: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def predict(
    bundle: Bundle,
    paths: Sequence[str],
    artifact: Optional[str] = None,
    threads: int = 1,
    runtime: Optional[str] = None,
) -> List[Dict[str, Any]]:
    """One document per image: {path, class, probability, top: [[class, probability] x 5]}, or {path, error}.

    A path is an image, an .npy, or an .npz with `images`, whose paths then end in [0], [1] and so on.
    """
    answers: List[Dict[str, Any]] = []
    with open_runner(bundle, artifact, threads, runtime) as runner:
        for path in paths:
            try:
                for name, image in bundle.preprocess.each(path):
                    answers.append(_answer(bundle, name, checked_logits(bundle, runner, image[None])[0]))
            except ImageUnreadable as error:
                answers.append({"path": path, "error": error.reason})
    return answers


def _answer(bundle: Bundle, path: str, logits: "np.ndarray[Any, Any]") -> Dict[str, Any]:
    probs = softmax(logits)
    top = [[bundle.classes[k], float(probs[k])] for k in np.argsort(-probs, kind="stable")[:5]]
    return {"path": path, "class": top[0][0], "probability": top[0][1], "top": top}


def checked_logits(bundle: Bundle, runner: Runner, images: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """`logits_of`, one finite number a class. A model of other classes than the manifest names is not this bundle's."""
    logits = logits_of(runner, bundle.preprocess, images)
    if logits.shape != (len(images), len(bundle.classes)):
        raise CorruptFailure(
            f"{runner.model_path} gives logits of shape {list(logits.shape)}; [{len(images)}, {len(bundle.classes)}], "
            "one for each class of the manifest, was expected. Copy the bundle again."
        )
    if not np.isfinite(logits).all():
        raise BudgetFailure(
            f"{runner.model_path} gives logits that are no finite numbers. Export the model again, or take another "
            "artifact with --artifact."
        )
    return logits


def evaluate(
    bundle: Bundle,
    data: Optional[str] = None,
    artifact: Optional[str] = None,
    threads: int = 1,
    runtime: Optional[str] = None,
) -> Dict[str, Any]:
    """Accuracy on a folder of class folders, or an .npz with `images` uint8 [N, h, w, C] and `labels` [N].

    None is the bundle's own eval.npz. {artifact, sha256, runtime, version, data, data_sha256, accuracy, images,
    correct, per_class: {class: [correct, images]}, unreadable: [{path, error}]}; `data_sha256` is null for a folder.
    """
    source = _shard(bundle) if data is None else data
    unreadable: List[Dict[str, str]] = []
    counts = {cls: [0, 0] for cls in bundle.classes}
    with open_runner(bundle, artifact, threads, runtime) as runner:
        for images, labels in _batches(_labelled(bundle, source, unreadable), images_a_call(bundle.preprocess)):
            hits = checked_logits(bundle, runner, images).argmax(1) == labels
            for label, hit in zip(labels, hits):
                counts[bundle.classes[label]][0] += int(hit)
                counts[bundle.classes[label]][1] += 1
        name = artifact or (runner.precision if isinstance(runner, TrtRunner) else bundle.shipped)
        ran = {"sha256": sha256_file(runner.model_path), "runtime": runner.runtime, "version": runner.version}
    correct = sum(pair[0] for pair in counts.values())
    total = sum(pair[1] for pair in counts.values())
    if total == 0:
        raise Failure(f"No image of {source} could be read ({len(unreadable)} unreadable).")
    return {
        "artifact": name,
        **ran,
        "data": source,
        "data_sha256": sha256_file(source) if os.path.isfile(source) else None,
        "accuracy": correct / total,
        "images": total,
        "correct": correct,
        "per_class": counts,
        "unreadable": unreadable,
    }


def _shard(bundle: Bundle) -> str:
    if "eval.npz" not in bundle.document["files"]:
        raise Failure(
            f"The bundle {bundle.path} has no eval.npz. Name images with --data FOLDER, or export it again with: "
            "kdedge export --with-eval 200"
        )
    return bundle.file("eval.npz")


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
    arrays = read_npz(data, ("images", "labels"))
    images, labels = arrays["images"], arrays["labels"]
    known = labels.dtype.kind in "biu" and labels.ndim == 1 and images.ndim in (3, 4) and len(images) == len(labels)
    if not known or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(bundle.classes)):
        ends = f" from {labels.min()} to {labels.max()}" if labels.size else ""
        raise Failure(
            f"{data} has images of shape {list(images.shape)} and labels of shape {list(labels.shape)}{ends}; images "
            f"[N, h, w, C] and N whole labels from 0 to {len(bundle.classes) - 1} were expected."
        )
    for image, label in zip(images, labels):
        yield bundle.preprocess.fit(image), int(label)


def _batches(
    pairs: Iterator[Tuple["np.ndarray[Any, Any]", int]], count: int
) -> Iterator[Tuple["np.ndarray[Any, Any]", List[int]]]:
    images: List["np.ndarray[Any, Any]"] = []
    labels: List[int] = []
    for image, label in pairs:
        images.append(image)
        labels.append(label)
        if len(images) == count:
            yield np.stack(images), labels
            images, labels = [], []
    if images:
        yield np.stack(images), labels
