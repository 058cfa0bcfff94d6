"""Layers go back to float, the most sensitive first, until both sides of the gate hold. A search over callbacks.

Only prefixes of the order are tried (partial quantization, Wu et al. 2020, arXiv 2004.09602, section 5), and each try
costs seconds to minutes: doubling finds a prefix that is accurate enough, bisection the shortest one, since the fewer
layers are in float the faster the file is, nearly always. Speed is measured only of files that are accurate enough, and
of prefixes that double: of at most 1 + log2(1 + n / 2) files of n layers, seven for a hundred and fifty.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from kdedge_export.judging.gate import Agreement
from kdedge_export.judging.latency import Speedup

__all__ = ["Search", "Try", "search"]

C = TypeVar("C")


@dataclass(frozen=True)
class Try:
    """One file: its first `left_float` layers in float. `speedup` None: not measured, since it was not accurate."""

    left_float: int
    agreement: Agreement
    speedup: Speedup | None = None

    def to_json(self) -> dict[str, Any]:
        found = self.agreement
        interval = found.drop_interval_points
        return {
            "left_float": self.left_float,
            "drop_points": found.drop_points,
            "drop_points_interval": list(interval) if interval else None,
            "disagreement_points": found.disagreement_points,
            "divergence": found.divergence,
            **({"speedup": None, "speedup_interval": None} if self.speedup is None else self.speedup.to_json()),
        }


@dataclass(frozen=True)
class Search(Generic[C]):
    """The file to write, whether it may ship (`held`), and the way there. `why` is a sentence."""

    candidate: C
    left_float: tuple[str, ...]
    agreement: Agreement
    speedup: Speedup | None
    held: bool
    why: str
    tries: tuple[Try, ...]

    def to_json(self) -> dict[str, Any]:
        """For quantization.json: what was tried, in the order of trying."""
        return {
            "held": self.held,
            "left_float": list(self.left_float),
            "why": self.why,
            "tries": [each.to_json() for each in self.tries],
        }


def search(
    order: Callable[[], Sequence[str]],
    make: Callable[[frozenset[str]], C],
    accuracy: Callable[[C], Agreement],
    speed: Callable[[C], Speedup | None] | None,
    max_drop_points: float,
    say: Callable[[str], None] = lambda sentence: None,
) -> Search[C]:
    """The fastest file that keeps the budget, or else the one to be told of.

    `order`: layers, the most sensitive first; asked only where the file without any in float is not good enough.
    `accuracy(file)` and `speed(file)` are called once for each prefix at most; `make(leave_float)` again where a file
    is needed once more, since only one is held. `speed` None, and from the first None that it gives: the target cannot
    be measured, and accuracy alone decides. Where no prefix holds both, the file returned is the shortest accurate one,
    or the most accurate of all.
    """
    walk = _Walk(order, make, accuracy, speed, max_drop_points, say)
    if walk.accurate(0) and walk.fast(0):
        return walk.found(0, "All layers that can be quantized are.")
    if walk.tried[0].agreement.drop_points is None:
        return walk.found(0, "There are no gate images to decide on; all layers that can be quantized are.")
    shortest = 0 if walk.accurate(0) else walk.shortest_accurate()
    if shortest is None:
        best = min(walk.tried, key=lambda count: walk.tried[count].agreement.drop_points or 0.0)
        drop = walk.tried[best].agreement.drop_points
        return walk.found(
            best,
            f"No choice of layers in float keeps the budget of {max_drop_points:g} points: "
            f"the best of {len(walk.tried)} files, with {best} of {len(walk.layers)} in float, loses {drop:.2f}.",
        )
    # A layer that is slow in 8 bits (few channels, a lone one among float ones) can make the file faster by going back.
    before = 0.0
    for count in walk.from_here(shortest):
        if walk.accurate(count) and walk.fast(count):
            if walk.speed is None and count > shortest:
                return walk.found(
                    shortest,
                    f"With {shortest} of {len(walk.layers)} layers in float the file is no faster than FP32; whether "
                    "more of them make it so could not be measured any more.",
                )
            return walk.found(count, f"{count} of {len(walk.layers)} layers are in float, the most sensitive ones.")
        measured = walk.tried[count].speedup
        if measured is not None and measured.value <= before:
            break
        before = measured.value if measured is not None else before
    entry = walk.tried[shortest]
    assert entry.speedup is not None
    return walk.found(
        shortest,
        f"The budget of {max_drop_points:g} points holds only where the file is no faster than FP32: "
        f"with {shortest} of {len(walk.layers)} layers in float it loses {entry.agreement.drop_points:.2f} points at "
        f"{entry.speedup.value:.2f} times the speed of FP32.",
    )


class _Walk(Generic[C]):
    """What was tried so far, by the number of layers in float, so that nothing is made or measured twice."""

    def __init__(
        self,
        order: Callable[[], Sequence[str]],
        make: Callable[[frozenset[str]], C],
        accuracy: Callable[[C], Agreement],
        speed: Callable[[C], Speedup | None] | None,
        max_drop_points: float,
        say: Callable[[str], None],
    ) -> None:
        self.order, self.make, self.accuracy, self.speed = order, make, accuracy, speed
        self.max_drop_points, self.say = max_drop_points, say
        self.tried: dict[int, Try] = {}
        self._file: tuple[int, C] | None = None
        self._layers: tuple[str, ...] | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        if self._layers is None:
            self._layers = tuple(self.order())
        return self._layers

    def file(self, count: int) -> C:
        if self._file is None or self._file[0] != count:
            self._file = count, self.make(frozenset(self.layers[:count]) if count else frozenset())
        return self._file[1]

    def accurate(self, count: int) -> bool:
        if count not in self.tried:
            entry = Try(count, self.accuracy(self.file(count)))
            self.tried[count] = entry
            drop = entry.agreement.drop_points
            budget = f"{self.max_drop_points:g} allowed"
            told = "cannot be compared" if drop is None else f"is expected to lose {drop:.2f} points, {budget}"
            self.say(f"INT8 with {count or 'no'} layer{'s' if count != 1 else ''} left in float {told}")
        return self.tried[count].agreement.within(self.max_drop_points)

    def fast(self, count: int) -> bool:
        if self.speed is not None and self.tried[count].speedup is None:
            found = self.speed(self.file(count))
            if found is None:
                self.speed = None
                return True
            self.tried[count] = replace(self.tried[count], speedup=found)
            self.say(f"It runs at {found.value:.2f} times the speed of FP32 ({found.low:.2f} to {found.high:.2f})")
        measured = self.tried[count].speedup
        return self.speed is None if measured is None else measured.value >= 1.0

    def shortest_accurate(self) -> int | None:
        """By doubling, then bisection; None where not even the whole order but one layer is enough."""
        failed, last = 0, len(self.layers) - 1  # with all of them in float nothing of INT8 would be left
        count = 1
        while count <= last and not self.accurate(count):
            failed, count = count, min(2 * count, last) if count < last else last + 1
        if count > last:
            return None
        while count - failed > 1:
            middle = (failed + count) // 2
            if self.accurate(middle):
                count = middle
            else:
                failed = middle
        return count

    def from_here(self, shortest: int) -> list[int]:
        """The shortest accurate prefix, then longer ones by doubling, at most half of the layers."""
        counts, step = [shortest], max(1, shortest)
        while counts[-1] + step <= len(self.layers) // 2:
            counts.append(counts[-1] + step)
            step *= 2
        return counts

    def found(self, count: int, why: str) -> Search[C]:
        entry = self.tried[count]
        speedup = entry.speedup
        held = entry.agreement.within(self.max_drop_points)
        held = held and (self.speed is None if speedup is None else speedup.value >= 1.0)
        left = self.layers[:count] if count else ()
        return Search(self.file(count), left, entry.agreement, speedup, held, why, tuple(self.tried.values()))
