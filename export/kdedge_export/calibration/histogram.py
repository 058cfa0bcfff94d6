"""Histograms of what a tensor takes, counted while the values stream by; neither order nor batches change the result.

A bin is w = 2^k wide, and k follows from the largest magnitude seen so far: it lies in bins SIDE / 2 to SIDE - 1. When
a larger value comes, two neighbours become one, until it fits. A value x belongs to bin trunc(x / w): dividing a
float32 by a power of two is exact, and trunc(trunc(y) / 2) = trunc(y / 2), so merged bins are those that the wider
grid would have counted itself. All state is integers and exact extremes; there is nothing that rounds.
"""

import math
from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdedge.errors import ExportError

__all__ = ["BINS", "SIDE", "VALUES", "Histogram", "Tally", "sample"]

SIDE = 4096  # bins on each side of 0, which belongs to both: 8 to 16 for each of the 256 codes of a one-sided tensor
BINS = 2 * SIDE - 1
VALUES = 16384  # counted of one tensor of one image, evenly over it; the extremes look at all
LEAST_EXPONENT = -126  # narrower bins would need a factor that float32 does not have

Counts = npt.NDArray[np.int64]
Ends = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Histogram:
    """`counts` int64 [BINS] of values in bins 2^exponent wide, the middle one, around 0, twice that; exact extremes.

    `ends` float32 [2, N]: the least values of the N images, ascending, and the largest.
    """

    low: float
    high: float
    exponent: int
    counts: Counts
    ends: Ends

    @property
    def width(self) -> float:
        return math.ldexp(1.0, self.exponent)

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """[BINS + 1]; no edge lies outside of the extremes."""
        positive = self.width * np.arange(1, SIDE + 1)
        return np.asarray(np.clip(np.concatenate([-positive[::-1], positive]), self.low, self.high), np.float64)

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        """[BINS]; the middle bin stands for 0 where the values hold it."""
        edges = self.edges
        centres = np.asarray((edges[:-1] + edges[1:]) / 2, dtype=np.float64)
        if self.low <= 0.0 <= self.high:
            centres[SIDE - 1] = 0.0
        return centres

    def quantile(self, fraction: float) -> float:
        """The value that `fraction` of all values do not exceed, interpolated inside its bin."""
        cumulative = np.concatenate([[0], np.cumsum(self.counts)]) / self.counts.sum()
        index = int(np.searchsorted(cumulative, fraction, side="left"))
        if index == 0:
            return self.low
        edges, before, after = self.edges, cumulative[index - 1], cumulative[index]
        share = (fraction - before) / (after - before)
        return float(edges[index - 1] + share * (edges[index] - edges[index - 1]))

    def of_images(self, fraction: float) -> tuple[float, float]:
        """(low, high): at either end, no value of `fraction` of the images lies beyond."""
        place = max(0, math.ceil(fraction * self.ends.shape[1] - 1e-9) - 1)
        return float(self.ends[0, -1 - place]), float(self.ends[1, place])

    def within(self, low: float, high: float) -> "Histogram":
        """The histogram of the same values, clipped to low..high, which holds 0."""
        if low <= self.low and self.high <= high:
            return self
        ends = [float(np.clip(end, low, high)) for end in (self.low, self.high)]
        first, last = (SIDE - 1 + math.trunc(end / self.width) for end in ends)
        counts = self.counts.copy()
        counts[:first], counts[last + 1 :] = 0, 0
        counts[first] += self.counts[:first].sum()
        counts[last] += self.counts[last + 1 :].sum()
        return Histogram(ends[0], ends[1], self.exponent, counts, np.clip(self.ends, ends[0], ends[1]))


class Tally:
    """The histogram of one tensor while it is counted."""

    def __init__(self, tensor: str) -> None:
        self.tensor = tensor
        self.lows, self.highs = array("f"), array("f")  # of each image: 8 bytes, where a list takes 64
        self.exponent = LEAST_EXPONENT
        self.counts: Counts = np.zeros(BINS, np.int64)

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count the values of one image, of any shape. ExportError where one is not finite."""
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ExportError(
                f"The tensor {self.tensor} takes the values {low} to {high}; finite ones were expected. Train again."
            )
        self.lows.append(low)
        self.highs.append(high)
        self._widen(_exponent(max(-low, high)))
        factor = np.float32(math.ldexp(1.0, -self.exponent))
        index = (sample(values.ravel()) * factor).astype(np.int32)  # towards 0
        first = int(np.float32(low) * factor)
        found = np.bincount(index - first)
        start = SIDE - 1 + first
        self.counts[start : start + len(found)] += found

    def _widen(self, exponent: int) -> None:
        for _ in range(exponent - self.exponent):
            if not self.counts.any():
                break
            self.counts = _folded(self.counts)
        self.exponent = max(exponent, self.exponent)

    def histogram(self) -> Histogram:
        ends = np.sort(np.array([self.lows, self.highs], np.float32), axis=1)  # so that the order of images is lost
        return Histogram(float(ends[0, 0]), float(ends[1, -1]), self.exponent, self.counts.copy(), ends)


def sample(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """About VALUES of an image's values [size], in steps that share no factor with it: every column has its turn."""
    step = max(1, len(values) // VALUES)
    while math.gcd(step, len(values)) > 1:
        step += 1
    return values[::step]


def _exponent(magnitude: float) -> int:
    """The least k for which `magnitude` / 2^k is below SIDE."""
    return max(LEAST_EXPONENT, math.frexp(magnitude)[1] - SIDE.bit_length() + 1) if magnitude else LEAST_EXPONENT


def _folded(counts: Counts) -> Counts:
    """Bins of twice the width: i goes to trunc(i / 2), on both sides of 0."""
    folded = np.zeros(BINS, np.int64)
    half = SIDE // 2
    positive = counts[SIDE - 1 :]
    negative = np.concatenate([[0], counts[SIDE - 2 :: -1]])  # of bins 0, -1, -2 ...; 0 is counted with the positive
    folded[SIDE - 1 : SIDE - 1 + half] = positive.reshape(half, 2).sum(1)
    folded[half:SIDE] += negative.reshape(half, 2).sum(1)[::-1]
    return folded
