"""`kdedge predict` and `kdedge eval`: one model on images, from a run, a bundle or a single ONNX file."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdedge.cli_common import Reply, columns, command_output, note
from kdedge.errors import DataError, RunError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kdedge.data import Source
    from kdedge_device.preprocess import Preprocess

    Images = NDArray[np.uint8]  # [N, H, W, C]
    Logits = NDArray[np.float32]  # [N, K]

__all__ = ["evaluate", "predict"]

BATCH = 64
TOP = 3


@dataclass(frozen=True)
class Model:
    """A network that takes pictures: `logits` of uint8 [N, H, W, C], as float32 [N, K] in the order of `classes`."""

    name: str
    classes: tuple[str, ...]
    preprocess: "Preprocess"
    logits: "Callable[[Images], Logits]"


@click.command()
@click.argument("model", metavar="RUN|BUNDLE", type=click.Path(path_type=Path))
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@command_output
def predict(model: Path, images: tuple[str, ...]) -> Reply:
    """Predict the class of each IMAGE.

    With the student of RUN, or with what BUNDLE ships.
    An image that cannot be read is reported and the others are predicted; the exit code is then 2.
    """
    with _open_model(model) as opened:
        rows = [row for path in images for row in _predict_each(opened, path)]
    failed = sum("error" in row for row in rows)
    lines = [_prediction_line(row) for row in rows if "error" not in row]
    for row in rows:
        if "error" in row:
            note(row["error"])
    if failed:
        note(f"{failed} of {len(rows)} images could not be read.")
    return Reply({"model": opened.name, "predictions": rows}, columns(lines), exit_code=2 if failed else 0)


@click.command("eval")
@click.argument("model", metavar="RUN|BUNDLE|MODEL.onnx", type=click.Path(path_type=Path))
@click.option("--data", "spec", required=True, metavar="SPEC", help="Labelled images: its test part, else all of them.")
@command_output
def evaluate(model: Path, spec: str) -> Reply:
    """Accuracy on labelled images, each class apart.

    With a 95 % interval (Wilson).
    """
    with _open_model(model) as opened:
        document = _evaluate(opened, spec, _splits_of(model))
    low, high = document["interval"]
    head = (
        f"{document['model']} on {document['images']} images ({document['part']}) of {spec}\n"
        f"accuracy {document['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})\n\n"
    )
    if document["seen_in_training"]:
        head += (
            f"{document['seen_in_training']} of these images took part in the training of this run: "
            "it says little about new ones.\n\n"
        )
    rows = [("class", "images", "accuracy")]
    rows += [(name, str(n), "-" if a is None else f"{a:.4f}") for name, n, a in _class_rows(document)]
    return Reply(document, head + columns(rows))


def _class_rows(document: dict[str, Any]) -> Iterator[tuple[str, int, float | None]]:
    for entry in document["per_class"]:
        yield entry["class"], entry["images"], entry["accuracy"]


def _predict_each(model: Model, path: str) -> Iterator[dict[str, Any]]:
    """{image, class, prob, top} of the image in a file, of each in an array file; {image, error} where unreadable."""
    from kdedge_device.preprocess import ImageUnreadable

    try:
        for name, pixels in model.preprocess.each(path):
            probs = _softmax(model.logits(pixels[None]))[0]
            order = probs.argsort()[::-1][:TOP]
            top = [{"class": model.classes[k], "prob": round(float(probs[k]), 6)} for k in order]
            yield {"image": name, **top[0], "top": top}
    except ImageUnreadable as error:
        yield {"image": path, "error": str(error)}


def _prediction_line(row: dict[str, Any]) -> tuple[str, str, str, str]:
    others = ", ".join(f"{entry['class']} {entry['prob']:.3f}" for entry in row["top"][1:])
    return (row["image"], row["class"], f"{row['prob']:.3f}", f"({others})" if others else "")


def _splits_of(model: Path) -> dict[str, Any] | None:
    """The splits.json of the run that `model` is, or lies in."""
    from kdedge.runs import read_json

    for folder in (model, model.parent, model.parent.parent):
        if (folder / "splits.json").is_file():
            found: dict[str, Any] = read_json(folder / "splits.json")
            return found
    return None


def _seen(source: "Source", chosen: "NDArray[np.int64]", splits: dict[str, Any] | None) -> int:
    """How many of the chosen images the run learned from or chose by."""
    if splits is None or splits["fingerprint"] != source.fingerprint:
        return 0
    seen = {identity for name in ("unlabeled", "val") for identity in splits["splits"][name]["ids"]}
    return sum(source.ids[i] in seen for i in chosen)


def _evaluate(model: Model, spec: str, splits: dict[str, Any] | None) -> dict[str, Any]:
    import numpy as np

    from kdedge.data import open_source
    from kdedge_bench.stats import wilson

    source = open_source(spec).decodable()
    part = "test" if (source.part == "test").any() else "val" if source.test_is_val else "all labelled"
    labelled = source.labels >= 0
    chosen = np.flatnonzero(labelled if part == "all labelled" else labelled & (source.part == part))
    if not len(chosen):
        raise DataError(f"{spec} has no labelled image to score; class folders, or a CSV with labels, were expected.")
    if remark := source.remark(model.preprocess):
        note(remark)
    truth = _in_order_of(model.classes, source)[source.labels[chosen]]
    predicted = np.empty(len(chosen), dtype=np.int64)
    for start in range(0, len(chosen), BATCH):
        batch = source.load(chosen[start : start + BATCH], model.preprocess)
        predicted[start : start + BATCH] = model.logits(batch.permute(0, 2, 3, 1).numpy()).argmax(axis=1)
    right = predicted == truth
    per_class = [
        {"class": name, "images": int(n), "accuracy": float(right[truth == k].mean()) if n else None}
        for k, name in enumerate(model.classes)
        for n in [(truth == k).sum()]
    ]
    return {
        "model": model.name,
        "data": spec,
        "part": part,
        "images": len(chosen),
        "seen_in_training": _seen(source, chosen, splits),
        "accuracy": float(right.mean()),
        "interval": list(wilson(int(right.sum()), len(chosen))),
        "per_class": per_class,
    }


def _in_order_of(classes: tuple[str, ...], source: "Source") -> "NDArray[np.int64]":
    """The model's index of each class of the source, by name."""
    import numpy as np

    unknown = [name for name in source.classes if name not in classes]
    if unknown:
        hint = did_you_mean(unknown[0], classes)
        raise DataError(
            f"{source.spec} has the class '{unknown[0]}', which the model does not know; "
            f"it knows {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}.{hint}"
        )
    return np.array([classes.index(name) for name in source.classes], dtype=np.int64)


