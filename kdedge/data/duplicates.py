"""Images that are the same, byte for byte or to the eye. N images."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["HASHABLE_PX", "MOST_PAIRS", "exact_groups", "near_pairs", "perceptual_hashes"]

HASHABLE_PX = 32  # shorter side from which a perceptual hash says something
_HASH_DISTANCE = 8  # of 64 bits: candidates
_PIXEL_DISTANCE = 8.0  # mean absolute difference of the 32x32 thumbnails, of 255, after removing mean brightness
_FLAT = 1.0  # of 255: standard deviation of a thumbnail
MOST_PAIRS = 100_000
_BLOCK = 1024  # images; a block of pairs stays within the processor's cache


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
    shaped = thumbnails.std(axis=(1, 2)) >= _FLAT
    found: list[tuple[int, int, int]] = []
    for start in range(0, len(hashes), _BLOCK):
        rows = hashes[start : start + _BLOCK]
        for other in range(start, len(hashes), _BLOCK):
            distance = np.bitwise_count(rows[:, None] ^ hashes[None, other : other + _BLOCK])
            i, j = np.nonzero(distance <= _HASH_DISTANCE)
            first, second = i + start, j + other
            keep = (first < second) & shaped[first] & shaped[second]
            agree = _agree(thumbnails, first[keep], second[keep])
            pairs = zip(first[keep][agree], second[keep][agree], distance[i, j][keep][agree], strict=True)
            found += [(int(a), int(b), int(d)) for a, b, d in pairs]
            if len(found) >= MOST_PAIRS:
                return found[:MOST_PAIRS]
    return found


def _agree(thumbnails: NDArray[np.uint8], first: NDArray[np.intp], second: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Which pairs of thumbnails differ little. In pieces: a set of one image N times has N * N / 2 pairs."""
    out = np.zeros(len(first), dtype=bool)
    for start in range(0, len(first), _BLOCK):
        piece = slice(start, start + _BLOCK)
        difference = thumbnails[first[piece]].astype(np.float32) - thumbnails[second[piece]]
        difference -= difference.mean(axis=(1, 2), keepdims=True)
        out[piece] = np.abs(difference).mean(axis=(1, 2)) <= _PIXEL_DISTANCE
    return out
