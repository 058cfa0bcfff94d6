"""A source: what images there are, what is known of each, and how their pixels are read.

N images, C channels (1 grey, 3 RGB), H and W the size asked for, h and w the size found.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kdedge.data.files import ImageFile, encoded, why_undecodable
from kdedge.data.memory import require_memory
from kdedge.data.packfile import PackedImages
from kdedge.data.parallel import Progress, run_threads
from kdedge.data.words import counted, first_few
from kdedge.errors import BugError, DataError, did_you_mean
from kdedge_device.preprocess import ImageUnreadable, Preprocess

if TYPE_CHECKING:  # torch takes seconds to import; `kdedge data check` does without
    import torch

__all__ = [
    "LEFT_OUT",
    "PARTS",
    "SMALL_PX",
    "ArrayImages",
    "FileImages",
    "Indices",
    "PackedImages",
    "Source",
    "check_unreadable",
    "fingerprint_of",
    "usual_px",
]

PARTS = ("train", "unlabeled", "val", "test")
LEFT_OUT = "left out"
"""The part of images whose class was not asked for."""
SMALL_PX = 64  # shorter side up to which images are small for the strides of a network made for photographs
Indices: TypeAlias = NDArray[np.int64]
_Kind: TypeAlias = Literal["digits", "small", "photo"]


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """All images in memory, or mapped from files: uint8 [n, h, w, C] in one block or several of the same h, w, C."""

    blocks: tuple[NDArray[np.uint8], ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, C)."""
        height, width, channels = self.blocks[0].shape[1:]
        return height, width, channels

    def rows(self, indices: Indices) -> NDArray[np.uint8]:
        """uint8 [n, h, w, C], a copy."""
        out = np.empty((len(indices), *self.blocks[0].shape[1:]), dtype=np.uint8)
        start = 0
        for block in self.blocks:
            here = (indices >= start) & (indices < start + len(block))
            out[here] = block[indices[here] - start]
            start += len(block)
        return out

    def planes(self, indices: Indices) -> NDArray[np.uint8]:
        """uint8 [n, C, h, w]."""
        return np.ascontiguousarray(self.rows(indices).transpose(0, 3, 1, 2))

    def read(self, index: int, preprocess: Preprocess) -> NDArray[np.uint8]:
        return preprocess.fit(self.rows(np.array([index]))[0])

    def digest(self) -> bytes:
        """sha256 over all pixels, in the order of memory."""
        content = hashlib.sha256()
        for block in self.blocks:
            for start in range(0, len(block), 4096):
                images = block[start : start + 4096]
                # STL-10 is mapped column by column: hash it as it lies.
                as_it_lies = images if images.flags.c_contiguous else images.transpose(0, 3, 2, 1)
                content.update(np.ascontiguousarray(as_it_lies).data)
        return content.digest()


@dataclass(frozen=True, eq=False)
class FileImages:
    """One file an image, on its own or in a tar, decoded when it is asked for."""

    files: tuple[ImageFile, ...]

    def read(self, index: int, preprocess: Preprocess) -> NDArray[np.uint8]:
        return preprocess.decode(encoded(self.files[index]))


