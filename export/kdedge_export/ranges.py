"""From histograms to spans: three ways to choose what a tensor keeps."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx

from kdedge_export.calibrate import Histogram
from kdedge_export.graph import Graph
from kdedge_export.plan import Plan
from kdedge_export.table import U8, RangeTable, Span, natural_weight_scales

__all__ = ["CALIBRATORS", "choose_spans", "make_table", "minmax", "mse", "percentile", "quantize_weight"]


def minmax(histogram: Histogram) -> Span:
    """Nothing is clipped."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, percent: float = 99.99) -> Span:
    """The share 100 - `percent` is clipped at each end that is not 0 anyway."""
    return min(0.0, histogram.quantile(1 - percent / 100)), max(0.0, histogram.quantile(percent / 100))


def mse(histogram: Histogram, steps: int = 40) -> Span:
    """The ends with the smallest mean squared error, found one end at a time between 20 % and all of the range."""
    low, high = min(0.0, histogram.low), max(0.0, histogram.high)
    shares = np.linspace(0.2, 1.0, steps)
    centres, counts = histogram.centres, histogram.counts.astype(np.float64)

    def error(ends: Span) -> float:
        return float((counts * (U8.over(ends).apply(centres) - centres) ** 2).sum())

    best = (low, high)
    for _ in range(2):
        best = min(((best[0], share * high) for share in shares), key=error) if high > 0 else best
        best = min(((share * low, best[1]) for share in shares), key=error) if low < 0 else best
    return best


CALIBRATORS = {"minmax": minmax, "percentile-99.99": percentile, "mse": mse}


def choose_spans(calibrator: str, plan: Plan, graph: Graph, histograms: Mapping[str, Histogram]) -> dict[str, Span]:
    """The span of every tensor of the plan; behind an absorbed activation it stays inside what that lets pass."""
    spans: dict[str, Span] = {}
    for name in plan.tensors:
        source = plan.same_scale.get(name)
        if source is not None:
            spans[name] = spans[source]
            continue
        low, high = CALIBRATORS[calibrator](histograms[name])
        floor, ceiling = plan.limits(graph, name)
        spans[name] = (min(0.0, max(low, floor)), max(0.0, min(high, ceiling)))
    return spans


def make_table(calibrator: str, model: onnx.ModelProto, plan: Plan, histograms: Mapping[str, Histogram]) -> RangeTable:
    """One way of choosing for all tensors, and the weights' own scales."""
    spans = choose_spans(calibrator, plan, Graph(model), histograms)
    return RangeTable(spans, natural_weight_scales(model, plan.layers))


def quantize_weight(
    weight: npt.NDArray[np.float32],
    scales: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32] | None,
    input_scale: float,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.int32] | None]:
    """Codes -127..127 of `weight` at `scales` (one an output channel, axis 0), the scales, and the bias as int32.

    The bias counts in input scale x weight scale. A channel whose weights vanish beside its bias gets a coarser scale
    than it was given, else the bias would not fit into 32 bits.
    """
    if bias is not None:
        floor = np.abs(bias.astype(np.float64)) / (input_scale * (2**31 - 512))
        scales = np.maximum(scales, floor).astype(np.float32)
    shape = (-1,) + (1,) * (weight.ndim - 1)
    codes = np.clip(np.rint(weight / scales.reshape(shape)), -127, 127).astype(np.int8)
    if bias is None:
        return codes, scales, None
    unit = np.float32(input_scale) * scales
    return codes, scales, np.clip(np.rint(bias / unit.astype(np.float64)), -(2**31), 2**31 - 1).astype(np.int32)
