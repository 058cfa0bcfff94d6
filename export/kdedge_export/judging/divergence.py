"""Where an INT8 file leaves its float file: every tensor the two have in common, compared by signal to noise.

SQNR in decibels is 10 log10 of the power of the float tensor over the power of the difference: 40 is a hundredth of the
signal's size, 20 a tenth, 0 all of it. One image is in memory at a time, with its tensors in both files.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from kdedge.errors import DataError, ExportError
from kdedge_export.graph import Graph
from kdedge_export.sessions import open_session

__all__ = ["THRESHOLD_DB", "Divergence", "Layer", "compare_layers"]

THRESHOLD_DB = 10.0  # the noise has a tenth of the signal's power: a tensor so far off says little of its image
_EQUAL_DB = 120.0  # what float32 cannot tell apart; also keeps infinity out of JSON

Batch = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """A tensor and the node that makes it. `fall_db`: how much SQNR is lost from the worst of its inputs to it."""

    tensor: str
    operator: str
    sqnr_db: float
    fall_db: float

    def __str__(self) -> str:
        return f"{self.tensor} ({self.operator}, {self.sqnr_db:.1f} dB, {self.fall_db:.1f} dB below its input)"


@dataclass(frozen=True)
class Divergence:
    """All compared tensors in topological order, over `images` images."""

    layers: tuple[Layer, ...]
    images: int
    threshold_db: float = THRESHOLD_DB

    @property
    def first(self) -> Layer | None:
        """The first layer to diverge: below the threshold. None where all stay above."""
        return next((each for each in self.layers if each.sqnr_db < self.threshold_db), None)

    @property
    def steepest(self) -> Layer:
        """The layer that loses most by itself."""
        return max(self.layers, key=lambda each: each.fall_db)

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "threshold_db": self.threshold_db,
            "first_to_diverge": asdict(self.first) if self.first else None,
            "steepest_fall": asdict(self.steepest),
            "layers": [asdict(each) for each in self.layers],
        }

    def text(self) -> str:
        steepest = f"the steepest fall is at {self.steepest}"
        if self.first is None:
            lowest = min(each.sqnr_db for each in self.layers)
            return f"no layer diverges (lowest SQNR {lowest:.1f} dB); {steepest}"
        return f"the first layer to diverge is {self.first}; {steepest}"


def compare_layers(
    float_model: onnx.ModelProto,
    other: onnx.ModelProto,
    images: Iterable[Batch],
    optimize: bool = True,
    threshold_db: float = THRESHOLD_DB,
) -> Divergence:
    """Run both files on each of `images` (float32 [n, C, H, W], taken one image at a time) and compare layer by layer.

    A tensor of the float graph is compared with what the other file makes of it, rounded where it is rounded. Left out
    are those the other file has not (absorbed by a neighbour) or has in another shape. `optimize` False: the other file
    runs as written, for TensorRT files. DataError without images, ExportError where no tensor is common to both.
    """
    graph = Graph(float_model)
    pairs = _pairs(graph, Graph(other))
    if not pairs:
        raise ExportError(
            "The two files have no tensor in common, so no layer can be compared. Use files of one export."
        )
    base = _Watched(float_model, list(pairs), True)
    changed = _Watched(other, list(pairs.values()), optimize)
    signal, noise, count = dict.fromkeys(pairs, 0.0), dict.fromkeys(pairs, 0.0), 0
    for batch in images:
        for place in range(len(batch)):
            image = batch[place : place + 1]
            for name, true, found in zip(pairs, base.run(image), changed.run(image), strict=True):
                error = _difference(true, found)
                if error is not None:
                    signal[name] += float(np.square(true, dtype=np.float64).sum())
                    noise[name] += error
            count += 1
    if count == 0:
        raise DataError("There are no images to compare layers on; at least one is needed.")
    sqnr = {name: _decibels(signal[name], noise[name]) for name in pairs if signal[name] > 0}
    return Divergence(tuple(_layers(graph, _heard(graph, sqnr, threshold_db))), count, threshold_db)


def _pairs(graph: Graph, other: Graph) -> dict[str, str]:
    """Tensor of the float graph -> the tensor of the other one that stands for it, in topological order."""
    made, known = {*other.inputs, *other.producer}, {*graph.inputs, *graph.producer}
    pairs: dict[str, str] = {}
    for name in [*graph.inputs, *(name for node in graph.nodes for name in node.output)]:
        for candidate in (f"{name}_dq", name):
            rounded = candidate != name and candidate not in known  # a tensor of the float graph may have that name
            if candidate in made and (rounded or (candidate == name and name not in graph.inputs)):
                pairs[name] = candidate
                break
    return pairs


class _Watched:
    """A session that gives the tensors `names` of a model. The input itself can be among them."""

    def __init__(self, model: onnx.ModelProto, names: Sequence[str], optimize: bool) -> None:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        inputs = [each.name for each in model.graph.input]
        known = {each.name for each in model.graph.output} | set(inputs)
        # Without a type: ONNX Runtime infers it, and it differs between the files (float16, float32).
        copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
        self.session = open_session(bytes(copy.SerializeToString()), optimize=optimize)
        self.input, self.names = inputs[0], list(names)

    def run(self, image: Batch) -> Iterator[Batch]:
        wanted = [name for name in self.names if name != self.input]
        values = dict(zip(wanted, self.session.run(wanted, {self.input: image}), strict=True)) | {self.input: image}
        return (np.asarray(values[name], dtype=np.float32) for name in self.names)


def _difference(true: Batch, found: Batch) -> float | None:
    """Power of the difference; None where the shapes cannot be those of one tensor. Channels padded behind are cut."""
    if true.ndim > 1 and found.ndim == true.ndim and found.shape[1] >= true.shape[1]:
        found = found[:, : true.shape[1]]
    if true.shape != found.shape:
        return None
    return float(np.square(true.astype(np.float64) - found).sum())


def _decibels(signal: float, noise: float) -> float:
    if not math.isfinite(noise):
        return -_EQUAL_DB
    return min(_EQUAL_DB, 10 * math.log10(signal / noise)) if noise > 0 else _EQUAL_DB


def _heard(graph: Graph, sqnr: Mapping[str, float], threshold_db: float) -> dict[str, float]:
    """`sqnr` without the tensors below the threshold that nothing behind them is the worse for.

    Noise does not heal: such a tensor has its values in another order than in the float file, and its readers know.
    """
    kept = dict(sqnr)
    diverged = {name: sqnr.get(name, _EQUAL_DB) < threshold_db for name in graph.outputs}
    for node in reversed(graph.nodes):
        for name in node.output:
            if name in graph.outputs:
                continue
            behind = any(diverged.get(out, False) for reader in graph.readers(name) for out in reader.output)
            if name in kept and kept[name] < threshold_db and not behind:
                del kept[name]
            diverged[name] = kept[name] < threshold_db if name in kept else behind
    return kept


def _layers(graph: Graph, sqnr: Mapping[str, float]) -> Iterator[Layer]:
    """A tensor that was not compared hands on the SQNR of its own inputs, so that a fall is charged to one layer."""
    reached = {name: sqnr.get(name, _EQUAL_DB) for name in graph.inputs}
    for name in graph.inputs:
        if name in sqnr:
            yield Layer(name, "input", sqnr[name], 0.0)
    for node in graph.nodes:
        before = min((reached[name] for name in node.input if name in reached), default=_EQUAL_DB)
        for name in node.output:
            reached[name] = sqnr.get(name, before)
            if name in sqnr:
                yield Layer(name, str(node.op_type), sqnr[name], before - sqnr[name])