@dataclass(frozen=True, eq=False)
class Source:
    """Every image that can be read, in an order that depends on nothing but the ids.

    `labels` holds the class known to the source, -1 where there is none; `part` where the source itself puts the image,
    LEFT_OUT where its class was not asked for.
    `unreadable` are (id, reason) of what was left out. `fingerprint` is a sha256 over ids, labels, parts and contents
    (of arrays) or sizes in bytes (of files), as found when the source was opened.
    """

    name: str
    spec: str
    classes: tuple[str, ...]
    ids: Sequence[str]
    labels: NDArray[np.int64]
    part: NDArray[np.str_]
    channels: Literal[1, 3]
    native_px: tuple[int, int]  # median height and width
    kind: _Kind
    flip_allowed: bool
    images: ArrayImages | FileImages | PackedImages
    fingerprint: str
    default_labels: int | None = None
    warnings: tuple[str, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()  # stray and hidden files
    max_unreadable_fraction: float = 0.05

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def test_is_val(self) -> bool:
        """There is no test part, so val is the test, and is reported as such."""
        return bool((self.part == "val").any() and not (self.part == "test").any())

    @property
    def readable_px(self) -> int:
        """Shorter side of what can be read: images may be packed smaller than they were."""
        packed = self.images.image_shape[:2] if isinstance(self.images, PackedImages) else ()
        return min(*self.native_px, *packed)

    def counts(self) -> dict[str, int]:
        """Images in each part."""
        return {part: int((self.part == part).sum()) for part in PARTS}

    def load(
        self,
        indices: Indices | Sequence[int],
        preprocess: Preprocess,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> "torch.Tensor":
        """uint8 [n, C, H, W], row i the image indices[i], decoded and resized as on the device.

        DataError where the result would not fit into memory, where a file cannot be decoded (`decodable()` leaves such
        files out beforehand), and where packed images are smaller than what is asked for.
        """
        import torch

        chosen = np.asarray(indices, dtype=np.int64)
        shape = (len(chosen), preprocess.channels, preprocess.height, preprocess.width)
        size = f"{shape[1]} x {shape[2]} x {shape[3]}"
        require_memory(int(np.prod(shape, dtype=np.int64)), f"Loading {counted(len(chosen), 'image')} of {size}")
        self.require_packed(preprocess)
        if not isinstance(self.images, FileImages) and self.images.image_shape == _hwc(preprocess):
            return torch.from_numpy(self.images.planes(chosen))  # nothing to resize: no loop over images
        out = np.empty(shape, dtype=np.uint8)
        failed = run_threads(partial(self._fill, out, chosen, preprocess), range(len(chosen)), workers, progress)
        names = [reason for reason in failed if reason]
        if names:
            raise DataError(
                f"{counted(len(names), 'image')} of {self.name} can be opened but not decoded: {first_few(names)}. "
                "Expected whole files. Remove or replace them."
            )
        return torch.from_numpy(out)

    def remark(self, preprocess: Preprocess) -> str:
        """What a user should know before images are read so, in a sentence; empty where there is nothing to say."""
        if not isinstance(self.images, PackedImages) or self.images.image_shape == _hwc(preprocess):
            return ""
        height, width, channels = self.images.image_shape
        return (
            f"{self.spec} is packed at {width} x {height} px with {counted(channels, 'channel')}, and is resized to "
            f"{preprocess.width} x {preprocess.height} with {preprocess.channels}: resized twice, its pixels are not "
            f"quite those of the source. Pack it with --px {preprocess.height} for the same ones."
        )

    def require_packed(self, preprocess: Preprocess) -> None:
        """DataError where packed images have lost what is asked for: pixels, or colours that the source has."""
        if not isinstance(self.images, PackedImages):
            return
        height, width, channels = self.images.image_shape
        greyed = channels < min(preprocess.channels, self.channels)
        if preprocess.height > height or preprocess.width > width or greyed:
            raise DataError(
                f"{self.spec} is packed at {width} x {height} px with {counted(channels, 'channel')}; "
                f"{preprocess.width} x {preprocess.height} with {preprocess.channels} are asked for. Pack it again "
                f"with --px {max(preprocess.height, preprocess.width)} --channels {preprocess.channels}, or train with "
                f"--set data.image_px={min(height, width)} --set data.channels={channels}."
            )

    def _fill(self, out: NDArray[np.uint8], chosen: Indices, preprocess: Preprocess, row: int) -> str:
        """Write image chosen[row] into out[row]; the reason where that fails, else an empty string."""
        index = int(chosen[row])
        try:
            pixels = self.images.read(index, preprocess)
        except ImageUnreadable as error:
            return f"{self.ids[index]} ({error.reason})"
        if pixels.shape != _hwc(preprocess):
            raise BugError(f"preprocess made {pixels.shape} of {self.ids[index]}, not {_hwc(preprocess)}")
        out[row] = pixels.transpose(2, 0, 1)
        return ""

    def only(self, classes: Sequence[str]) -> "Source":
        """This source as if it had these classes alone, in its own order, whatever the order here.

        Images of other classes are in no part, and keep their places; what has no label stays, whatever it shows. As
        many labels a class by default. Same fingerprint: it is the same set on disk. DataError with the known classes
        where one is unknown, and where one is named twice.
        """
        for name in classes:
            if name not in self.classes:
                raise DataError(
                    f"data.classes names '{name}', which is no class of {self.name}.{did_you_mean(name, self.classes)} "
                    f"Its classes: {', '.join(self.classes)}."
                )
        if len(classes) < 2:
            raise DataError(f"data.classes names {counted(len(classes), 'class', 'classes')}; expected at least two.")
        if len(set(classes)) < len(classes):
            twice = next(name for name in classes if list(classes).count(name) > 1)
            raise DataError(f"data.classes names '{twice}' twice. Name each class once.")
        chosen = tuple(name for name in self.classes if name in set(classes))
        if chosen == self.classes:
            return self
        new = np.array([chosen.index(name) if name in chosen else -2 for name in self.classes] + [-1])  # -1 is last
        labels = new[self.labels]
        others = labels == -2
        unknown = int((labels == -1).sum())
        told = (
            f"Of {self.name} only {first_few(chosen, 10)} are used; {counted(int(others.sum()), 'image')} of other "
            f"classes left out{f', and {unknown:,} without a label kept, whatever they show' if unknown else ''}."
        )
        return replace(
            self,
            name=f"{self.name}-{len(chosen)}of{len(self.classes)}",
            classes=chosen,
            labels=np.where(others, -1, labels),
            part=np.where(others, LEFT_OUT, self.part),
            default_labels=self.default_labels and self.default_labels // len(self.classes) * len(chosen),
            warnings=(*self.warnings, told),
        )

    def decodable(self, workers: int | None = None, progress: Progress | None = None) -> "Source":
        """This source without the files that fail only when all their pixels are decoded, which is tried here once.

        Opening reads headers and file ends, which finds text, empty and cut files; damage in the middle shows only
        here. Same fingerprint: it is the same set on disk. DataError past `max_unreadable_fraction`.
        """
        if not isinstance(self.images, FileImages):
            return self
        used = np.flatnonzero(self.part != LEFT_OUT).tolist()
        reasons = run_threads(why_undecodable, [self.images.files[i] for i in used], workers, progress)
        bad = [(self.ids[i], reason) for i, reason in zip(used, reasons, strict=True) if reason]
        if not bad:
            return self
        sentence = check_unreadable(self.name, bad, len(used), self.max_unreadable_fraction, already=self.unreadable)
        keep = np.ones(len(self), dtype=np.bool_)
        keep[used] = [not reason for reason in reasons]
        return replace(
            self,
            ids=tuple(np.array(self.ids, dtype=object)[keep]),
            labels=self.labels[keep],
            part=self.part[keep],
            images=FileImages(tuple(file for file, good in zip(self.images.files, keep, strict=True) if good)),
            unreadable=self.unreadable + tuple(bad),
            warnings=(*self.warnings, sentence),
        )


def usual_px(kind: str, shorter_px: int) -> int:
    """Height and width at which a network reads such images: small ones as they are, photographs at 160 to 224."""
    return shorter_px if kind != "photo" else min(max(shorter_px, 160), 224) // 32 * 32


def _hwc(preprocess: Preprocess) -> tuple[int, int, int]:
    return preprocess.height, preprocess.width, preprocess.channels


def check_unreadable(
    name: str,
    bad: Sequence[tuple[str, str]],
    total: int,
    max_fraction: float,
    already: Sequence[tuple[str, str]] = (),
) -> str:
    """The sentence that reports the unreadable images `bad` once; DataError where they are too many.

    total: images that were tried now, `bad` included; `already` were left out before and count as well.
    """
    count, of = len(bad) + len(already), total + len(already)
    names = first_few([f"{identity} ({reason})" for identity, reason in bad])
    if count == of or count / of > max_fraction:
        raise DataError(
            f"{count} of {of} images of {name} cannot be read ({count / of:.1%}): {names}. Expected at most "
            f"{max_fraction:.1%}. Repair or remove them (kdedge data check lists them all), or allow more: "
            "--max-unreadable F of kdedge data pack, --set data.max_unreadable_fraction=F of a training."
        )
    return f"{count} of {of} images cannot be read and are left out: {names}." if bad else ""


def fingerprint_of(
    classes: Sequence[str], ids: Sequence[str], labels: NDArray[np.int64], part: NDArray[np.str_], content: bytes
) -> str:
    """sha256 of all that tells one set from another; `content` stands for pixels or file sizes."""
    digest = hashlib.sha256()
    for text in ("\0".join(classes), "\0".join(ids), "\0".join(part.tolist())):
        digest.update(hashlib.sha256(text.encode("utf-8")).digest())
    digest.update(labels.astype("<i8").tobytes())
    digest.update(content)
    return digest.hexdigest()
