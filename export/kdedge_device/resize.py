"""Resizing, defined: bilinear, antialiased where it shrinks, in whole numbers, so that every machine gives one answer.

First along rows, then along columns, each time rounded to 8 bits. A weight is a triangle's height, rounded to 22 binary
digits. Every product and sum then is a whole number below 2**31, which float64 holds exactly: neither the order of a
matrix product nor the processor changes a bit. Pillow computes the same, but newer ones go along columns first where
that is quicker, which differs by one grey level: `images.shrink` asks it for one direction at a time.

h, w are the size found, H, W the size asked for, C channels. Python 3.8, numpy.
"""

import functools
from typing import Any, List, NamedTuple, Tuple

import numpy as np

__all__ = ["Box", "resize", "to_grey"]

Box = Tuple[float, float, float, float]
"""The part of an image that is kept, in pixels: left, top, right, bottom."""

_ONE = 1 << 22  # a weight of 1
_STEP = 16  # results computed at once: their inputs overlap, so a dense block of weights wastes little
_BAND_VALUES = 1 << 17  # of float64 at a time: 1 MiB, which stays in a processor's cache


class _Block(NamedTuple):
    """Results [start, stop) are `weights` [stop - start, high - low] times the inputs [low, high)."""

    start: int
    stop: int
    low: int
    high: int
    weights: "np.ndarray[Any, Any]"


def resize(image: "np.ndarray[Any, Any]", height: int, width: int, box: Box) -> "np.ndarray[Any, Any]":
    """uint8 [h, w, C] -> uint8 [H, W, C]. Beside the result, it takes W columns of h rows, and a few MiB."""
    found_height, found_width, channels = image.shape
    left, top, right, bottom = box
    across = _blocks(found_width, left, right, width)
    down = _blocks(found_height, top, bottom, height)
    first, last = min(block.low for block in down), max(block.high for block in down)
    narrow = np.empty((last - first, channels, width), np.uint8)
    rows = max(1, _BAND_VALUES // (found_width * channels))
    for start in range(first, last, rows):
        stop = min(start + rows, last)
        # Channels apart: a pixel's neighbours in its row then lie side by side.
        band = image[start:stop].transpose(0, 2, 1).astype(np.float64).reshape(-1, found_width)
        sums = np.empty((len(band), width))
        for block in across:
            sums[:, block.start : block.stop] = band[:, block.low : block.high] @ block.weights.T
        narrow[start - first : stop - first] = _rounded(sums).reshape(stop - start, channels, width)
    lines = narrow.reshape(len(narrow), channels * width)
    small = np.empty((height, channels, width), np.uint8)
    for block in down:
        sums = block.weights @ lines[block.low - first : block.high - first].astype(np.float64)
        small[block.start : block.stop] = _rounded(sums).reshape(-1, channels, width)
    return np.ascontiguousarray(small.transpose(0, 2, 1))


def to_grey(image: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """uint8 RGB [h, w, 3] -> luma of ITU-R 601 in 65536ths, rounded, [h, w, 1]."""
    grey = np.empty(image.shape[:2] + (1,), np.uint8)
    rows = max(1, _BAND_VALUES // image.shape[1])
    for start in range(0, len(image), rows):
        red, green, blue = image[start : start + rows].astype(np.uint32).transpose(2, 0, 1)
        grey[start : start + rows, :, 0] = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    return grey


@functools.lru_cache(maxsize=8)
def _blocks(size: int, low: float, high: float, wanted: int) -> List[_Block]:
    """How `wanted` results come from the inputs of one direction, of which [low, high) is taken.

    Remembered, since the next image often has the same size.
    """
    place, weights = _triangles(size, low, high, wanted)
    blocks = []
    for start in range(0, wanted, _STEP):
        here, used = place[start : start + _STEP], weights[start : start + _STEP]
        begin, end = int(here.min()), min(int(here.max()) + 1, size)
        row, tap = np.nonzero(used)
        dense = np.zeros((len(here), end - begin))
        dense[row, here[row, tap] - begin] = used[row, tap]
        blocks.append(_Block(start, start + len(here), begin, end, dense))
    return blocks


def _triangles(size: int, low: float, high: float, wanted: int) -> "Tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
    """The inputs of each result, [wanted, taps], and their weights: whole numbers of which _ONE means 1."""
    # The ends in single precision, as Pillow keeps them: a third of a pixel is rounded, and that moves weights.
    begin, end = np.float32(low), np.float32(high)
    scale = float(end - begin) / wanted
    reach = max(scale, 1.0)  # half a triangle's base: enlarging mixes the two nearest pixels
    centre = float(begin) + (np.arange(wanted) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + reach + 0.5).astype(np.int64), size)
    place = first[:, None] + np.arange((last - first).max())
    weights = np.maximum(1.0 - np.abs((place - centre[:, None] + 0.5) * (1.0 / reach)), 0.0)
    weights[place >= last[:, None]] = 0.0
    # One after the other: numpy's own sum adds in pairs, whose last digit differs.
    total = np.cumsum(weights, axis=1)[:, -1:]
    return place, np.floor(weights / total * _ONE + 0.5)


def _rounded(sums: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Weighted sums as uint8; rounded weights may add up to a little more than 1, hence the limit."""
    sums += _ONE // 2
    sums /= _ONE
    np.minimum(sums, 255.0, out=sums)
    return sums.astype(np.uint8)
