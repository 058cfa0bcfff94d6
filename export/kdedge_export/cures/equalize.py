"""Cross-layer equalization: the channels between two layers made equally large, so that one 8-bit scale suits them all.

Nagel et al. 2019 (arXiv 1906.04721), section 4.1: where f(s x) = s f(x), channel i between two layers may be divided by
any s_i > 0 if the weights behind it are multiplied by it. The paper weighs the ranges of two per-tensor weights; here
weights have a scale for each output channel, which no s_i of their own rows can improve, so what is weighed instead is
the channel's largest activation on calibration images. C channels.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from kdedge_export.cures.taps import Batches, set_constant, tap
from kdedge_export.graph import Graph, attribute

__all__ = ["Pair", "equalize", "pairs", "peaks"]

Array = npt.NDArray[np.float32]
MOST = 16.0  # four bits: the factor between two channels that is made up for
"""A channel that is small on the calibration images may be larger on others; grown without bound it would swamp all."""
MARGIN = 1.25  # of a clip's limit, kept free above the largest value seen of a channel that never reached it

_HOMOGENEOUS = ("Relu", "LeakyRelu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Flatten")
"""f(s x) = s f(x) in each channel apart. Clip only below its limit."""


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing between them but what scales along; `between` is the tensor whose channels are measured.

    `limit`: the upper limit of a Clip between them, infinite without. `depthwise`: `second` is.
    """

    first: str
    second: str
    between: str
    limit: float
    depthwise: bool


def equalize(model: onnx.ModelProto, batches: Batches) -> onnx.ModelProto:
    """A copy of the float `model` that gives the same values, with channels of like size where that can be had.

    Names, operators and limits stay, so plans stay; ranges and weight scales do not. Channels of a skip connection are
    never touched: the tensor between two layers must have one reader. The paper takes ReLU for ReLU6 beforehand, which
    alters the network. Here a channel that reaches the limit is left alone, and others grow at most as far as MARGIN
    below it: an image that takes one further than any calibration image took it, by more than that, is clipped.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    found = pairs(model)
    if not found:
        return copy
    largest = peaks(model, [pair.between for pair in found], batches)
    for pair in found:
        nodes = {node.name: node for node in copy.graph.node}
        _scale(copy, nodes[pair.first], nodes[pair.second], pair, largest[pair.between])
    return copy


def pairs(model: onnx.ModelProto) -> list[Pair]:
    """Every Conv or Gemm with the next one that alone reads its channels, in topological order."""
    graph = Graph(model)
    return [pair for node in graph.nodes if _constant(graph, node) for pair in _pair(graph, node)]


def _constant(graph: Graph, node: onnx.NodeProto) -> bool:
    """A plain Conv or Gemm, its output channels along axis 0 of a constant weight."""
    plain = node.op_type == "Conv" or (
        node.op_type == "Gemm"
        and bool(attribute(node, "transB", 0))
        and not attribute(node, "transA", 0)
        and attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
    )
    return plain and all(name in graph.initializers for name in node.input[1:] if name)


def _pair(graph: Graph, first: onnx.NodeProto) -> Iterator[Pair]:
    tensor, between, limit = str(first.output[0]), "", np.inf
    while True:
        reader = graph.only_reader(tensor)
        if reader is None or reader.input[0] != tensor:
            return
        if reader.op_type not in _HOMOGENEOUS:
            break
        if reader.op_type == "Clip":
            limit = min(limit, _limit(graph, reader))
        tensor = str(reader.output[0])
        if reader.op_type in ("Relu", "LeakyRelu", "Clip"):
            between = tensor
    if limit <= 0 or not _constant(graph, reader):
        return
    groups, channels = int(attribute(reader, "group", 1)), len(_weight(graph, first))
    inner = _weight(graph, reader).shape[1]
    if inner * groups != channels or (groups > 1 and inner > 1):
        return  # features behind a flattened map, or a grouped layer that is not depthwise
    yield Pair(first.name, reader.name, between or str(first.output[0]), limit, groups > 1)


def _weight(graph: Graph, node: onnx.NodeProto) -> Array:
    found = graph.constant(node.input[1])
    assert found is not None  # seen by _constant
    return np.asarray(found, np.float32)


def _limit(graph: Graph, node: onnx.NodeProto) -> float:
    """The upper limit of a Clip that starts at 0; 0, with which nothing can be done, for any other."""
    low, high = (graph.constant(name) if name else None for name in [*node.input[1:3], "", ""][:2])
    if low is None or float(low) != 0.0:
        return 0.0
    return np.inf if high is None and not (len(node.input) > 2 and node.input[2]) else float(high or 0.0)


def peaks(model: onnx.ModelProto, tensors: list[str], batches: Batches) -> Mapping[str, Array]:
    """The largest magnitude of each channel, float32 [C], over all images and positions."""
    found: dict[str, Array] = {}
    for values in tap(model, tensors, batches):
        for name in tensors:
            axes = (0, *range(2, values[name].ndim))
            here = np.abs(values[name]).max(axes)
            found[name] = np.maximum(found.get(name, here), here)
    return found


def factors(largest: Array, weight: Array, depthwise: bool, limit: float) -> Array:
    """s float32 [C], by which channels are divided: section 4.1's sqrt(r1 / r2), r1 the activations `largest`.

    r2 is the largest share that the channel has in an output channel of the next `weight`; behind a depthwise layer,
    whose weights have a scale for each channel anyway, all of the difference is made up for.
    """
    if depthwise:
        wanted = largest.astype(np.float64)
    else:
        flat = np.abs(weight.astype(np.float64)).reshape(len(weight), weight.shape[1], -1).max(2)
        share = (flat / np.maximum(flat.max(1, keepdims=True), 1e-30)).max(0)
        wanted = np.sqrt(largest / np.maximum(share, 1e-30))
    alive = (largest > 0) & (wanted > 0) & np.isfinite(wanted)
    if not alive.any():
        return np.ones(len(largest), np.float32)
    wanted = np.where(alive, wanted / wanted[alive].max(), 1.0)
    lowest = np.full(len(largest), 1 / MOST)
    if np.isfinite(limit):
        lowest = np.maximum(lowest, np.minimum(1.0, MARGIN * largest / limit))
    return np.clip(wanted, lowest, 1.0).astype(np.float32)


def _scale(model: onnx.ModelProto, first: onnx.NodeProto, second: onnx.NodeProto, pair: Pair, largest: Array) -> None:
    graph = Graph(model)
    before, behind = _weight(graph, first), _weight(graph, second)
    s = factors(largest, behind, pair.depthwise, pair.limit)
    set_constant(model, first, 1, before / s.reshape(-1, *[1] * (before.ndim - 1)))
    if len(first.input) > 2 and first.input[2]:
        bias = graph.constant(first.input[2])
        assert bias is not None
        set_constant(model, first, 2, bias / s)
    along = (-1, *[1] * (behind.ndim - 1)) if pair.depthwise else (1, -1, *[1] * (behind.ndim - 2))
    set_constant(model, second, 1, behind * s.reshape(along))
