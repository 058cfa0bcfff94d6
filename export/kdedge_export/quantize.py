"""Float ONNX -> the numbers of its INT8 files: calibrated, cured, trained where asked, and layers given back to float.

Every choice is made on the gate split, against the float file: of two ways that whose outputs diverge less; of the
layers as few in float as the budget asks for. Numbers are a float model and a range table; with a plan they are a file.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import onnx

from kdedge.errors import RunError
from kdedge_device.preprocess import Preprocess
from kdedge_export.calibration.calibrate import calibrate
from kdedge_export.calibration.choose import Choice, choose_s8_spans, choose_spans_per_tensor
from kdedge_export.calibration.histogram import Histogram
from kdedge_export.calibration.ranges import choose_spans, measured
from kdedge_export.cpu.cpu_form import cpu_form, trt_form
from kdedge_export.cpu.lint import lint_int8, require_clean
from kdedge_export.cpu.plan import Plan, make_plan
from kdedge_export.cpu.qdq import write_int8
from kdedge_export.cures.cure import cure, partly_float
from kdedge_export.cures.sensitivity import sensitivity
from kdedge_export.graph import Graph
from kdedge_export.images import Part
from kdedge_export.judging.fallback import Search, search
from kdedge_export.judging.gate import Agreement, agreement
from kdedge_export.judging.latency import Speedup
from kdedge_export.stored import Stored, store
from kdedge_export.table import RangeTable, natural_weight_scales
from kdedge_export.trt.plan import make_trt_plan

__all__ = ["GateImages", "Numbers", "Quantized", "Speed", "Train", "quantize"]

SCHEMA = 2
CURE_IMAGES = 256  # of the calibration images: cures pass over them many times
TRAINED = "trained"
UNIFORM, BY_IMAGES = "mse", "calibrated, by images"
Say = Callable[[str], None]
Logits = npt.NDArray[np.float32]
Speed = Callable[[onnx.ModelProto], Speedup | None]
"""FP32's latency over that of a file; None where the machine cannot tell any more."""
Train = Callable[[onnx.ModelProto, Plan, RangeTable], tuple[onnx.ModelProto, RangeTable]]
"""Quantization-aware training: from the numbers of calibration to trained ones."""


@dataclass(frozen=True)
class GateImages:
    """The gate split, decoded; `labels` -1 where the class is not known; `fp32`: the float file's logits [N, K]."""

    images: Stored
    labels: npt.NDArray[np.int64]
    fp32: Logits
    threads: int

    def logits(self, model: onnx.ModelProto) -> Logits:
        return self.images.logits(model.SerializeToString(), self.threads)

    def agreement(self, model: onnx.ModelProto) -> Agreement:
        return agreement(self.fp32, self.logits(model), self.labels)


@dataclass(frozen=True)
class Numbers:
    """One way to the INT8 files. `model` is float, in the CPU form; `found`: with all quantized that can be.

    `reference`: the float network whose answers are meant; another than `model` where that makes up for its rounding.
    """

    name: str
    model: onnx.ModelProto
    reference: onnx.ModelProto
    table: RangeTable
    found: Agreement

    @property
    def badness(self) -> float:
        """The divergence: finer than lost points, which are few. Without gate images all ways are equal."""
        divergence = self.found.divergence or 0.0
        return divergence if math.isfinite(divergence) else math.inf


@dataclass(frozen=True)
class Quantized:
    """The file for ONNX Runtime on a CPU (`model`), and what the other forms are written from.

    `made_of`: the float model it is made of, as `numbers.model` with biases for the layers that are still rounded.
    """

    model: onnx.ModelProto
    made_of: onnx.ModelProto
    numbers: Numbers
    plan: Plan
    searched: Search[onnx.ModelProto]
    left_for_accuracy: frozenset[str]
    document: dict[str, Any]


