"""How far a clock moved while something was timed, and from where on that speaks against the times.

Python 3.8, standard library.
"""

from typing import Any, Dict, Optional, Sequence

from kdedge_device.clock import MAX_VARIATION

__all__ = ["Span", "joined", "moved", "span"]

Span = Dict[str, Optional[float]]
"""MHz: {"min", "max", "p10", "p90"}. The last two leave out a tenth of the looks at either end; None if few."""

_FEWEST_LOOKS = 10
# A GPU's clock is set by a governor in steps of some 10 %; one that is measured, not set, moves by less than 1 %.
_GPU = 0.01
# A processor's governor (schedutil, and turbo) is never quite still, so that the outermost looks are left out, and its
# clock counts where it alone would make times that vary too much: they go with the clock, and two halves that lie 5 %
# apart deviate by 2.5 % from their mean.
_CPU = 2 * MAX_VARIATION


def span(looks: Sequence[float]) -> Optional[Span]:
    """Of clocks in MHz; None without any."""
    if not looks:
        return None
    ordered = sorted(looks)
    tenth = len(looks) // 10
    inner = (ordered[tenth], ordered[-1 - tenth]) if len(looks) >= _FEWEST_LOOKS else (None, None)
    return {"min": ordered[0], "max": ordered[-1], "p10": inner[0], "p90": inner[1]}


def joined(spans: Sequence[Optional[Span]]) -> Optional[Span]:
    """From the lowest to the highest of several; None where one of them is not known."""
    known = [each for each in spans if each is not None]
    if not known or len(known) < len(spans):
        return None
    return {key: _outermost(pick, [each.get(key) for each in known]) for key, pick in _PICKS.items()}


_PICKS: Dict[str, Any] = {"min": min, "max": max, "p10": min, "p90": max}


def _outermost(pick: Any, values: Sequence[Optional[float]]) -> Optional[float]:
    return None if None in values else pick(values)


def moved(which: Optional[str], found: Optional[Span], when: str = "") -> Optional[str]:
    """The sentence where the clock of the "gpu" or the "cpu" moved by more than it may; `when` as ", while ..."."""
    ends, most = (("min", "max"), _GPU) if which == "gpu" else (("p10", "p90"), _CPU)
    low, high = ((found or {}).get(end) for end in ends)
    if which is None or low is None or high is None or high - low <= most * high:
        return None
    if which == "gpu":
        return f"The GPU's clock moved between {low:.0f} and {high:.0f} MHz{when}; --set-clocks holds it still."
    return (
        f"The processor's clock moved between {low:.0f} and {high:.0f} MHz{when}, and {most:.0%} is the most that is "
        "called stable: --set-clocks on a Jetson, or the governor 'performance', holds it still."
    )
