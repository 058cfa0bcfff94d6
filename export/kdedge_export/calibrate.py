"""What values the tensors of a float model take on real images: minimum, maximum and a histogram of each.

Two passes over the images: the first finds the limits, the second counts between them. So memory is bounded whatever
the number of images, and a bin means the same for every batch, whatever the batch size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from kdedge.errors import DataError, ExportError
from kdedge_device.preprocess import Preprocess
from kdedge_export.sessions import open_session

__all__ = ["BINS", "Histogram", "calibrate"]

BINS = 4096  # sixteen bins for each of the 256 codes
VALUES = 16384  # counted of one tensor of one image, evenly over it; the limits look at all
BATCH_BYTES = 64 << 20  # of all watched tensors together


@dataclass(frozen=True)
class Histogram:
    """`counts` int64 [BINS] of values in equal bins from `low` to `high`, the exact extremes."""

    low: float
    high: float
    counts: npt.NDArray[np.int64]

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        width = (self.high - self.low) / len(self.counts)
        return np.asarray(self.low + width * (np.arange(len(self.counts)) + 0.5), dtype=np.float64)

    def quantile(self, fraction: float) -> float:
        """The value that `fraction` of all values do not exceed, interpolated inside its bin."""
        cumulative = np.concatenate([[0], np.cumsum(self.counts)]) / self.counts.sum()
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        index = int(np.searchsorted(cumulative, fraction, side="left"))
        if index == 0:
            return self.low
        before, after = cumulative[index - 1], cumulative[index]
        share = (fraction - before) / (after - before) if after > before else 1.0
        return float(edges[index - 1] + share * (edges[index] - edges[index - 1]))


def calibrate(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    images: npt.NDArray[np.uint8],
    preprocess: Preprocess,
    threads: int = 1,
    batch_bytes: int = BATCH_BYTES,
) -> dict[str, Histogram]:
    """The histogram of each of `tensors` over `images` uint8 [N, H, W, C].

    DataError without images; ExportError where a value is not finite.
    """
    if len(images) == 0:
        raise DataError("There are no images to calibrate on; INT8 needs some training or unlabeled images.")
    watched = [name for name in tensors if name != model.graph.input[0].name]
    session = open_session(_with_outputs(model, watched), threads)

    def batches(size: int) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
        for start in range(0, len(images), size):
            batch = preprocess.normalize(images[start : start + size])
            values = session.run(watched, {session.get_inputs()[0].name: batch}) if watched else []
            yield {model.graph.input[0].name: batch, **dict(zip(watched, values, strict=True))}

    one = sum(value.nbytes for value in next(batches(1)).values())
    size = int(min(64, max(1, batch_bytes // one)))
    limits = _limits(batches(size), tensors)
    counts = {name: np.zeros(BINS, np.int64) for name in tensors}
    for values in batches(size):
        for name in tensors:
            counts[name] += _count(values[name], *limits[name])
    return {name: Histogram(*limits[name], counts[name]) for name in tensors}


def _limits(
    batches: Iterator[dict[str, npt.NDArray[np.float32]]], tensors: Sequence[str]
) -> dict[str, tuple[float, float]]:
    limits = dict.fromkeys(tensors, (np.inf, -np.inf))
    for values in batches:
        for name in tensors:
            low, high = float(values[name].min()), float(values[name].max())
            if not np.isfinite([low, high]).all():
                raise ExportError(
                    f"The tensor {name} takes the values {low} to {high}; finite ones were expected. Train again."
                )
            limits[name] = (min(limits[name][0], low), max(limits[name][1], high))
    return limits


def _count(values: npt.NDArray[np.float32], low: float, high: float) -> npt.NDArray[np.int64]:
    sampled = _sample(values.reshape(len(values), -1))
    if not high > low:
        counts = np.zeros(BINS, np.int64)
        counts[0] = sampled.size
        return counts
    index = ((sampled - np.float32(low)) * np.float32(BINS / (high - low))).astype(np.int32)
    return np.bincount(np.clip(index, 0, BINS - 1), minlength=BINS)


def _sample(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """About VALUES of each image [N, size], in steps that share no factor with its size: every column has its turn."""
    step = max(1, values.shape[1] // VALUES)
    while math.gcd(step, values.shape[1]) > 1:
        step += 1
    return values[:, ::step].ravel()


def _with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> bytes:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {each.name for each in copy.graph.output}
    copy.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors if name not in known
    )
    return bytes(copy.SerializeToString())