def quantize(
    model: onnx.ModelProto,
    preprocess: Preprocess,
    calibration: Part,
    gate: GateImages,
    *,
    max_drop_points: float,
    speed: Speed | None,
    train: Train | None,
    scratch: Path,
    state: Path,
    say: Say,
    timed_on: str = "this machine",
) -> Quantized:
    """From the float `model` in opset 17 to the numbers of its INT8 files.

    `speed`: on the machine that `timed_on` names; None where no target can be measured. `train`: None without QAT.
    `scratch`: a folder for images. `state`: a file that an interrupted calibration goes on from. DataError without
    images to calibrate on.
    """
    form = cpu_form(model)
    maker = _Maker(make_plan(form), preprocess, calibration, gate, scratch, state, say)
    ways = maker.calibrated(form)
    ways += maker.cured(_best(ways), max_drop_points)
    if train is not None and not len(gate.images):
        say("There are no gate images to tell whether QAT helps, so it is left out")
    elif train is not None:
        ways += maker.trained(_best(ways), train)
    best = _best(ways)
    if len(ways) > 1:
        say(_told(ways, best))
    searched = maker.search(best, speed, max_drop_points)
    untrained = _best([way for way in ways if way.name != TRAINED])
    if not searched.held and best is not untrained:
        # Trained weights have learned to be rounded: in float they are another network, and no way back to FP32.
        of_trained = maker.sensitivity
        again = maker.search(untrained, speed, max_drop_points)
        if again.held:
            best, searched = untrained, again
        else:
            maker.sensitivity = of_trained
    plan = make_plan(best.model, frozenset(searched.left_float))
    enough = [each.left_float for each in searched.tries if each.agreement.within(max_drop_points)]
    left = frozenset(searched.left_float[: min(enough)] if enough else searched.left_float)
    document = maker.document(ways, best, plan, searched)
    document["fallback"]["timed_on"] = timed_on if any(each.speedup for each in searched.tries) else None
    document["kept_float"] = _why_float(plan, searched, left, timed_on)
    made_of = maker.partly_float(best, frozenset(searched.left_float))
    return Quantized(searched.candidate, made_of, best, plan, searched, left, document)


def _best(ways: list[Numbers]) -> Numbers:
    """The first of those that diverge least."""
    return min(ways, key=lambda way: way.badness)


def _why_float(
    plan: Plan, searched: Search[onnx.ModelProto], accuracy: frozenset[str], timed_on: str
) -> dict[str, str]:
    """By layer in float, why; of those that the search gave back, which side of the gate asked for it."""
    for_speed = f"left in float for speed: with it in 8 bits the file was no faster than FP32 on {timed_on}"
    for_accuracy = "left in float for accuracy: of those in 8 bits it was among the layers that lose most"
    given = {name: for_accuracy if name in accuracy else for_speed for name in searched.left_float}
    return {name: given.get(name, why) for name, why in plan.kept_float.items()}


def _told(ways: list[Numbers], best: Numbers) -> str:
    rows = ", ".join(f"{way.name} {way.badness:.2g} ({way.found.drop_points or 0:.2f} points)" for way in ways)
    trained = f", {TRAINED} is not better" if ways[-1].name == TRAINED and best is not ways[-1] else ""
    return f"Divergence from FP32 on the gate images: {rows}; {best.name} is kept{trained}"


