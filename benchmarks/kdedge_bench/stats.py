"""Intervals for accuracies: of one model (Wilson), and of the difference of two on the same images (Tango, McNemar)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdedge import intervals
from kdedge.intervals import tango

__all__ = ["PairedDifference", "mcnemar_p", "paired_difference", "tango", "wilson"]


def wilson(correct: int, images: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval (Wilson 1927) of the share `correct / images`, as fractions.

    Raises ValueError where `images` is not positive or `correct` is not in 0..images.
    """
    if images <= 0 or not 0 <= correct <= images:
        raise ValueError(f"{correct} correct of {images} images is not a share.")
    return intervals.wilson(correct / images, images, intervals.quantile(confidence))


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of `new` minus accuracy of `base` on the same images, as fractions."""

    difference: float
    low: float
    high: float
    only_base: int  # images that only the base gets right
    only_new: int
    images: int
    p_value: float  # exact McNemar, two-sided


def paired_difference(
    base_right: Sequence[bool] | npt.NDArray[Any],
    new_right: Sequence[bool] | npt.NDArray[Any],
    confidence: float = 0.95,
) -> PairedDifference:
    """Difference of two accuracies, one flag per image [N] for each model, in the same order.

    Two models that agree on most images differ far less by chance than two independent ones; the interval uses that.
    Raises ValueError where the lengths differ or are zero.
    """
    base, new = np.asarray(base_right, dtype=bool), np.asarray(new_right, dtype=bool)
    if base.shape != new.shape or base.ndim != 1 or not base.size:
        raise ValueError(f"Expected two flags per image of the same images, got shapes {base.shape} and {new.shape}.")
    only_base, only_new = int((base & ~new).sum()), int((~base & new).sum())
    low, high = tango(only_new, only_base, base.size, confidence)
    return PairedDifference(
        difference=(only_new - only_base) / base.size,
        low=low,
        high=high,
        only_base=only_base,
        only_new=only_new,
        images=base.size,
        p_value=mcnemar_p(only_base, only_new),
    )


def mcnemar_p(only_base: int, only_new: int) -> float:
    """Exact two-sided McNemar: are the discordant images split like fair coin throws? 1.0 where there are none."""
    discordant = only_base + only_new
    # Sums of math.comb are exact integers, so that thousands of discordant images do not underflow.
    tail = sum(math.comb(discordant, k) for k in range(min(only_base, only_new) + 1))
    return min(1.0, 2 * tail / (1 << discordant))