@contextlib.contextmanager
def _open_model(path: Path) -> Iterator[Model]:
    """The student of a run (in torch), the shipped artifact of a bundle, or one ONNX file of a bundle."""
    if path.suffix == ".onnx":
        with _open_bundle(path.parent, path) as model:
            yield model
    elif (path / "manifest.json").is_file() and _is_bundle(path):
        with _open_bundle(path, None) as model:
            yield model
    elif path.exists():
        yield _open_run(path)
    else:
        raise RunError(f"{path} does not exist; a run folder, a bundle folder or an .onnx file was expected.")


def _is_bundle(path: Path) -> bool:
    from kdedge.runs import read_json

    manifest = read_json(path / "manifest.json")
    return isinstance(manifest, dict) and "artifacts" in manifest


@contextlib.contextmanager
def _open_bundle(folder: Path, file: Path | None) -> Iterator[Model]:
    from kdedge_device.evaluate import logits_of
    from kdedge_device.manifest import Bundle
    from kdedge_device.runners import OrtRunner

    if file is not None and not file.is_file():
        raise RunError(f"{file} does not exist; an .onnx file was expected.")
    if file is not None and not (folder / "manifest.json").is_file():
        raise RunError(
            f"{file} has no manifest.json beside it, so its preprocessing and classes are unknown. "
            "Expected an .onnx file inside the bundle that kdedge export wrote."
        )
    bundle = Bundle(folder)
    name = next((key for key, entry in bundle.artifacts.items() if file and entry["file"] == file.name), None)
    if file is not None and name is None:
        raise RunError(f"{file} is not in the manifest beside it, which names {', '.join(bundle.artifacts)}.")
    model_path = bundle.model_path(name)
    with OrtRunner(model_path, threads=os.cpu_count() or 1) as runner:
        yield Model(
            f"{name or bundle.shipped} of {folder}",
            tuple(bundle.classes),
            bundle.preprocess,
            lambda images: logits_of(runner, bundle.preprocess, images),
        )


def _open_run(path: Path) -> Model:
    import torch

    from kdedge.models.weights import load_model
    from kdedge.runs import open_finished

    loaded = load_model(open_finished(path).student_path)

    def logits(images: "Images") -> "Logits":
        with torch.inference_mode():
            result: Logits = loaded.module(torch.from_numpy(loaded.preprocess.normalize(images))).numpy()
        return result

    return Model(f"student of {path}", loaded.classes, loaded.preprocess, logits)


def _softmax(logits: "Logits") -> "Logits":
    import numpy as np

    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs: Logits = exp / exp.sum(axis=1, keepdims=True)
    return probs
