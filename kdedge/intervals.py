"""Intervals of a share, of the difference of two paired shares, and of a centre, for every room.

Closed forms, bisection or counting, no random draws: the same numbers give the same interval on every machine.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist, median

__all__ = ["newcombe", "quantile", "rank_sum", "signed_rank", "tango", "wilson"]

EXACT = 60  # draws; with more, counting every order takes seconds and changes nothing


def wilson(share: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """Score interval (Wilson 1927) of a share of `count` trials, as fractions; z of 1.96 gives 95 %.

    Not the textbook p ± 1.96 s: that one has width zero at 0 and 1, which small samples do reach.
    """
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # At the ends the formula gives exactly 0 and 1, but for rounding.
    return 0.0 if share == 0 else middle - half, 1.0 if share == 1 else middle + half


def newcombe(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Interval of the difference of two independent shares, each (share, count): Newcombe 1998, method 10.

    For two models on other images, or on the same ones where nobody wrote down which each got right.
    """
    (p, n), (q, m) = first, second
    low_p, high_p = wilson(p, n)
    low_q, high_q = wilson(q, m)
    difference = p - q
    return difference - math.hypot(p - low_p, high_q - q), difference + math.hypot(high_p - p, q - low_q)


def tango(first_only: int, second_only: int, pairs: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of (first_only - second_only) / pairs for paired shares (Tango 1998, eq. 3 to 6).

    A bootstrap has width zero where no pair is discordant, which is the usual case of INT8 against FP32; this has not.
    """
    if pairs <= 0 or first_only < 0 or second_only < 0 or first_only + second_only > pairs:
        raise ValueError(f"{first_only} and {second_only} discordant of {pairs} pairs is not possible.")
    z = quantile(confidence)
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


def signed_rank(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The centre of a symmetric distribution from draws of it, and its interval: (estimate, low, high).

    Median of the averages of all pairs, each value with itself among them (Hodges and Lehmann 1963); the interval holds
    what Wilcoxon's signed-rank test does not refuse. Exact whatever the tails, so a few wild values move it little; a
    mean with Student's t has neither. ValueError where so few values cannot be that sure: 6 are needed for 95 %.
    """
    averages = sorted((values[i] + values[j]) / 2 for i in range(len(values)) for j in range(i, len(values)))
    sums = _refused_sums if len(values) <= EXACT else _normal_sums
    cut = sums(len(values), (1 - confidence) / 2)
    if cut == 0:
        raise ValueError(f"{len(values)} values are too few for an interval of {confidence:.1%}.")
    return median(averages), averages[cut - 1], averages[-cut]


def rank_sum(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """How far the draws `first` lie above the draws `second`, and its interval: (estimate, low, high).

    Median of all differences (Hodges and Lehmann 1963); the interval holds the shifts that the exact rank-sum test of
    Mann and Whitney (1947) does not refuse. For draws that are not paired. ValueError where they are too few to be that
    sure: 4 and 4 are needed for 95 %.
    """
    differences = sorted(a - b for a in first for b in second)
    exact = max(len(first), len(second)) <= EXACT
    counts = _refused_counts if exact else _normal_counts
    cut = counts(len(first), len(second), (1 - confidence) / 2)
    if cut == 0:
        raise ValueError(f"{len(first)} and {len(second)} values are too few for an interval of {confidence:.1%}.")
    return median(differences), differences[cut - 1], differences[-cut]


def _normal_counts(first: int, second: int, tail: float) -> int:
    """The same from U's mean and variance, for many draws."""
    z = NormalDist().inv_cdf(1 - tail)
    return math.floor(first * second / 2 - z * math.sqrt(first * second * (first + second + 1) / 12))


def _normal_sums(count: int, tail: float) -> int:
    """As `_refused_sums`, from the rank sum's mean and variance, for many draws."""
    z = NormalDist().inv_cdf(1 - tail)
    return math.floor(count * (count + 1) / 4 - z * math.sqrt(count * (count + 1) * (2 * count + 1) / 24))


def _refused_counts(first: int, second: int, tail: float) -> int:
    """How many of the smallest values 0, 1, 2... of Mann and Whitney's U have together a probability of at most `tail`.

    The ways to get each value are the coefficients of a Gaussian binomial: a product of (1 - x^(second + i)) over one
    of (1 - x^i), i from 1 to `first`.
    """
    ways = [1] + [0] * (first * second)
    for i in range(1, first + 1):
        for place in range(len(ways) - 1, second + i - 1, -1):
            ways[place] -= ways[place - second - i]
        for place in range(i, len(ways)):
            ways[place] += ways[place - i]
    total, limit = 0, tail * math.comb(first + second, first)
    for place, each in enumerate(ways):
        total += each
        if total > limit:
            return place
    return len(ways)


def _refused_sums(count: int, tail: float) -> int:
    """How many of the smallest rank sums 0, 1, 2... have together a probability of at most `tail`."""
    ways = [1]  # of making each sum from a subset of the ranks so far
    for rank in range(1, count + 1):
        longer = [0] * rank + ways
        ways = [few + more for few, more in zip(ways + [0] * rank, longer, strict=True)]
    total = 0
    for place, each in enumerate(ways):
        total += each
        if total > tail * 2**count:
            return place
    return len(ways)


def quantile(confidence: float) -> float:
    """How many standard deviations of a normal distribution hold `confidence` of it, on both sides."""
    if not 0 < confidence < 1:
        raise ValueError(f"The confidence is {confidence}; it must be between 0 and 1.")
    return NormalDist().inv_cdf((1 + confidence) / 2)
