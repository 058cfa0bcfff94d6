"""What TensorRT's INT8 kernels are good for, as questions to a float graph: for the placement and for the linter.

The numbers are those of NVIDIA's own quantizer (Model-Optimizer, onnx/quantization/graph_utils.py). The rules are
numbered as in trt_lint.py.
"""

from collections.abc import Iterator, Sequence

import onnx

from kdedge_export.graph import Graph, attribute

__all__ = [
    "ACTIVATIONS",
    "FLOAT_OPS",
    "MOVES",
    "POOLS",
    "WEIGHTED",
    "Pooled",
    "longer_branch",
    "moved_from",
    "weight_axis",
    "why_weighted_float",
]

WEIGHTED = ("Conv", "ConvTranspose", "Gemm")
POOLS = ("AveragePool", "GlobalAveragePool")
MOVES = ("MaxPool", "Flatten", "Reshape", "Transpose", "Split", "Squeeze", "Unsqueeze")
"""Operators that only move values: TensorRT passes Q and DQ through them, so both sides have one scale."""
ACTIVATIONS = ("Relu", "Clip", "LeakyRelu")
"""They go into the kernel of the layer in front of them."""
FLOAT_OPS = ("Sigmoid", "HardSigmoid", "HardSwish", "Mul", "Softmax")
"""Rule 11: in front of these 8 bits cost accuracy, and stop the pointwise fusion."""

MIN_CHANNELS = 16  # from here on tensor cores are filled
MULTIPLE = 8
GROUPED_KERNEL = 3
MIN_GEMM = 16


def weight_axis(node: onnx.NodeProto) -> int:
    """The axis of the output channels in the weight of a Conv, a ConvTranspose or a Gemm of the form x W^T."""
    return 1 if node.op_type == "ConvTranspose" else 0


def why_weighted_float(node: onnx.NodeProto, graph: Graph, pooled: "Pooled", batch: int) -> str:
    """Why the Conv, ConvTranspose or Gemm `node` stays in float (rules 2, 10 and 11); empty where INT8 pays."""
    weight = graph.constant(node.input[1])
    if weight is None:
        return "its weight is computed, not constant"
    if node.name in pooled.gates:
        return "it belongs to a squeeze-and-excitation gate"
    if node.op_type == "Gemm":
        plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
        if not plain or attribute(node, "transA", 0) or not attribute(node, "transB", 0):
            return "it is not of the form x W^T + b"
        return _why_product_float(weight.shape, batch)
    if node.input[0] in pooled.tensors:
        return _why_product_float(weight.shape, batch)
    group = attribute(node, "group", 1)
    if node.op_type == "ConvTranspose":
        return "it is a transposed convolution in groups, whose channels lie on two axes" if group > 1 else ""
    return _why_conv_float(weight.shape, group, first=node.input[0] in graph.inputs)


def _why_product_float(shape: Sequence[int], batch: int) -> str:
    """Rule 10 for a matrix [N, K, ...] times one vector for each image."""
    if batch == 1:
        return "at batch 1 it is a matrix times one vector"
    if min(shape[:2]) < MIN_GEMM:
        return f"{min(shape[:2])} rows or columns are too few for an INT8 product, which needs {MIN_GEMM}"
    return ""


def _why_conv_float(shape: Sequence[int], group: int, first: bool) -> str:
    """Rule 10 for a weight [channels out, channels in of one group, kernel...]."""
    made, read, kernel = shape[0], shape[1], shape[2:]
    if min(made, read) >= MIN_CHANNELS:
        return ""
    if group > 1:
        if made % MULTIPLE:
            return f"its {made} channels in groups are no multiple of {MULTIPLE}"
        return f"its kernel is below {GROUPED_KERNEL} and it is in groups" if min(kernel) < GROUPED_KERNEL else ""
    if made % MULTIPLE and read % MULTIPLE:
        return f"neither its {read} input nor its {made} output channels are a multiple of {MULTIPLE}"
    if max(made, read) < MIN_CHANNELS and not first:
        return f"it has fewer than {MIN_CHANNELS} input and output channels"
    return "" if len(set(kernel)) == 1 else "it has few channels and its kernel is not square"


class Pooled:
    """What lies behind a GlobalAveragePool, where an image is one pixel.

    `tensors`: all such tensors. `gates`: the nodes between the pooling and the place where it joins the image again,
    as in squeeze-and-excitation, the pooling included.
    """

    def __init__(self, graph: Graph) -> None:
        self.tensors: set[str] = set()
        self.gates: set[str] = set()
        for node in graph.nodes:
            computed = [name for name in node.input if name and name not in graph.initializers]
            inside = [name for name in computed if name in self.tensors]
            if node.op_type == "GlobalAveragePool" or (computed and len(inside) == len(computed)):
                self.tensors.update(node.output)
            else:
                self._mark(inside, graph)

    def _mark(self, tensors: list[str], graph: Graph) -> None:
        while tensors:
            node = graph.producer[tensors.pop()]
            if node.name not in self.gates:
                self.gates.add(node.name)
                tensors.extend(name for name in node.input if name in self.tensors)


def moved_from(tensor: str, graph: Graph) -> list[str]:
    """The tensors whose values `tensor` holds, nearest first: through operators that only move values."""
    found: list[str] = []
    node = graph.producer.get(tensor)
    while node is not None and node.op_type in MOVES:
        found.append(str(node.input[0]))
        node = graph.producer.get(node.input[0])
    return found


def longer_branch(add: onnx.NodeProto, graph: Graph) -> int:
    """Which input of the sum has more nodes between it and the nearest ancestor of both; the second where none has."""
    first, second = (dict(_ancestors(name, graph)) for name in add.input)
    common = min(first.keys() & second.keys(), key=lambda name: first[name] + second[name], default=None)
    return 0 if common is not None and first[common] > second[common] else 1


def _ancestors(tensor: str, graph: Graph) -> Iterator[tuple[str, int]]:
    """Tensors that `tensor` is made from, each with its smallest distance in nodes."""
    seen, level, distance = {tensor}, [tensor], 0
    while level:
        yield from ((name, distance) for name in level)
        inputs = [name for each in level if (node := graph.producer.get(each)) is not None for name in node.input]
        level = list(dict.fromkeys(name for name in inputs if name not in seen and name not in graph.initializers))
        seen.update(level)
        distance += 1
