"""Unlabeled images that are in val or test too: a network that has seen them is not asked anything new.

N unlabeled images, M images of val and test.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdedge.data.duplicates import HASHABLE_PX, Shapes, nearest, shrunk
from kdedge.data.files import ImageFile, Member, encoded
from kdedge.data.parallel import run_threads
from kdedge.data.source import FileImages, Indices, Source
from kdedge.data.splits import Splits
from kdedge.data.words import counted, first_few
from kdedge_device.preprocess import ImageUnreadable, Preprocess

__all__ = ["looks_for_near", "without_leaks"]

_CHUNK = 8192  # images whose thumbnails are in memory at a time, beside those of val and test
_ROWS = 256  # images in memory at a time where they lie decoded
_ACCIDENTS = 0.05  # of the unlabeled images: more near ones are how these pictures look, not copies
_THUMBNAIL = Preprocess(height=32, width=32, channels=1, resize="squash", mean=(0.0,), std=(1.0,))
_Looks = tuple[list[bytes], Shapes | None]  # what the same bytes share; None for images too small to be near


def without_leaks(source: Source, splits: Splits) -> Splits:
    """`splits` without the unlabeled images that are, exactly or nearly, in val or test; `leaks` lists what was found.

    Exactly: the same file, or the same pixels of images below 32 px and of arrays. Nearly: the same picture in another
    encoding, size, brightness or contrast (`near_pairs`), where `looks_for_near`. Simple pictures (letters, icons) are
    near others by chance, and more so in simple classes: what is left out of them is not drawn evenly. Near ones are
    therefore left in, and counted as `lookalikes`, where they are more than a twentieth of the unlabeled images.
    A labeled image stays, since the user chose it; it is listed and told as a warning. calibration and gate lose what
    unlabeled loses. Reads every image once; thumbnails of unlabeled ones are not kept.
    """
    held = np.union1d(splits.val, splits.test)
    if not len(held):
        return splits
    known_digests, known_shapes = _look(source, held)
    known = {digest: place for place, digest in reversed(list(enumerate(known_digests))) if digest}
    leaks: list[dict[str, Any]] = []
    for start in range(0, len(splits.unlabeled), _CHUNK):
        asked = splits.unlabeled[start : start + _CHUNK]
        digests, shapes = _look(source, asked)
        match = np.array([known.get(digest, -1) for digest in digests], dtype=np.int64)
        exact = match >= 0
        if shapes is not None and known_shapes is not None:
            match = np.where(exact, match, nearest(shapes, known_shapes)[0])
        for row in np.flatnonzero(match >= 0):
            leaks.append(_leak(source, splits, int(asked[row]), int(held[match[row]]), bool(exact[row])))
    near = [leak for leak in leaks if not leak["exact"]]
    if len(near) > _ACCIDENTS * len(splits.unlabeled):
        leaks = [leak for leak in leaks if leak["exact"]]
        sentence = _lookalike_sentence(near, len(splits.unlabeled))
        splits = replace(splits, lookalikes=len(near), warnings=(*splits.warnings, sentence))
    return _leave_out(source, splits, leaks) if leaks else splits


def looks_for_near(source: Source) -> bool:
    """Whether `without_leaks` looks for near duplicates too: not in images too small to tell."""
    return source.readable_px >= HASHABLE_PX


def _leak(source: Source, splits: Splits, index: int, like: int, exact: bool) -> dict[str, Any]:
    return {
        "id": source.ids[index],
        "like": source.ids[like],
        "split": "test" if like in splits.test else "val",
        "exact": exact,
        "labeled": bool(index in splits.labeled),
    }


def _leave_out(source: Source, splits: Splits, leaks: Sequence[dict[str, Any]]) -> Splits:
    gone = {leak["id"] for leak in leaks if not leak["labeled"]}

    def kept(indices: Indices) -> Indices:
        return np.array([i for i in indices if source.ids[i] not in gone], dtype=np.int64)

    return replace(
        splits,
        unlabeled=kept(splits.unlabeled),
        calibration=kept(splits.calibration),
        gate=kept(splits.gate),
        leaks=(*splits.leaks, *leaks),
        warnings=(*splits.warnings, *_sentences(leaks)),
    )


def _sentences(leaks: Sequence[dict[str, Any]]) -> list[str]:
    sentences = []
    for labeled, kind, what in (
        (False, "unlabeled", "left out"),
        (True, "labeled", "kept, and flatter the accuracy there; remove one of each pair"),
    ):
        found = [leak for leak in leaks if leak["labeled"] == labeled]
        if not found:
            continue
        pairs = first_few([f"{leak['id']} is {leak['like']}" for leak in found])
        verb = "is" if len(found) == 1 else "are"
        sentences.append(
            f"{counted(len(found), f'{kind} image')} {verb} (nearly) in {_where(found)} too: {what} ({pairs})."
        )
    return sentences


def _lookalike_sentence(near: Sequence[dict[str, Any]], unlabeled: int) -> str:
    images = f"{counted(len(near), 'image')} of the {unlabeled:,} unlabeled ones ({len(near) / unlabeled:.1%})"
    pairs = first_few([f"{leak['id']} and {leak['like']}" for leak in near])
    return f"{images} look nearly like one of {_where(near)}: left in, too many to be accidental copies ({pairs})."


def _where(leaks: Sequence[dict[str, Any]]) -> str:
    return " and ".join(split for split in ("val", "test") if any(leak["split"] == split for leak in leaks))


def _look(source: Source, indices: Indices) -> _Looks:
    """Digests and shapes of some images. A file that cannot be decoded is like no other."""
    small = not looks_for_near(source)
    if not isinstance(source.images, FileImages):
        digests, thumbnails = [], []
        for start in range(0, len(indices), _ROWS):
            pixels = source.images.rows(indices[start : start + _ROWS])
            digests += [hashlib.sha256(image.data).digest() for image in pixels]
            if not small:
                thumbnails.append(shrunk(pixels))
        return digests, None if small else Shapes.of(np.concatenate(thumbnails))
    files = [source.images.files[i] for i in indices]
    if small:
        height, width = source.native_px
        zero, one = (0.0,) * source.channels, (1.0,) * source.channels
        native = Preprocess(height, width, source.channels, "squash", zero, one)
        return run_threads(partial(_pixel_digest, native), files), None
    looks = run_threads(_file_look, files)
    return [digest for digest, _ in looks], Shapes.of(np.stack([thumbnail for _, thumbnail in looks]))


def _pixel_digest(native: Preprocess, file: ImageFile) -> bytes:
    try:
        return hashlib.sha256(native.decode(encoded(file)).data).digest()
    except ImageUnreadable:
        return b""


def _file_look(file: ImageFile) -> tuple[bytes, NDArray[np.uint8]]:
    """sha256 of the file, and its thumbnail: a flat one, which is near nothing, where the file cannot be decoded."""
    try:
        content = file.content() if isinstance(file, Member) else file.read_bytes()
        return hashlib.sha256(content).digest(), _THUMBNAIL.decode(content)[:, :, 0]
    except (OSError, ImageUnreadable):
        return b"", np.zeros((32, 32), dtype=np.uint8)
