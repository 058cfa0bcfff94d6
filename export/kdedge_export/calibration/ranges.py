"""From histograms to spans: six ways to choose what a tensor keeps."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

from kdedge_export.calibration.histogram import SIDE, Histogram
from kdedge_export.cpu.plan import Plan
from kdedge_export.graph import Graph
from kdedge_export.table import U8, RangeTable, Span, natural_weight_scales, s8_scale

__all__ = [
    "CALIBRATORS",
    "IMAGE_CALIBRATORS",
    "S8_CALIBRATORS",
    "Form",
    "choose_spans",
    "entropy",
    "make_table",
    "measured",
    "minmax",
    "most_images",
    "mse",
    "percentile",
    "quantize_weight",
    "s8_mse",
    "seen",
    "squared_error",
    "with_zero",
]

Form = Literal["u8", "s8"]
"""What a span becomes: U8 with a zero point, or symmetric S8."""
STEPS, LEAST_SHARE = 40, 0.2  # of the search for the smallest squared error: ends tried, and the least of them
EMPTY = 1e-4  # of a value, in a group of bins that holds none
Levels = npt.NDArray[np.float64]


def minmax(histogram: Histogram) -> Span:
    """Nothing is clipped."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, percent: float) -> Span:
    """The share 100 - `percent` is clipped at each end that is not 0 anyway."""
    return min(0.0, histogram.quantile(1 - percent / 100)), max(0.0, histogram.quantile(percent / 100))


def most_images(histogram: Histogram, percent: float) -> Span:
    """Nothing is clipped of `percent` of the images, at either end."""
    return histogram.of_images(percent / 100)


def mse(histogram: Histogram, steps: int = STEPS) -> Span:
    """The ends with the smallest mean squared error, found one end at a time between 20 % and all of the range."""
    low, high = min(0.0, histogram.low), max(0.0, histogram.high)
    shares = np.linspace(LEAST_SHARE, 1.0, steps)
    error = squared_error(histogram)
    best = (low, high)
    for _ in range(2):
        best = min(((best[0], float(share) * high) for share in shares), key=error) if high > 0 else best
        best = min(((float(share) * low, best[1]) for share in shares), key=error) if low < 0 else best
    return best


def s8_mse(histogram: Histogram, steps: int = STEPS) -> Span:
    """The magnitude with the smallest mean squared error in symmetric 8 bits; each end keeps no more than was seen."""
    most = max(-histogram.low, histogram.high)
    error = squared_error(histogram, "s8")
    ends = [float(share) * most for share in np.linspace(LEAST_SHARE, 1.0, steps)]
    best = min(ends, key=lambda end: error((-end, end)))
    return max(histogram.low, -best), min(histogram.high, best)


def squared_error(histogram: Histogram, form: Form = "u8") -> Callable[[Span], float]:
    """A function from a span to the mean squared error of its 8-bit form over the values that were counted."""
    filled = np.flatnonzero(histogram.counts)
    centres, counts = histogram.centres[filled], histogram.counts[filled].astype(np.float64)
    rounded = _s8 if form == "s8" else lambda span, values: U8.over(span).apply(values)
    return lambda span: float((counts * (rounded(span, centres) - centres) ** 2).sum() / counts.sum())


def _s8(span: Span, values: Levels) -> Levels:
    scale = s8_scale(span)
    return np.asarray(np.clip(np.rint(values / scale), -128, 127) * scale, np.float64)


def entropy(histogram: Histogram, stride: int = 16) -> Span:
    """The magnitude whose 8-bit form has the smallest KL divergence from what was seen (Migacz, "8-bit Inference with
    TensorRT", GTC 2017), tried every `stride` bins; each end keeps no more than was seen.

    P is the histogram of magnitudes up to a threshold, with all beyond it in its last bin. Q is the same without what
    is beyond, in as many groups as there are codes, each spread evenly over those of its bins that P fills. Values in
    the bin of 0 count as those beside it: 0 itself is exact at every scale, and often most of a tensor.
    """
    magnitudes = histogram.counts[SIDE - 1 :].astype(np.float64)
    magnitudes[1:] += histogram.counts[SIDE - 2 :: -1]
    magnitudes[0] = magnitudes[1]
    codes = 128 if histogram.low < 0 < histogram.high else 256
    last = int(np.max(np.flatnonzero(magnitudes), initial=0)) + 1
    half = (
        int(np.searchsorted(np.cumsum(magnitudes), magnitudes.sum() / 2)) + 1
    )  # less would be no threshold for a tail
    ends = np.array([*range(max(codes, half), last, stride), last])
    best = int(ends[np.argmin(_divergences(magnitudes, ends, codes))]) if len(ends) > 1 else last
    if best == last:
        return histogram.low, histogram.high
    threshold = best * histogram.width
    return max(histogram.low, -threshold), min(histogram.high, threshold)


