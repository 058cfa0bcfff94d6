"""Images that are the same, byte for byte or to the eye. N images."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "HASHABLE_PX",
    "MOST_PAIRS",
    "Shapes",
    "exact_groups",
    "near_pairs",
    "nearest",
    "perceptual_hashes",
    "shrunk",
]

HASHABLE_PX = 32  # shorter side from which a perceptual hash says something
_HASH_DISTANCE = 8  # of 64 bits: candidates
# Of the 32x32 thumbnails: neither brightness nor contrast makes another image of one. At 0.9 a third of MNIST is near
# another digit (ones above all), at 0.98 a fiftieth; at 0.99 one in 2,000, and JPEG, half the size and half the
# contrast of a photograph still pass.
_CORRELATION = 0.99
_FLAT = 1.0  # of 255: standard deviation of a thumbnail
MOST_PAIRS = 100_000
_BLOCK = 1024  # images; a block of pairs stays within the processor's cache
_ROWS = 64  # images of `nearest` at a time: 64 x 1024 differences of 8 bytes
_FAR = 255


def exact_groups(digests: Sequence[bytes]) -> list[list[int]]:
    """Indices with the same digest, groups of two and more; empty digests (unreadable) are left out."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, digest in enumerate(digests):
        if digest:
            groups[digest].append(index)
    return [group for group in groups.values() if len(group) > 1]


