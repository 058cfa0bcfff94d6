"""Channel counts as ONNX Runtime's integer kernels like them; the function is the same, and so is every name.

A depthwise convolution over 120 channels takes 2.4 times as long as one over 128: the kernel takes 16 at a time and the
rest one by one. So zero channels are added, from the convolution that makes them to those that read them. A grouped
convolution is one small matrix product a group; blocks of zeros between them make fewer and larger ones.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx

from kdedge_export.graph import Graph, attribute, constant_tensor
from kdedge_export.table import RangeTable

__all__ = ["aligned"]

STEP = 16
GROUP_WIDTH = 32  # channels of a group from where on its product is large enough
MAX_WIDTH = 64  # and up to where the zeros cost less than the fewer products save
MAX_WHOLE = 128  # all groups in one, where nothing between fits
MAX_ZEROS = 100_000  # bytes that a layer may grow by: the file is to stay below 0.3 of the float one
_KEEP = ("Relu", "Clip", "HardSigmoid", "Sigmoid", "HardSwish", "Add", "Mul")
_POOL = ("GlobalAveragePool", "AveragePool", "MaxPool")


def aligned(model: onnx.ModelProto, table: RangeTable) -> tuple[onnx.ModelProto, RangeTable]:
    """A copy of the float `model` with the channels of its depthwise convolutions at multiples of 16, and its table.

    What an added channel holds does not matter: every weight that reads it is 0. Inputs and outputs of the model,
    weights that are shared, and whatever joins or cuts channels keep the channels they have.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = Graph(copy)
    widths = _widths(graph, onnx.shape_inference.infer_shapes(model))
    scales = dict(table.weight_scales)
    for node in graph.nodes:
        if node.op_type not in ("Conv", "Gemm") or not _own_weights(node, graph):
            continue
        weight = np.asarray(graph.constant(node.input[1]))
        made = widths.get(node.output[0], len(weight)) - len(weight)
        if _is_depthwise(node, graph):
            weight = _padded(weight, made)
            _set_groups(node, len(weight))
        elif attribute(node, "group", 1) == 1:
            read = widths.get(node.input[0], weight.shape[1]) - weight.shape[1]
            weight = _padded(_padded(weight, made), read, axis=1)
        else:
            weight = _merged(node, weight)
        _store(graph, node.input[1], weight)
        if made and len(node.input) > 2 and node.input[2]:
            _store(graph, node.input[2], _padded(np.asarray(graph.constant(node.input[2])), made))
        if made and node.name in scales:
            scales[node.name] = np.concatenate([scales[node.name], np.ones(made, np.float32)])
    del copy.graph.value_info[:]
    return copy, RangeTable(table.spans, scales)


def _widths(graph: Graph, shaped: onnx.ModelProto) -> dict[str, int]:
    """How many channels the tensors shall have that get more than they have."""
    shapes = {
        each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim]
        for each in [*shaped.graph.value_info, *shaped.graph.input, *shaped.graph.output]
    }
    together = _Together()
    together.fix([*graph.inputs, *graph.outputs])
    for node in graph.nodes:
        tensors = [name for name in [*node.input, *node.output] if name and name not in graph.initializers]
        channels = {tuple(shapes.get(name, [])[1:2]) for name in tensors}
        same = len(channels) == 1 and channels != {()}
        if node.op_type in ("Conv", "Gemm") and _own_weights(node, graph):
            if _is_depthwise(node, graph):
                together.join(tensors)
            elif attribute(node, "group", 1) != 1 or node.op_type == "Gemm":
                together.fix(node.output if attribute(node, "transB", 0) else tensors)
        elif same and _keeps_channels(node, graph, shapes):
            together.join(tensors)
        else:
            together.fix(tensors)
    depthwise = {together.root(n.input[0]) for n in graph.nodes if n.op_type == "Conv" and _is_depthwise(n, graph)}
    wide = depthwise - {together.root(name) for name in together.fixed}
    return {
        name: -(-shapes[name][1] // STEP) * STEP
        for name in together.parents
        if together.root(name) in wide and shapes[name][1] % STEP
    }


class _Together:
    """Sets of tensors that have the same channels (union-find), and tensors whose channels must stay."""

    def __init__(self) -> None:
        self.parents: dict[str, str] = {}
        self.fixed: set[str] = set()

    def root(self, name: str) -> str:
        self.parents.setdefault(name, name)
        while self.parents[name] != name:
            name = self.parents[name]
        return name

    def join(self, names: Iterable[str]) -> None:
        first, *others = [self.root(name) for name in names]
        for each in others:
            self.parents[each] = first

    def fix(self, names: Iterable[str]) -> None:
        self.fixed.update(names)


def _own_weights(node: onnx.NodeProto, graph: Graph) -> bool:
    """Constant, and read by this node alone."""
    names = [name for name in node.input[1:] if name]
    return all(name in graph.initializers and len(graph.readers(name)) == 1 for name in names)


def _is_depthwise(node: onnx.NodeProto, graph: Graph) -> bool:
    weight = graph.constant(node.input[1])
    groups = int(attribute(node, "group", 1))
    return weight is not None and groups > 1 and weight.shape[:2] == (groups, 1)


def _keeps_channels(node: onnx.NodeProto, graph: Graph, shapes: dict[str, list[int]]) -> bool:
    """Whether each channel is made from the same channel of every input, whatever their number."""
    if node.op_type == "Flatten":
        return shapes.get(node.input[0], [])[2:] == [1, 1]
    scalars = all(not graph.initializers[name].dims for name in node.input if name in graph.initializers)
    return node.op_type in _POOL or (node.op_type in _KEEP and scalars)


def _padded(array: npt.NDArray[np.float32], count: int, axis: int = 0) -> npt.NDArray[np.float32]:
    return np.pad(array, [(0, count if each == axis else 0) for each in range(array.ndim)])


def _merged(node: onnx.NodeProto, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The weights of fewer, wider groups: as wide as GROUP_WIDTH where that comes out even, else as near as it does."""
    groups, width = int(attribute(node, "group", 1)), weight.shape[1]
    factors = [each for each in range(1, groups + 1) if groups % each == 0 and width * each <= MAX_WIDTH]
    factor = next((each for each in factors if width * each >= GROUP_WIDTH), max(factors, default=1))
    if factor == 1 and width < GROUP_WIDTH and groups * width <= MAX_WHOLE:
        factor = groups
    if weight.size * (factor - 1) > MAX_ZEROS:
        return weight
    outputs = len(weight) // groups
    merged = np.zeros((len(weight), width * factor, *weight.shape[2:]), weight.dtype)
    for channel, row in enumerate(weight):
        start = channel // outputs % factor * width
        merged[channel, start : start + width] = row
    _set_groups(node, groups // factor)
    return merged


def _set_groups(node: onnx.NodeProto, groups: int) -> None:
    next(each for each in node.attribute if each.name == "group").i = groups


def _store(graph: Graph, name: str, value: npt.NDArray[np.float32]) -> None:
    graph.initializers[name].CopyFrom(constant_tensor(name, value))