def _divergences(magnitudes: Levels, ends: npt.NDArray[np.int64], codes: int) -> Levels:
    """KL(P || Q) in nats of `entropy` for thresholds after `ends` bins; P and Q are normalised, each for itself.

    Sums over bins are differences of running sums, so a threshold costs as much as it has codes.
    """
    total, kept = magnitudes.sum(), _running(magnitudes)[ends]
    beyond, last = total - kept, magnitudes[ends - 1]
    logs = _running(_x_log_x(magnitudes))[ends] - _x_log_x(last) + _x_log_x(last + beyond)
    borders = np.arange(codes + 1) * ends[:, None] // codes
    q_groups = np.diff(_running(magnitudes)[borders])
    filled = np.diff(_running(magnitudes > 0)[borders])
    p_groups = q_groups.copy()
    p_groups[:, -1] += beyond
    filled[:, -1] += (last == 0) & (beyond > 0)
    # Where only what is beyond the threshold lies, Q would be 0 and no gap before an outlier could be the threshold.
    q_groups = np.where(p_groups > 0, np.maximum(q_groups, EMPTY), 0.0)
    q_bins = q_groups / np.maximum(filled, 1) / q_groups.sum(1, keepdims=True)
    cross = (p_groups * np.log(np.where(p_groups > 0, q_bins, 1.0))).sum(1)
    return np.asarray((logs - cross) / total - np.log(total), np.float64)


def _running(values: npt.NDArray[Any]) -> Levels:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _x_log_x(values: Levels) -> Levels:
    return np.asarray(values * np.log(np.where(values > 0, values, 1.0)), np.float64)


CALIBRATORS: dict[str, Callable[[Histogram], Span]] = {
    "minmax": minmax,
    "percentile-99.9": partial(percentile, percent=99.9),
    "percentile-99.99": partial(percentile, percent=99.99),
    "percentile-99.999": partial(percentile, percent=99.999),
    "entropy": entropy,
    "mse": mse,
}
IMAGE_CALIBRATORS: dict[str, Callable[[Histogram], Span]] = {
    "minmax": minmax,
    "images-98": partial(most_images, percent=98),
    "images-95": partial(most_images, percent=95),
    "images-90": partial(most_images, percent=90),
}
"""Where images differ in size: few values of most images are clipped, or many of few. The widest first, for ties."""
S8_CALIBRATORS = {**CALIBRATORS, "mse": s8_mse}
"""The same for symmetric 8 bits."""


def measured(plan: Plan) -> list[str]:
    """The tensors of the plan whose span is to be seen: no follower of another's scale, none that the graph tells."""
    return [name for name in plan.tensors if name not in plan.same_scale and name not in plan.known]


def seen(plan: Plan, graph: Graph, tensor: str, histogram: Histogram) -> Histogram:
    """`histogram` of `tensor` as far as it matters: clipped as the activation absorbed in front of it, or its readers,
    clip it. What they do not tell apart must not widen a range.
    """
    return histogram.within(*plan.limits(graph, tensor))


def with_zero(span: Span) -> Span:
    return min(0.0, span[0]), max(0.0, span[1])


def choose_spans(calibrator: str, plan: Plan, graph: Graph, histograms: Mapping[str, Histogram]) -> dict[str, Span]:
    """The span of every tensor of the plan, by one way for all."""
    way = CALIBRATORS[calibrator]
    chosen = {name: with_zero(way(seen(plan, graph, name, histograms[name]))) for name in measured(plan)} | plan.known
    return {name: chosen[plan.same_scale.get(name, name)] for name in plan.tensors}


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
