"""Intervals for accuracies: of one model (Wilson), and of the difference of two on the same images (Tango, McNemar).

Closed forms or bisection, no random draws: the same counts give the same interval on every machine.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from kdedge import intervals

__all__ = ["PairedDifference", "mcnemar_p", "paired_difference", "tango", "wilson"]


def wilson(correct: int, images: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval (Wilson 1927) of the share `correct / images`, as fractions.

    Raises ValueError where `images` is not positive or `correct` is not in 0..images.
    """
    if images <= 0 or not 0 <= correct <= images:
        raise ValueError(f"{correct} correct of {images} images is not a share.")
    return intervals.wilson(correct / images, images, _z(confidence))


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


def tango(first_only: int, second_only: int, pairs: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of (first_only - second_only) / pairs for paired shares (Tango 1998, eq. 3 to 6).

    A bootstrap has width zero where no pair is discordant, which is the usual case of INT8 against FP32; this has not.
    """
    if pairs <= 0 or first_only < 0 or second_only < 0 or first_only + second_only > pairs:
        raise ValueError(f"{first_only} and {second_only} discordant of {pairs} pairs is not possible.")
    z = _z(confidence)
    difference = (first_only - second_only) / pairs

    def score(delta: float) -> float:
        return _tango_score(first_only, second_only, pairs, delta)

    low = _bisect(lambda delta: score(delta) - z, -1.0, difference)
    high = _bisect(lambda delta: score(delta) + z, difference, 1.0)
    return low, high


def _tango_score(first_only: int, second_only: int, pairs: int, delta: float) -> float:
    """Standardised distance of the observed difference from `delta`; falls as `delta` grows."""
    linear = -first_only - second_only + (2 * pairs - first_only + second_only) * delta
    constant = -second_only * delta * (1 - delta)
    # Share of pairs where only the second is right, at its maximum likelihood given delta.
    share = (math.sqrt(max(linear * linear - 8 * pairs * constant, 0.0)) - linear) / (4 * pairs)
    variance = pairs * (2 * share + delta * (1 - delta))
    distance = first_only - second_only - pairs * delta
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def _bisect(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where `falling` crosses zero in [low, high]; an end where it does not cross."""
    for _ in range(80):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def mcnemar_p(only_base: int, only_new: int) -> float:
    """Exact two-sided McNemar: are the discordant images split like fair coin throws? 1.0 where there are none."""
    discordant = only_base + only_new
    # Sums of math.comb are exact integers, so that thousands of discordant images do not underflow.
    tail = sum(math.comb(discordant, k) for k in range(min(only_base, only_new) + 1))
    return min(1.0, 2 * tail / (1 << discordant))


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"The confidence is {confidence}; it must be between 0 and 1.")
    return NormalDist().inv_cdf((1 + confidence) / 2)
