"""Is a file slower than another, and does a budget hold? From one latency a repeat, on machines that are never quiet.

An alarm needs an interval that lies wholly beyond the budget. Where it holds the budget nobody knows yet, and the
answer is *cannot tell*, with how many repeats would.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kdedge.intervals import rank_sum, signed_rank

__all__ = ["Slowdown", "Verdict", "judge", "repeats_wanted", "slowdown"]

Verdict = Literal["pass", "fail", "cannot tell"]
FEWEST_PAIRS, FEWEST_UNPAIRED = 6, 4
"""What signed ranks and rank sums need for 95 %."""
MOST_REPEATS = 1000
SESSION_DRIFT = 0.05
"""By how much a machine may differ from itself on another occasion. The repeats of a session say nothing of that, and
two equal files measured half an hour apart would be told from each other by it."""
SURELY = 1.96 / (1.96 + 0.84)
"""An interval just as wide as the way to the budget tells half of the time; so much narrower, four times of five."""


@dataclass(frozen=True)
class Slowdown:
    """Latency of new over base, less 1, with its 95 % interval; ends are None where the repeats are too few."""

    fraction: float
    low: float | None
    high: float | None
    repeats: int
    paired: bool


def slowdown(base_ms: Sequence[float], new_ms: Sequence[float], paired: bool) -> Slowdown:
    """From one latency a repeat. `paired`: repeat i of both was measured in turn, in one session.

    Ratios within a pair are free of the machine's drift; an unpaired interval knows the noise within each session, and
    is SESSION_DRIFT wider on either side. Either is made of ranks, so a few wild repeats move it little. ValueError
    without latencies, or pairs of different number.
    """
    if not base_ms or not new_ms or min(*base_ms, *new_ms) <= 0:
        raise ValueError("Latencies above 0, at least one of each, were expected.")
    if paired and len(base_ms) != len(new_ms):
        raise ValueError(f"{len(base_ms)} and {len(new_ms)} repeats are no pairs.")
    base, new = [math.log(each) for each in base_ms], [math.log(each) for each in new_ms]
    count = min(len(base), len(new))
    if count < (FEWEST_PAIRS if paired else FEWEST_UNPAIRED):
        point = _middle([after - before for before, after in zip(base, new, strict=True)] if paired else new)
        return Slowdown(math.expm1(point if paired else point - _middle(base)), None, None, count, paired)
    if paired:
        found = signed_rank([after - before for before, after in zip(base, new, strict=True)])
    else:
        centre, least, most = rank_sum(new, base)
        found = centre, least - SESSION_DRIFT, most + SESSION_DRIFT
    point, low, high = map(math.expm1, found)
    return Slowdown(point, low, high, count, paired)


def judge(low: float | None, high: float | None, budget: float) -> Verdict:
    """Of the interval of a loss: *fail* where all of it is above the budget, *pass* where none is."""
    if low is None or high is None:
        return "cannot tell"
    if low > budget:
        return "fail"
    return "pass" if high <= budget else "cannot tell"


def repeats_wanted(found: Slowdown, budget: float) -> int | None:
    """How many repeats in turn would tell, if noise and difference stay as they are; None where a thousand would not.

    An interval narrows with the root of the repeats, and it has to leave the budget outside. On another occasion the
    machine is another one, and no number of repeats makes up for it; in turn that part of the interval is gone.
    """
    if found.low is None or found.high is None:
        return FEWEST_PAIRS
    drift = 0.0 if found.paired else SESSION_DRIFT
    low, high = (math.expm1(math.log1p(end) + by) for end, by in ((found.low, drift), (found.high, -drift)))
    reach = SURELY * (budget - found.fraction)
    half = high - found.fraction if reach > 0 else found.fraction - low
    if reach == 0 or half * half * found.repeats > MOST_REPEATS * reach * reach:
        return None
    wanted = math.ceil(found.repeats * (half / reach) ** 2)
    return max(FEWEST_PAIRS, found.repeats + 1, wanted) if found.paired else max(FEWEST_PAIRS, wanted)


def _middle(values: Sequence[float]) -> float:
    ordered, count = sorted(values), len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