def perceptual_hashes(thumbnails: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """uint8 [N, 32, 32] -> 64 bits each: which of the 8x8 lowest cosine coefficients lie above their median.

    The constant coefficient (brightness) is replaced by the next one on the diagonal, so that all bits carry shape.
    """
    from scipy.fft import dctn

    hashes = np.zeros(len(thumbnails), dtype=np.uint64)
    for start in range(0, len(thumbnails), _BLOCK):
        spectrum = dctn(thumbnails[start : start + _BLOCK].astype(np.float32), axes=(1, 2), norm="ortho")
        low = spectrum[:, :8, :8].reshape(-1, 64).copy()
        low[:, 0] = spectrum[:, 8, 8]
        bits = low > np.median(low, axis=1, keepdims=True)
        hashes[start : start + _BLOCK] = np.packbits(bits, axis=1).view(">u8").astype(np.uint64)[:, 0]
    return hashes


def near_pairs(thumbnails: NDArray[np.uint8]) -> list[tuple[int, int, int]]:
    """(i, j, bits that differ) for i < j whose hashes are near and whose thumbnails agree.

    All pairs of hashes are compared, in blocks, as whole numbers; the few candidates are then compared by their pixels,
    since simple images share hashes by chance. Flat images have no shape to compare and are left out. The search ends
    at MOST_PAIRS: frames of one film are all near each other.
    """
    hashes = perceptual_hashes(thumbnails)
    shaped = _shaped(thumbnails)
    found: list[tuple[int, int, int]] = []
    for start in range(0, len(hashes), _BLOCK):
        rows = hashes[start : start + _BLOCK]
        for other in range(start, len(hashes), _BLOCK):
            distance = np.bitwise_count(rows[:, None] ^ hashes[None, other : other + _BLOCK])
            i, j = np.nonzero(distance <= _HASH_DISTANCE)
            first, second = i + start, j + other
            keep = (first < second) & shaped[first] & shaped[second]
            agree = _agree(thumbnails, thumbnails, first[keep], second[keep])
            pairs = zip(first[keep][agree], second[keep][agree], distance[i, j][keep][agree], strict=True)
            found += [(int(a), int(b), int(d)) for a, b, d in pairs]
            if len(found) >= MOST_PAIRS:
                return found[:MOST_PAIRS]
    return found


def _agree(
    thumbnails: NDArray[np.uint8], others: NDArray[np.uint8], first: NDArray[np.intp], second: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Which pairs (row of `thumbnails`, row of `others`) show one picture: those whose pixels correlate.

    In pieces: a set of one image N times has N * N / 2 pairs.
    """
    out = np.zeros(len(first), dtype=bool)
    for start in range(0, len(first), _BLOCK):
        piece = slice(start, start + _BLOCK)
        correlation = (_standardized(thumbnails[first[piece]]) * _standardized(others[second[piece]])).mean(axis=(1, 2))
        out[piece] = correlation >= _CORRELATION
    return out


def _standardized(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    values = thumbnails.astype(np.float32)
    values -= values.mean(axis=(1, 2), keepdims=True)
    values /= np.maximum(values.std(axis=(1, 2), keepdims=True), 1e-6)
    return values


@dataclass(frozen=True, eq=False)
class Shapes:
    """Thumbnails [N, 32, 32] with what is compared of them, computed once."""

    thumbnails: NDArray[np.uint8]
    hashes: NDArray[np.uint64]
    shaped: NDArray[np.bool_]  # not flat

    @staticmethod
    def of(thumbnails: NDArray[np.uint8]) -> "Shapes":
        return Shapes(thumbnails, perceptual_hashes(thumbnails), _shaped(thumbnails))


def _shaped(thumbnails: NDArray[np.uint8]) -> NDArray[np.bool_]:
    out = np.zeros(len(thumbnails), dtype=bool)
    for start in range(0, len(out), _BLOCK):
        values = thumbnails[start : start + _BLOCK].reshape(-1, 32 * 32).astype(np.float32)
        out[start : start + _BLOCK] = values.std(axis=1) >= _FLAT
    return out


def nearest(asked: Shapes, known: Shapes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each of `asked` a near duplicate among `known` and the bits that differ; -1 and -1 where there is none.

    As `near_pairs`, but the first match ends the search of an image: against a film there is one, not one a frame.
    """
    match, bits = np.full(len(asked.hashes), -1), np.full(len(asked.hashes), -1)
    rows = np.flatnonzero(asked.shaped)
    for start in range(0, len(rows), _ROWS):
        for other in range(0, len(known.hashes), _BLOCK):
            left = rows[start : start + _ROWS]
            left = left[match[left] < 0]
            distance = np.bitwise_count(asked.hashes[left, None] ^ known.hashes[None, other : other + _BLOCK])
            distance[:, ~known.shaped[other : other + _BLOCK]] = _FAR
            near = (distance <= _HASH_DISTANCE).any(axis=1)
            left, distance = left[near], distance[near]
            while len(left):  # the nearest hash of each, then the next
                column = distance.argmin(axis=1)
                best = distance[np.arange(len(left)), column]
                agree = _agree(asked.thumbnails, known.thumbnails, left, column + other) & (best <= _HASH_DISTANCE)
                match[left[agree]], bits[left[agree]] = column[agree] + other, best[agree]
                distance[np.arange(len(left)), column] = _FAR
                more = ~agree & (best <= _HASH_DISTANCE)
                left, distance = left[more], distance[more]
    return match, bits


def shrunk(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [N, h, w, C] -> thumbnails [N, 32, 32] in grey, proportions lost."""
    from PIL import Image

    out = np.empty((len(images), 32, 32), dtype=np.uint8)
    for start in range(0, len(images), _BLOCK):
        grey = _grey(images[start : start + _BLOCK])
        if grey.shape[1:] == (32, 32):
            out[start : start + _BLOCK] = grey
            continue
        for i, picture in enumerate(grey, start):
            out[i] = np.asarray(Image.fromarray(picture).resize((32, 32), Image.Resampling.BILINEAR))
    return out


def _grey(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[N, h, w, C] -> [N, h, w]: luma of ITU-R 601 in 256ths, whose sum fits 16 bits."""
    if images.shape[3] == 1:
        return images[..., 0]
    red, green, blue = (images[..., c].astype(np.uint16) for c in range(3))
    return ((77 * red + 150 * green + 29 * blue) >> 8).astype(np.uint8)