@final
class _Maker:
    """Makes the ways and keeps what is told of them: seconds, effects, where each range comes from."""

    def __init__(
        self,
        plan: Plan,
        preprocess: Preprocess,
        calibration: Part,
        gate: GateImages,
        scratch: Path,
        state: Path,
        say: Say,
    ) -> None:
        self.plan, self.preprocess, self.calibration = plan, preprocess, calibration
        self.gate, self.state, self.say = gate, state, say
        self.counted, held = calibration.hold_out()
        self.held = store(held, preprocess, scratch / "held.npy")
        self.cure_images = store(self.counted, preprocess, scratch / "cures.npy", most=CURE_IMAGES)
        self.seconds: dict[str, float] = {}
        self.effects: list[dict[str, Any]] = []
        self.sensitivity: list[dict[str, Any]] = []
        self.calibrations: list[tuple[RangeTable, Mapping[str, Histogram], Choice]] = []
        # The last one made: correcting biases takes seconds, and the file a search ends with is asked for again.
        self.corrected: tuple[tuple[str, frozenset[str]], onnx.ModelProto] | None = None
        self._since_s = time.perf_counter()

    def lap(self, name: str) -> None:
        """What passed since the last lap was spent on `name`."""
        now_s = time.perf_counter()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now_s - self._since_s, 3)
        self._since_s = now_s

    def calibrated(self, form: onnx.ModelProto) -> list[Numbers]:
        """Ranges chosen tensor by tensor, all values or all images alike, and least squares for all: none is the best
        for every network.
        """
        by_values, by_images = self.tables(form, self.state)
        uniform = choose_spans(UNIFORM, self.plan, Graph(form), self.calibrations[0][1])
        return [
            self._numbers("calibrated", form, form, by_values),
            self._numbers(f"calibrated, {UNIFORM}", form, form, by_values.with_spans(uniform)),
            self._numbers(BY_IMAGES, form, form, by_images),
        ]

    def tables(self, form: onnx.ModelProto, state: Path | None = None) -> tuple[RangeTable, RangeTable]:
        """Spans from the calibration images for every tensor of any INT8 file, and the weights' own scales.

        Chosen by values, and by images (`Choices`).
        """
        trt = make_trt_plan(trt_form(form))
        names = sorted({*measured(self.plan), *trt.measured})
        self.say(f"Calibrating {len(names)} tensors on {len(self.calibration)} images ({self.calibration.name})")
        histograms = calibrate(form, names, self.counted, self.preprocess, self.gate.threads, say=self.say, state=state)
        self.lap("collection")
        judges = (histograms, self.held.pixels, self.preprocess, self.gate.threads)
        choices = choose_spans_per_tensor(form, self.plan, *judges)
        symmetric = choose_s8_spans(trt_form(form), trt.measured, trt.same_scale, *judges)
        scales = natural_weight_scales(form, {*self.plan.layers, *trt.weighted})
        self.lap("choice")
        by_values, by_images = (
            RangeTable({**s8.spans, **u8.spans}, scales, s8.spans) for u8, s8 in zip(choices, symmetric, strict=True)
        )
        self.calibrations += [(by_values, histograms, choices.by_values), (by_images, histograms, choices.by_images)]
        return by_values, by_images

    def cured(self, start: Numbers, max_drop_points: float) -> list[Numbers]:
        """Nothing, where no cure brings the held-out images nearer to FP32."""
        found = cure(
            start.model,
            self.plan,
            start.table,
            self.cure_images,
            logits=lambda model, table: self._held_logits(write_int8(model, self.plan, table)),
            fp32=self._held_logits(start.model),
            recalibrate=lambda model: self.tables(model)[start.name == BY_IMAGES],
            until_points=max_drop_points,
            say=self.say,
        )
        self.effects = [each.to_json() for each in found.effects]
        self.lap("cures")
        if found.model is start.model:
            return []
        return [self._numbers("cured", found.model, found.reference, found.table)]

    def _held_logits(self, model: onnx.ModelProto) -> Logits:
        return self.held.logits(model.SerializeToString(), self.gate.threads)

    def trained(self, start: Numbers, train: Train) -> list[Numbers]:
        try:
            model, table = train(start.model, self.plan, start.table)
        except RunError as error:
            self.say(f"QAT failed, and the file without it is kept: {error}")
            return []
        finally:
            self.lap("training")
        return [self._numbers(TRAINED, model, model, table)]

    def _numbers(self, name: str, model: onnx.ModelProto, reference: onnx.ModelProto, table: RangeTable) -> Numbers:
        file = write_int8(model, self.plan, table)
        require_clean(lint_int8(file, frozenset(self.plan.kept_float)), f"the INT8 file ({name})")
        found = Numbers(name, model, reference, table, self.gate.agreement(file))
        self.lap("comparison")
        return found

    def order(self, numbers: Numbers) -> list[str]:
        """Layers, the most sensitive first."""
        self.say("Looking for the layers that lose most")
        found = sensitivity(numbers.reference, self.plan, numbers.table, self.cure_images, say=self.say)
        self.sensitivity = [each.to_json() for each in found]
        return [each.layer for each in found]

    def search(self, numbers: Numbers, speed: Speed | None, max_drop_points: float) -> Search[onnx.ModelProto]:
        """Layers back to float until both sides of the gate hold."""
        self.sensitivity = []
        found = search(
            order=lambda: self.order(numbers),
            make=lambda left: self.file(numbers, left),
            accuracy=self.gate.agreement,
            speed=speed,
            max_drop_points=max_drop_points,
            say=self.say,
        )
        self.lap("search")
        return found

    def file(self, numbers: Numbers, left_float: frozenset[str]) -> onnx.ModelProto:
        plan = make_plan(numbers.model, left_float)
        made = write_int8(self.partly_float(numbers, left_float), plan, numbers.table)
        require_clean(lint_int8(made, frozenset(plan.kept_float)), "the INT8 file")
        return made

    def partly_float(self, numbers: Numbers, left_float: frozenset[str]) -> onnx.ModelProto:
        """The float model that a file with these layers in float is made of."""
        if not left_float or numbers.reference is numbers.model:
            return numbers.model
        key = (numbers.name, left_float)
        if self.corrected is None or self.corrected[0] != key:
            plan = make_plan(numbers.model, left_float)
            made = partly_float(numbers.model, numbers.reference, plan, numbers.table, self.cure_images, left_float)
            self.corrected = key, made
        return self.corrected[1]

    def document(
        self, ways: list[Numbers], best: Numbers, plan: Plan, searched: Search[onnx.ModelProto]
    ) -> dict[str, Any]:
        """quantization.json, but for the forms that others write from it."""
        table = best.table.to_json()
        # Trained spans are nobody's choice; what the first calibration saw is still true.
        same = [each for each in self.calibrations if each[0].spans == best.table.spans]
        _, histograms, choice = (same or self.calibrations)[0]
        chosen = bool(same)
        for name, entry in table["tensors"].items():
            source = plan.same_scale.get(name, name)
            if source in histograms:
                entry |= {"seen_low": histograms[source].low, "seen_high": histograms[source].high}
            entry |= {
                "same_as": plan.same_scale.get(name),
                **(choice.to_json(name) if chosen else {"method": best.name}),
            }
        operators = {node.name: node for node in best.model.graph.node}
        layers = {
            name: {
                "operator": operators[name].op_type,
                "input": operators[name].input[0],
                **table["layers"].get(name, {}),
            }
            for name in sorted(plan.layers)
        }
        part = self.calibration
        return {
            "schema": SCHEMA,
            "chosen": best.name,
            "ways": {way.name: way.found.to_json() for way in ways},
            "chosen_on": "gate",
            "cures": self.effects,
            "sensitivity": self.sensitivity,
            "fallback": searched.to_json(),
            "images": {"from": part.name, "count": len(part), "sha256": part.sha256 or part.fingerprint},
            "seconds": {**self.seconds, "total": round(sum(self.seconds.values()), 3)},
            "form": "u8: q = clamp(round(x / scale) + zero_point, 0, 255); s8: q = clamp(round(x / scale), -128, 127); "
            "weights: int8 = round(w / scale), per output channel",
            "tensors": table["tensors"],
            "layers": layers,
            "kept_float": plan.kept_float,
        }
