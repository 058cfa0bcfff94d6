"""A model trained elsewhere and a data SPEC: everything an export needs that a run of ours would have had.

The SPEC is the model's own kind of images. Calibration and gate are drawn from its training and unlabeled part, test is
its test part (else its val part), and no image is in two of them, nor a copy of one of test in the others.
N images, C channels, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from kdedge.data.leaks import without_leaks
from kdedge.data.source import Source
from kdedge.data.sources import open_source
from kdedge.data.splits import Splits, export_splits
from kdedge.data.words import counted
from kdedge.errors import DataError, ExportError
from kdedge_device.failures import Failure
from kdedge_device.preprocess import Preprocess
from kdedge_export.float_form.onnx_import import Imported, import_onnx, prove
from kdedge_export.images import Part, RunImages

__all__ = ["Foreign", "Reading", "open_foreign", "preprocess_of", "spec_images"]

PROVED_IMAGES = 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's, of pixel / 255
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reading:
    """What the user says of a file that does not say it itself; None: not said.

    `mean` and `std` of pixel / 255, one number or one for each channel; `resize` as in Preprocess; `px`: the side of an
    input whose height and width the file leaves open.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: str | None = None
    px: int | None = None


@dataclass(frozen=True)
class Foreign:
    """`model`: the canonical float form, proven against the file on images of the SPEC (`max_abs_difference`).

    `notes`: what was changed or assumed, a sentence each.
    """

    model: onnx.ModelProto
    preprocess: Preprocess
    classes: tuple[str, ...]
    images: RunImages
    notes: tuple[str, ...]
    max_abs_difference: float


_NOTHING_SAID = Reading()


def open_foreign(path: Path, spec: str, reading: Reading = _NOTHING_SAID) -> Foreign:
    """The ONNX file `path` with the images of `spec`. ExportError and DataError in a sentence."""
    imported = import_onnx(path, reading.px)
    preprocess, assumed = preprocess_of(imported, reading)
    classes, images, remarks = spec_images(imported, spec)
    part = images.gate if len(images.gate) else images.calibration
    difference = prove(imported, preprocess.normalize(part.load(preprocess, slice(0, PROVED_IMAGES))))
    notes = (*imported.notes, *assumed, *remarks)
    return Foreign(imported.model, preprocess, classes, images, notes, difference)


def preprocess_of(imported: Imported, reading: Reading = _NOTHING_SAID) -> tuple[Preprocess, tuple[str, ...]]:
    """The file's own preprocessing with what is given in place of its parts, else the usual; and what was assumed."""
    channels, height, width = imported.image
    known, notes = imported.preprocess, []
    if known is None:
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,), (0.5,))
        known = Preprocess(height, width, channels, "short-side-crop", mean, std)
        if reading.mean is None or reading.std is None:
            notes.append(
                f"The file does not say how its images were normalised: mean {_told(mean)} and std {_told(std)} of "
                f"pixel / 255 are taken{', those of ImageNet' if channels == 3 else ''}. Give others with --mean and "
                "--std."
            )
    try:
        return replace(
            known,
            resize=reading.resize or known.resize,
            mean=known.mean if reading.mean is None else _each(reading.mean, channels),
            std=known.std if reading.std is None else _each(reading.std, channels),
        ), tuple(notes)
    except Failure as error:
        raise ExportError(f"{error} The model takes {channels} channels of {height} x {width} pixels.") from None


def _each(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One number stands for all channels."""
    return values * channels if len(values) == 1 else values


def _told(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def spec_images(imported: Imported, spec: str) -> tuple[tuple[str, ...], RunImages, tuple[str, ...]]:
    """(names of the K classes, the images of `spec` in three parts, what was assumed).

    Labels count only where the SPEC has the model's classes: as many, and the same names where the file has names.
    """
    source = open_source(spec).decodable()
    classes, order, note = _classes(imported, source)
    splits = _splits(source)
    sha256 = {name: each["sha256"] for name, each in splits.to_json(source)["splits"].items()}

    def part(name: str, indices: npt.NDArray[np.int64], labelled: bool = True) -> Part:
        labels = order[source.labels[indices]] if labelled else np.full(len(indices), -1)  # order[-1] is -1
        return Part(name, source, indices, labels, sha256[name])

    images = RunImages(
        calibration=part("calibration", splits.calibration, labelled=False),
        gate=part("gate", splits.gate),
        test=part("test", splits.test),
        test_is_val=splits.test_is_val,
    )
    unread = f"{counted(len(source.unreadable), 'image')} of {spec} cannot be read and are left out."
    return classes, images, ((unread,) if source.unreadable else ()) + splits.warnings + note


def _classes(imported: Imported, source: Source) -> tuple[tuple[str, ...], Labels, tuple[str, ...]]:
    """(names, the model's class of each class of the source with -1 behind them, what was assumed)."""
    count, theirs, own = imported.num_classes, source.classes, imported.classes
    nobody = np.full(len(theirs) + 1, -1, np.int64)
    if own is None and len(theirs) == count:
        named = f", in the order {', '.join(theirs)}" if count <= 20 else " in their order"
        note = f"The file does not name its classes: those of {source.spec} are taken{named}."
        return theirs, np.array([*range(count), -1]), (note,)
    if own is not None and sorted(own) == sorted(theirs):
        return own, np.array([*(own.index(name) for name in theirs), -1]), ()
    names = own or tuple(str(k) for k in range(count))
    note = (
        f"The labels of {source.spec} are not used: it has {len(theirs)} classes, the model {count}"
        f"{' of other names' if len(theirs) == count else ''}."
    )
    return names, nobody, (note,) if theirs else ()


def _splits(source: Source) -> Splits:
    """Calibration and gate from what a network may learn from; labels mean nothing here, so none is 'labeled'."""
    pool = np.flatnonzero(np.isin(source.part, ("train", "unlabeled")))
    if not len(pool):
        raise DataError(
            f"{source.spec} has no training or unlabeled images to calibrate on. Name another set with --calibrate."
        )
    calibration, gate = export_splits(source, pool)
    nothing = np.array([], dtype=np.int64)
    own_val, own_test = (np.flatnonzero(source.part == name) for name in ("val", "test"))
    splits = Splits(
        labeled=nothing,
        unlabeled=np.union1d(calibration, gate),
        val=nothing if source.test_is_val else own_val,
        test=own_val if source.test_is_val else own_test,
        calibration=calibration,
        gate=gate,
        truth=source.labels,
        labels=None,
        seed=0,
        test_is_val=source.test_is_val,
    )
    splits = without_leaks(source, splits)
    if not len(splits.calibration):
        raise DataError(
            f"All images of {source.spec} to calibrate on are in its test part too. Name another set with --calibrate."
        )
    return splits
