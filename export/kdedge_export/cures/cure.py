"""The cures one after the other, each kept only where images that had no part in it say that it helps.

One scale an output channel of a weight is in every file; what one a weight would have cost is told first. Then comes
bias correction, and equalization is judged with it, since the shift of the means hides all else; AdaRound (which
corrects biases too) last, since it costs most. N images, K classes.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from kdedge.errors import ExportError
from kdedge_export.cpu.plan import Plan
from kdedge_export.cures.adaround import adaround
from kdedge_export.cures.bias_correction import correct_bias
from kdedge_export.cures.equalize import equalize
from kdedge_export.cures.sensitivity import divergences
from kdedge_export.cures.taps import Batches, set_constant
from kdedge_export.graph import Graph
from kdedge_export.table import RangeTable

__all__ = ["BY_CHANNEL", "Cured", "Effect", "cure", "partly_float"]

BY_CHANNEL = "one weight scale a channel"
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Effect:
    """One cure on the held-out slice: KL(FP32 || INT8) in nats and images of 100 given another class, before, after."""

    cure: str
    kept: bool
    divergence: tuple[float, float]
    disagreement_points: tuple[float, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "divergence": list(self.divergence),
            "disagreement_points": list(self.disagreement_points),
        }

    def __str__(self) -> str:
        return (
            f"{self.cure}: divergence {self.divergence[0]:.2g} -> {self.divergence[1]:.2g}, other class "
            f"{self.disagreement_points[0]:.2f} -> {self.disagreement_points[1]:.2f} of 100, "
            f"{'kept' if self.kept else 'not kept'}"
        )


@dataclass(frozen=True)
class Cured:
    """The float model and the table that INT8 files are to be written from, and what each cure did.

    `reference`: the float network that the INT8 file is near to. `model` in float is not: its biases make up for the
    rounding of its layers, and a layer that is not rounded has nothing to make up for (`partly_float`).
    """

    model: onnx.ModelProto
    reference: onnx.ModelProto
    table: RangeTable
    effects: tuple[Effect, ...]


def cure(
    model: onnx.ModelProto,
    plan: Plan,
    table: RangeTable,
    batches: Batches,
    *,
    logits: Callable[[onnx.ModelProto, RangeTable], Logits],
    fp32: Logits,
    recalibrate: Callable[[onnx.ModelProto], RangeTable],
    until_points: float = 1.0,
    say: Callable[[str], None] = lambda sentence: None,
) -> Cured:
    """`batches`: calibration images. `logits(model, table)`: of the INT8 file, and `fp32`, [N, K] on the held slice.

    The first effect is that of one scale a channel, which is kept whatever it did. A cure is kept where the mean
    divergence falls by more than its standard error, image by image. AdaRound is tried
    while more than `until_points` of 100 images of the slice get another class (0: always, unless none does; infinite:
    never). `recalibrate` gives the table of a model whose ranges have moved. `plan` holds for the result.
    """
    if len(fp32) == 0:
        return Cured(model, model, table, ())
    trial = _Trial(_Candidate(model, table, model), logits, fp32, say)
    trial.tell_by_channel()

    def biased() -> _Candidate:
        return _Candidate(correct_bias(model, plan, table, batches), table, model)

    def equalized() -> _Candidate:
        equal = equalize(model, batches)
        ranges = recalibrate(equal)
        return _Candidate(correct_bias(equal, plan, ranges, batches), ranges, equal)

    def rounded() -> _Candidate:
        best = trial.best
        found = adaround(best.model, plan, best.table, batches, best.reference, say=say)
        return _Candidate(found, best.table, best.reference)

    trial.attempt("bias correction", biased)
    trial.attempt("cross-layer equalization, then bias correction", equalized)
    if trial.points > until_points:
        trial.attempt("AdaRound", rounded)
    return Cured(trial.best.model, trial.best.reference, trial.best.table, tuple(trial.effects))


def partly_float(
    model: onnx.ModelProto,
    reference: onnx.ModelProto,
    plan: Plan,
    table: RangeTable,
    batches: Batches,
    leave_float: frozenset[str],
) -> onnx.ModelProto:
    """A cured `model` for the plan without `leave_float`: these have the weights of `reference` again, and the biases
    of all make up for the rounding of what is still rounded.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    original, nodes = Graph(reference), {node.name: node for node in copy.graph.node}
    for node in original.nodes:
        if node.op_type in ("Conv", "Gemm"):
            for place in range(1 if node.name in leave_float else 2, len(node.input)):
                value = original.constant(node.input[place])
                if value is not None:
                    set_constant(copy, nodes[node.name], place, value)
            if node.name in leave_float and len(node.input) < 3:  # the correction gave it a bias: none again
                del nodes[node.name].input[2:]
    return correct_bias(copy, plan, table, batches, reference)


@dataclass(frozen=True)
class _Candidate:
    """`reference`: the float network that `model` is to be near, tensor by tensor; `model` before it was corrected."""

    model: onnx.ModelProto
    table: RangeTable
    reference: onnx.ModelProto


class _Trial:
    """The best so far."""

    def __init__(
        self,
        first: _Candidate,
        logits: Callable[[onnx.ModelProto, RangeTable], Logits],
        fp32: Logits,
        say: Callable[[str], None],
    ) -> None:
        self.best, self.logits, self.fp32, self.say = first, logits, fp32, say
        self.effects: list[Effect] = []
        self.divergences, self.points = self._measured(first)

    def tell_by_channel(self) -> None:
        """What one scale a channel does beside one scale a weight, wide enough for its largest channel."""
        started = time.perf_counter()
        scales = self.best.table.weight_scales
        wide = {name: np.full_like(each, each.max(initial=0.0)) for name, each in scales.items()}
        coarse = replace(self.best, table=replace(self.best.table, weight_scales=wide))
        found, points = self._measured(coarse)
        self._note(
            BY_CHANNEL,
            True,
            (found.mean(), self.divergences.mean()),
            (points, self.points),
            time.perf_counter() - started,
        )

    def attempt(self, name: str, make: Callable[[], _Candidate]) -> None:
        started = time.perf_counter()
        try:
            candidate = make()
        except ExportError as error:  # an operator that torch has no word for here: INT8 files do without the cure
            self.say(f"{name} was left out: {error}")
            return
        seconds = time.perf_counter() - started
        found, points = self._measured(candidate)
        gain = self.divergences - found
        kept = bool(gain.mean() > gain.std() / np.sqrt(len(gain)))
        self._note(name, kept, (self.divergences.mean(), found.mean()), (self.points, points), seconds)
        if kept:
            self.best, self.divergences, self.points = candidate, found, points

    def _note(
        self, name: str, kept: bool, divergence: tuple[float, float], points: tuple[float, float], seconds: float
    ) -> None:
        effect = Effect(name, kept, (float(divergence[0]), float(divergence[1])), points, seconds)
        self.effects.append(effect)
        self.say(str(effect))

    def _measured(self, candidate: _Candidate) -> tuple[npt.NDArray[np.float64], float]:
        """KL of each image, and the points of disagreement."""
        found = self.logits(candidate.model, candidate.table)
        return divergences(self.fp32, found), 100 * float((found.argmax(1) != self.fp32.argmax(1)).mean())
