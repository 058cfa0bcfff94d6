"""Intervals of a share, for every room."""

import math

__all__ = ["wilson"]


def wilson(share: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """Score interval (Wilson 1927) of a share of `count` trials, as fractions; z of 1.96 gives 95 %.

    Not the textbook p ± 1.96 s: that one has width zero at 0 and 1, which small samples do reach.
    """
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # At the ends the formula gives exactly 0 and 1, but for rounding.
    return 0.0 if share == 0 else middle - half, 1.0 if share == 1 else middle + half
