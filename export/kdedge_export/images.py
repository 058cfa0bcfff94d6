"""The images an export needs, from the run's own splits: to calibrate on, to decide on, and to score once at the end.

N images, H x W pixels, C channels, K classes.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kdedge import recipe_io
from kdedge.data.source import Source
from kdedge.data.sources import open_source
from kdedge.data.splits import Splits
from kdedge.errors import DataError
from kdedge.runs import Run, read_json
from kdedge_device.evaluate import logits_of
from kdedge_device.preprocess import Preprocess
from kdedge_device.runners import OrtRunner

__all__ = [
    "CALIBRATION_IMAGES",
    "HELD_OUT_IMAGES",
    "Held",
    "Images",
    "Part",
    "RunImages",
    "calibration_part",
    "open_run_images",
]

CALIBRATION_IMAGES = 512
HELD_OUT_IMAGES = 48  # of those, kept from the histograms to choose between ranges
_CHUNK = 256  # images in memory at a time where only their logits are kept

Labels = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


class Images(Protocol):
    """Images that need not be in memory together. `fingerprint` tells one sequence of images from another."""

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def chunks(self, preprocess: Preprocess, size: int, start: int = 0) -> Iterator[Pixels]:
        """uint8 [up to `size`, H, W, C] in turn, from image `start` on."""
        ...


@dataclass(frozen=True, eq=False)
class Held:
    """Images that are in memory anyway, uint8 [N, H, W, C]."""

    pixels: Pixels

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.pixels.shape).encode() + self.pixels.tobytes()).hexdigest()

    def chunks(self, preprocess: Preprocess, size: int, start: int = 0) -> Iterator[Pixels]:
        for first in range(start, len(self), size):
            yield self.pixels[first : first + size]


@dataclass(frozen=True)
class Part:
    """Some images of a source. `labels` -1: not known, or not to be known by what asks."""

    name: str
    source: Source
    indices: npt.NDArray[np.int64]
    labels: Labels
    sha256: str | None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def ids(self) -> list[str]:
        return [self.source.ids[i] for i in self.indices]

    @property
    def fingerprint(self) -> str:
        """Of the set as it lies on disk, and of which of its images these are, in which order."""
        return hashlib.sha256("\n".join([self.source.fingerprint, *self.ids]).encode()).hexdigest()

    def load(self, preprocess: Preprocess, chosen: slice = slice(None)) -> Pixels:
        """uint8 [N, H, W, C]."""
        tensor = self.source.load(self.indices[chosen], preprocess)
        return np.ascontiguousarray(tensor.numpy().transpose(0, 2, 3, 1))

    def chunks(self, preprocess: Preprocess, size: int, start: int = 0) -> Iterator[Pixels]:
        """uint8 [up to `size`, H, W, C] in turn, from image `start` on; one chunk is in memory at a time."""
        for first in range(start, len(self), size):
            yield self.load(preprocess, slice(first, first + size))

    def hold_out(self, count: int = HELD_OUT_IMAGES) -> tuple["Part", "Part"]:
        """(the others, `count` of the images, at most an eighth), whatever their order. One image alone is in both."""
        if len(self) < 2:
            return self, self
        ids = self.ids
        drawn = sorted(range(len(self)), key=lambda place: hashlib.sha256(ids[place].encode()).digest())
        held = min(count, max(1, len(self) // 8))
        return self._some(sorted(drawn[held:])), self._some(sorted(drawn[:held]))

    def logits(self, models: Sequence[Path], preprocess: Preprocess, threads: int = 1) -> list[npt.NDArray[np.float32]]:
        """float32 [N, K] of each model; every image is decoded once, and few are in memory at a time."""
        parts: list[list[npt.NDArray[np.float32]]] = [[] for _ in models]
        for images in self.chunks(preprocess, _CHUNK):
            for model, found in zip(models, parts, strict=True):
                with OrtRunner(model, threads) as runner:
                    found.append(logits_of(runner, preprocess, images))
        return [np.concatenate(found) if found else np.zeros((0, 0), np.float32) for found in parts]

    def _some(self, places: list[int]) -> "Part":
        return replace(self, indices=self.indices[places], labels=self.labels[places], sha256=None)


@dataclass(frozen=True)
class RunImages:
    """`gate` knows the classes only of images that training knew too; `test` knows all, and is looked at last."""

    calibration: Part
    gate: Part
    test: Part
    test_is_val: bool


def open_run_images(run: Run) -> RunImages:
    """The run's data, opened again and checked to be the same. DataError where it is gone or has changed."""
    config = recipe_io.load(str(run.recipe_path)).data
    root = Path(config.root) if config.root else None
    most = config.max_unreadable_fraction
    source = open_source(config.spec, root=root, max_unreadable_fraction=most, classes=config.classes)
    document = read_json(run.splits_path)
    splits = Splits.from_json(document, source)

    def part(name: str, indices: npt.NDArray[np.int64], labels: Labels) -> Part:
        return Part(name, source, indices, labels, document["splits"][name]["sha256"])

    gate_labels = np.where(np.isin(splits.gate, splits.labeled), splits.truth[splits.gate], -1)
    return RunImages(
        calibration=part("calibration", splits.calibration, np.full(len(splits.calibration), -1)),
        gate=part("gate", splits.gate, gate_labels),
        test=part("test", splits.test, splits.truth[splits.test]),
        test_is_val=splits.test_is_val,
    )


def calibration_part(spec: str, images: int = CALIBRATION_IMAGES, judged: Sequence[Part] = ()) -> Part:
    """Up to `images` of another set, evenly over it, none of its val or test.

    Images of `judged` are left out where it is their own set: what a file is judged on it was not calibrated on.
    """
    source = open_source(spec).decodable()
    free = np.isin(source.part, ("train", "unlabeled"))
    known = {identity for part in judged for identity in part.ids}
    free &= np.array([identity not in known for identity in source.ids], bool)
    pool = np.flatnonzero(free)
    if len(pool) == 0:
        raise DataError(
            f"{spec} has no training or unlabeled images to calibrate on. Name another set with --calibrate."
        )
    places = np.unique(np.linspace(0, len(pool) - 1, min(images, len(pool))).round().astype(np.int64))
    return Part(spec, source, pool[places], np.full(len(places), -1), source.fingerprint)
