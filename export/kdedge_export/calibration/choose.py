"""The way to choose a range, chosen for each tensor: the one that disturbs what reads the tensor least.

A candidate is judged by the error that 8 bits make in the tensor t alone, e = DQ(Q(t)) - t, on images that the
histograms have not seen. A convolution is linear, so Conv(e) is exactly what that error makes of its output: no INT8
file has to be written and run. All candidates of all tensors are judged in one graph, in one run an image (`judge`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from kdedge.errors import DataError
from kdedge_device.preprocess import Preprocess
from kdedge_export.calibration.histogram import Histogram
from kdedge_export.calibration.judge import Judge, Options
from kdedge_export.calibration.ranges import CALIBRATORS, S8_CALIBRATORS, Form, measured, seen, squared_error, with_zero
from kdedge_export.cpu.plan import Plan
from kdedge_export.graph import Graph
from kdedge_export.images import Held, Images
from kdedge_export.table import Span

__all__ = ["Choice", "choose_among", "choose_s8_spans", "choose_spans_per_tensor"]

KNOWN = "known"
# Times the least squared error. Without it, four of 1,000 images held half of a MobileNetV3's divergence: what they
# need was clipped, since none like them was among the judges.
BEARABLE = 2.0


@dataclass(frozen=True)
class Choice:
    """`spans` of every planned tensor. `methods`: the way each was chosen, "known" where it follows from the graph.

    `errors`: tensor -> method -> squared error in what reads the tensor, over that one's own sum of squares, summed
    over the readers; of ways that were judged, so nothing where all give one range.
    """

    spans: dict[str, Span]
    methods: dict[str, str]
    errors: dict[str, dict[str, float]]

    def to_json(self, tensor: str) -> dict[str, Any]:
        """What quantization.json says of a tensor with a range of its own; of the others, nothing."""
        if tensor not in self.methods:
            return {}
        return {"method": self.methods[tensor], "errors": self.errors.get(tensor, {})}


def choose_spans_per_tensor(
    model: onnx.ModelProto,
    plan: Plan,
    histograms: Mapping[str, Histogram],
    images: Images | npt.NDArray[np.uint8],
    preprocess: Preprocess,
    threads: int = 1,
) -> Choice:
    """The spans of all tensors of `plan`, each by the best of CALIBRATORS on `images`; equal in any order of these.

    A way that costs a tensor more than BEARABLE times the least, over its histogram, is not among them. `histograms` of
    `measured(plan)`, from other images. A span stays inside what an absorbed activation lets pass and readers tell
    apart; tensors of one scale have one span, chosen by what reads any of them. DataError without images.
    """
    graph = Graph(model)
    candidates = {name: _bearable(seen(plan, graph, name, histograms[name])) for name in measured(plan)}
    methods, errors = choose_among(
        model, candidates, images, preprocess, same_scale=plan.same_scale, moved=plan.layers, threads=threads
    )
    chosen = {name: candidates[name][method] for name, method in methods.items()} | plan.known
    spans = {name: chosen[plan.same_scale.get(name, name)] for name in plan.tensors}
    return Choice(spans, {**dict.fromkeys(plan.known, KNOWN), **methods}, errors)


def choose_s8_spans(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    same_scale: Mapping[str, str],
    histograms: Mapping[str, Histogram],
    images: Images | npt.NDArray[np.uint8],
    preprocess: Preprocess,
    threads: int = 1,
) -> Choice:
    """The spans of `tensors` for symmetric 8 bits, as TensorRT reads them.

    `same_scale`: tensor -> the one whose scale it takes; what reads it is judged there, behind the node that made it.
    """
    candidates = {name: _bearable(histograms[name], "s8") for name in tensors}
    moved = frozenset(node.name for node in model.graph.node if any(name in same_scale for name in node.output))
    methods, errors = choose_among(
        model, candidates, images, preprocess, same_scale=same_scale, moved=moved, form="s8", threads=threads
    )
    return Choice({name: candidates[name][method] for name, method in methods.items()}, methods, errors)


def _bearable(histogram: Histogram, form: Form = "u8") -> dict[str, Span]:
    """Method -> span, without those that cost the tensor itself much more than the best one does.

    Few images judge, and many more were counted: what a rare image needs, the few may not show.
    """
    ways = CALIBRATORS if form == "u8" else S8_CALIBRATORS
    spans = {method: with_zero(way(histogram)) for method, way in ways.items()}
    error = squared_error(histogram, form)
    errors = {method: error(span) for method, span in spans.items()}
    most = BEARABLE * min(errors.values())
    return {method: span for method, span in spans.items() if errors[method] <= most}


def choose_among(
    model: onnx.ModelProto,
    candidates: Mapping[str, Mapping[str, Span]],
    images: Images | npt.NDArray[np.uint8],
    preprocess: Preprocess,
    *,
    same_scale: Mapping[str, str] | None = None,
    moved: frozenset[str] = frozenset(),
    form: Form = "u8",
    threads: int = 1,
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """(tensor -> the best method, tensor -> method -> error) of `candidates`: tensor -> method -> span.

    Of equal ones the first is taken. `same_scale`: tensor -> the one among the candidates whose range it takes.
    `moved`: quantized nodes; those that only move values are judged at their outputs. `form`: what a span becomes.
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
    errors = {name: {way: each[place] for way, place in options[name].place.items()} for name, each in found.items()}
    methods = {
        name: min(spans, key=lambda way: errors.get(name, {}).get(way, 0.0)) for name, spans in candidates.items()
    }
    return methods, errors
