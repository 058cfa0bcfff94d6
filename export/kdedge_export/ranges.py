"""From histograms to 8-bit ranges: three ways to choose, one table that every INT8 file is written from.

q = clamp(round(x / scale) + zero_point, 0, 255) and x' = (q - zero_point) * scale, so that 0 is always exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdedge_export.calibrate import Histogram
from kdedge_export.graph import Graph
from kdedge_export.plan import Plan

__all__ = ["CALIBRATORS", "Range", "choose_ranges", "minmax", "mse", "percentile", "quantize_weight"]

LEVELS = 255


@dataclass(frozen=True)
class Range:
    """An asymmetric 8-bit range; `low` <= 0 <= `high` are its ends as the codes 0 and 255 stand for them."""

    scale: float
    zero_point: int

    @classmethod
    def over(cls, low: float, high: float) -> "Range":
        """The range that holds [low, high] and 0. A tensor that is 0 everywhere gets scale 1."""
        low, high = min(0.0, low), max(0.0, high)
        scale = float(np.float32((high - low) / LEVELS))
        if scale < 1e-30:  # float32's smallest normal number is near; such a tensor is zero for all that matters
            return cls(1.0, 0)
        return cls(scale, int(np.clip(np.rint(-low / scale), 0, LEVELS)))

    @property
    def low(self) -> float:
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        return (LEVELS - self.zero_point) * self.scale

    def apply(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Quantize and dequantize."""
        codes = np.clip(np.rint(values / self.scale) + self.zero_point, 0, LEVELS)
        return np.asarray((codes - self.zero_point) * self.scale, dtype=np.float64)


def minmax(histogram: Histogram) -> tuple[float, float]:
    """Nothing is clipped."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, percent: float = 99.99) -> tuple[float, float]:
    """The share 100 - `percent` is clipped at each end that is not 0 anyway."""
    return min(0.0, histogram.quantile(1 - percent / 100)), max(0.0, histogram.quantile(percent / 100))


def mse(histogram: Histogram, steps: int = 40) -> tuple[float, float]:
    """The ends with the smallest mean squared error, found one end at a time between 20 % and all of the range."""
    low, high = min(0.0, histogram.low), max(0.0, histogram.high)
    shares = np.linspace(0.2, 1.0, steps)
    centres, counts = histogram.centres, histogram.counts.astype(np.float64)

    def error(ends: tuple[float, float]) -> float:
        return float((counts * (Range.over(*ends).apply(centres) - centres) ** 2).sum())

    best = (low, high)
    for _ in range(2):
        best = min(((best[0], share * high) for share in shares), key=error) if high > 0 else best
        best = min(((share * low, best[1]) for share in shares), key=error) if low < 0 else best
    return best


CALIBRATORS = {"minmax": minmax, "percentile-99.99": percentile, "mse": mse}


def choose_ranges(calibrator: str, plan: Plan, graph: Graph, histograms: Mapping[str, Histogram]) -> dict[str, Range]:
    """The range of every tensor of the plan; behind an absorbed activation it stays inside what that lets pass."""
    ranges: dict[str, Range] = {}
    for name in plan.tensors:
        source = plan.same_scale.get(name)
        if source is not None:
            ranges[name] = ranges[source]
            continue
        low, high = CALIBRATORS[calibrator](histograms[name])
        floor, ceiling = plan.limits(graph, name)
        ranges[name] = Range.over(max(low, floor), min(high, ceiling))
    return ranges


def quantize_weight(
    weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32] | None, input_scale: float
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.int32] | None]:
    """Symmetric per output channel (axis 0) to -127..127, and the bias to int32 in units of input scale x weight scale.

    A channel whose weights vanish beside its bias gets a coarser scale, else the bias would not fit into 32 bits.
    """
    rows = weight.reshape(len(weight), -1)
    scales = np.abs(rows).max(1).astype(np.float64) / 127
    if bias is not None:
        scales = np.maximum(scales, np.abs(bias.astype(np.float64)) / (input_scale * (2**31 - 512)))
    scales = np.where(scales < 1e-30, 1.0, scales).astype(np.float32)
    shape = (-1,) + (1,) * (weight.ndim - 1)
    codes = np.clip(np.rint(weight / scales.reshape(shape)), -127, 127).astype(np.int8)
    if bias is None:
        return codes, scales, None
    unit = np.float32(input_scale) * scales
    return codes, scales, np.clip(np.rint(bias / unit.astype(np.float64)), -(2**31), 2**31 - 1).astype(np.int32)
