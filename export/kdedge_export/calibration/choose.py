"""The way to choose a range, chosen for each tensor: the one that disturbs what reads the tensor least.

A candidate is judged by the error that 8 bits make in the tensor t alone, e = DQ(Q(t)) - t, on images that the
histograms have not seen. A convolution is linear, so Conv(e) is exactly what that error makes of its output: no INT8
file has to be written and run. All candidates of all tensors are judged in one graph, in one run an image (`judge`).

Two choices come of it. By *all values*: squared errors are summed over images, so that large ones count, which rare
images need. By *images*: each counts alike, as it does in accuracy. They differ where a few images drive a network to
many times the values of all others: of an EfficientNet-B0, three of 100 images held nine tenths of all squares, with
values of 157 where the others end at 4; ranges that serve them gave 15 of 100 images another class, those of the others
5. Of most networks the first is as good or a little better; which one it is, whole files are compared for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

from kdedge.errors import DataError
from kdedge_device.preprocess import Preprocess
from kdedge_export.calibration.histogram import Histogram
from kdedge_export.calibration.judge import Judge, Options
from kdedge_export.calibration.ranges import (
    CALIBRATORS,
    IMAGE_CALIBRATORS,
    S8_CALIBRATORS,
    Form,
    measured,
    seen,
    squared_error,
    with_zero,
)
from kdedge_export.cpu.plan import Plan
from kdedge_export.graph import Graph
from kdedge_export.images import Held, Images
from kdedge_export.table import Span

__all__ = ["Choice", "Choices", "Judged", "choose_s8_spans", "choose_spans_per_tensor", "judged"]

KNOWN = "known"
# Times the least squared error. Without it, four of 1,000 images held half of a MobileNetV3's divergence: what they
# need was clipped, since none like them was among the judges. Images that count alike are not guarded so.
BEARABLE = 2.0
Candidates = Mapping[str, Mapping[str, Span]]
"""Tensor -> method -> span."""


@dataclass(frozen=True)
class Choice:
    """`spans` of every planned tensor. `methods`: the way each was chosen, "known" where it follows from the graph.

    `errors`: tensor -> method -> squared error in what reads the tensor, over that one's own sum of squares, summed
    over the readers (`Errors`); of ways that were judged, so nothing where all give one range.
    """

    spans: dict[str, Span]
    methods: dict[str, str]
    errors: dict[str, dict[str, float]]

    def to_json(self, tensor: str) -> dict[str, Any]:
        """What quantization.json says of a tensor with a range of its own; of the others, nothing."""
        if tensor not in self.methods:
            return {}
        return {"method": self.methods[tensor], "errors": self.errors.get(tensor, {})}


class Choices(NamedTuple):
    by_values: Choice
    by_images: Choice


def choose_spans_per_tensor(
    model: onnx.ModelProto,
    plan: Plan,
    histograms: Mapping[str, Histogram],
    images: Images | npt.NDArray[np.uint8],
    preprocess: Preprocess,
    threads: int = 1,
) -> Choices:
    """The spans of all tensors of `plan`, each by the best of its ways on `images`; equal in any order of these.

    By values a way is one of CALIBRATORS that does not cost the tensor more than BEARABLE times the least, over its
    histogram; by images one of IMAGE_CALIBRATORS. `histograms` of `measured(plan)`, from other images. A span stays
    inside what an absorbed activation lets pass and readers tell apart; tensors of one scale have one span, chosen by
    what reads any of them. DataError without images.
    """
    graph = Graph(model)
    counted = {name: seen(plan, graph, name, histograms[name]) for name in measured(plan)}
    found = _choices(counted, "u8", model, images, preprocess, plan.same_scale, plan.layers, threads)
    return Choices(*(_of_plan(plan, each) for each in found))


def _of_plan(plan: Plan, choice: Choice) -> Choice:
    """With what the graph tells, and tensors that have the scale of another."""
    chosen = choice.spans | plan.known
    spans = {name: chosen[plan.same_scale.get(name, name)] for name in plan.tensors}
    return Choice(spans, {**dict.fromkeys(plan.known, KNOWN), **choice.methods}, choice.errors)


def choose_s8_spans(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    same_scale: Mapping[str, str],
    histograms: Mapping[str, Histogram],
    images: Images | npt.NDArray[np.uint8],
    preprocess: Preprocess,
    threads: int = 1,
) -> Choices:
    """The spans of `tensors` for symmetric 8 bits, as TensorRT reads them.

    `same_scale`: tensor -> the one whose scale it takes; what reads it is judged there, behind the node that made it.
    """
    counted = {name: histograms[name] for name in tensors}
    moved = frozenset(node.name for node in model.graph.node if any(name in same_scale for name in node.output))
    return _choices(counted, "s8", model, images, preprocess, same_scale, moved, threads)


def _choices(
    histograms: Mapping[str, Histogram],
    form: Form,
    model: onnx.ModelProto,
    images: Images | npt.NDArray[np.uint8],
    preprocess: Preprocess,
    same_scale: Mapping[str, str],
    moved: frozenset[str],
    threads: int,
) -> Choices:
    """All candidates in one run, and the best of either kind."""
    by_values = {name: _bearable(each, form) for name, each in histograms.items()}
    by_images = {
        name: {method: with_zero(way(each)) for method, way in IMAGE_CALIBRATORS.items()}
        for name, each in histograms.items()
    }
    both = {name: {**by_values[name], **by_images[name]} for name in histograms}
    found = judged(model, both, images, preprocess, same_scale=same_scale, moved=moved, form=form, threads=threads)
    return Choices(_best(by_values, found.summed), _best(by_images, found.alike))


def _best(candidates: Candidates, errors: Mapping[str, Mapping[str, float]]) -> Choice:
    """Of each tensor the candidate with the least error; of equal ones the first."""
    methods = {
        name: min(spans, key=lambda way: errors.get(name, {}).get(way, 0.0)) for name, spans in candidates.items()
    }
    spans = {name: candidates[name][method] for name, method in methods.items()}
    told = {name: {way: each[way] for way in candidates[name]} for name, each in errors.items()}
    return Choice(spans, methods, told)


def _bearable(histogram: Histogram, form: Form) -> dict[str, Span]:
    """Method -> span, without those that cost the tensor itself much more than the best one does.

    Few images judge, and many more were counted: what a rare image needs, the few may not show.
    """
    ways = CALIBRATORS if form == "u8" else S8_CALIBRATORS
    spans = {method: with_zero(way(histogram)) for method, way in ways.items()}
    error = squared_error(histogram, form)
    errors = {method: error(span) for method, span in spans.items()}
    most = BEARABLE * min(errors.values())
    return {method: span for method, span in spans.items() if errors[method] <= most}


class Judged(NamedTuple):
    """Tensor -> method -> error, as `Errors` has them; of tensors whose candidates differ in 8 bits."""

    summed: dict[str, dict[str, float]]
    alike: dict[str, dict[str, float]]


def judged(
    model: onnx.ModelProto,
    candidates: Candidates,
    images: Images | npt.NDArray[np.uint8],
    preprocess: Preprocess,
    *,
    same_scale: Mapping[str, str] | None = None,
    moved: frozenset[str] = frozenset(),
    form: Form = "u8",
    threads: int = 1,
) -> Judged:
    """What each of `candidates` costs. DataError without images.

    `same_scale`: tensor -> the one among the candidates whose range it takes. `moved`: quantized nodes; those that only
    move values are judged at their outputs. `form`: what a span becomes.
    """
    source = Held(images) if isinstance(images, np.ndarray) else images
    if len(source) == 0:
        raise DataError("There are no images to choose the ranges on; some of those to calibrate on were expected.")
    options = {name: Options.among(spans, form) for name, spans in candidates.items()}
    judge = Judge(model, form, moved)
    for tensor in (*judge.graph.inputs, *judge.graph.producer):
        name = (same_scale or {}).get(tensor, tensor)
        if name in options:
            judge.add(tensor, name, options[name])
    found = judge.run(source, preprocess, threads)

    def told(name: str, errors: tuple[float, ...]) -> dict[str, float]:
        return {way: errors[place] for way, place in options[name].place.items()}

    return Judged(
        {name: told(name, each.summed) for name, each in found.items()},
        {name: told(name, each.alike) for name, each in found.items()},
    )
