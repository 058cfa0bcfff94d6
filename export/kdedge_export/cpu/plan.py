"""Which tensors of a float graph become 8-bit, and which layers stay in float and why. Decided from the graph alone.

The form is that of ONNX Runtime's CPU kernels: a convolution is fused into one integer kernel when its input, weight
and output are all quantized, and an Add or a pooling when its inputs and output are. Rules:

1. Conv and Gemm with constant weights: their inputs are quantized. A Relu or Clip behind a Conv or Gemm (or Add) is
   absorbed: the 8-bit range starts at 0 and ends at the clip, so saturation does its work. So is a HardSigmoid behind a
   Conv or Gemm, whose bias then brings the shift.
2. The output of a Conv is quantized. The output of a Gemm only where an activation was absorbed: ONNX Runtime has a
   kernel from integers to float, and the logits keep their full resolution.
3. Add, Mul, Concat, the average poolings and whatever only moves values (MaxPool, Flatten, Reshape, Transpose, Split)
   are quantized where their inputs are 8-bit already. The last hand on the scale of their input, so that a channel
   shuffle moves bytes.
4. Sigmoid and HardSigmoid are quantized where they are gates: read by such a Mul alone. Their span is known, [0, 1].
   What only feeds x * HardSigmoid(x) needs no values below the point where that is 0 for good.
5. Everything else stays in float: HardSwish as one operator (`cpu_form` takes it apart), LeakyRelu, BatchNormalization
   and what is behind them. A float reader of a float tensor reads the float tensor, even where another reader takes its
   8-bit form.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx

from kdedge_export.graph import Graph, attribute
from kdedge_export.table import Span

__all__ = ["ELEMENTWISE", "GATES", "MOVES", "Plan", "hard_sigmoid", "make_plan"]

_WEIGHTED = ("Conv", "Gemm")
ELEMENTWISE = ("Add", "Mul", "Concat", "GlobalAveragePool", "AveragePool")
"""Operators with an integer kernel of their own; the output has its own scale."""
GATES = ("Sigmoid", "HardSigmoid")
"""Operators with values from 0 to 1, integers where a Mul reads them."""
MOVES = ("MaxPool", "Flatten", "Reshape", "Transpose", "Split")
"""Operators that only move values: the first input and every output have one scale."""
_ACTIVATIONS = ("Relu", "Clip", "HardSigmoid")


def hard_sigmoid(node: onnx.NodeProto) -> tuple[float, float]:
    """alpha and beta of max(0, min(1, alpha x + beta))."""
    return float(attribute(node, "alpha", 0.2)), float(attribute(node, "beta", 0.5))


@dataclass(frozen=True)
class Plan:
    """`layers`: names of quantized nodes. `tensors`: tensors that get Q/DQ, by name, in topological order.

    `absorbed`: activation node -> the (low, high) it clips to. `made`: tensors written by a quantized node.
    `same_scale`: tensor -> the tensor whose scale it takes. `kept_float`: node name -> why.
    `known`: tensor -> its span where that follows from the graph, whatever the images. `enough`: tensor -> the span
    outside which its readers make no difference between values.
    """

    layers: frozenset[str] = frozenset()
    tensors: tuple[str, ...] = ()
    absorbed: dict[str, Span] = field(default_factory=dict)
    made: frozenset[str] = frozenset()
    same_scale: dict[str, str] = field(default_factory=dict)
    kept_float: dict[str, str] = field(default_factory=dict)
    known: dict[str, Span] = field(default_factory=dict)
    enough: dict[str, Span] = field(default_factory=dict)

    def limits(self, graph: Graph, tensor: str) -> Span:
        """What the absorbed activation in front of `tensor` allows and its readers need; infinite where nothing is."""
        node = graph.producer.get(tensor)
        low, high = self.absorbed.get(node.name, (-np.inf, np.inf)) if node is not None else (-np.inf, np.inf)
        floor, ceiling = self.enough.get(tensor, (-np.inf, np.inf))
        return max(low, floor), min(high, ceiling)


def make_plan(model: onnx.ModelProto, leave_float: frozenset[str] = frozenset()) -> Plan:
    """The plan for a float model with named nodes; `leave_float` names layers to be left out of it."""
    builder = _Builder(Graph(model), leave_float)
    for node in builder.graph.nodes:
        if node.op_type in _WEIGHTED:
            builder.weighted(node)
    for node in builder.graph.nodes:
        if node.op_type in (*ELEMENTWISE, *MOVES):
            builder.follower(node)
        elif node.op_type in GATES and node.name not in builder.absorbed:
            builder.gate(node)
        elif node.op_type not in (*_WEIGHTED, *_ACTIVATIONS):
            builder.kept_float[node.name] = f"{node.op_type} has no integer kernel here"
        elif node.op_type in _ACTIVATIONS and node.name not in builder.absorbed:
            builder.kept_float[node.name] = "no quantized layer in front of it"
    return builder.plan()


class _Builder:
    def __init__(self, graph: Graph, leave_float: frozenset[str]) -> None:
        self.graph = graph
        self.leave_float = leave_float
        self.layers: set[str] = set()
        self.tensors: set[str] = set()
        self.made: set[str] = set()
        self.absorbed: dict[str, Span] = {}
        self.same_scale: dict[str, str] = {}
        self.kept_float: dict[str, str] = {}

    def weighted(self, node: onnx.NodeProto) -> None:
        reason = self._why_not_weighted(node)
        if reason:
            self.kept_float[node.name] = reason
            return
        self.layers.add(node.name)
        self.tensors.add(node.input[0])
        output = self._absorb(node)
        if node.op_type == "Conv" or output != node.output[0]:
            self._make(output)

    def _why_not_weighted(self, node: onnx.NodeProto) -> str:
        if node.name in self.leave_float:
            return "left in float by choice"
        if any(name and name not in self.graph.initializers for name in node.input[1:]):
            return "its weight or bias is computed, not constant"
        if node.op_type == "Conv" and node.output[0] in self.graph.outputs:
            return "its output is an output of the model"
        if node.op_type == "Gemm":
            plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
            if not plain or attribute(node, "transA", 0) or not attribute(node, "transB", 0):
                return "it is not of the form x W^T + b"
            bias = self.graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
            if bias is not None and bias.ndim != 1:
                return "its bias is not a vector"
        return ""

    def follower(self, node: onnx.NodeProto) -> None:
        """Sums, products, poolings, moves: quantized where their inputs are 8-bit and no output is the model's."""
        moves = node.op_type in MOVES
        inputs = list(node.input[:1]) if moves else [name for name in node.input if name]  # the rest say where to
        if node.name in self.leave_float:
            self.kept_float[node.name] = "left in float by choice"
        elif not all(name in self.tensors for name in inputs):
            self.kept_float[node.name] = "an input of it is not 8-bit"
        elif any(name in self.graph.outputs for name in node.output):
            self.kept_float[node.name] = "its output is an output of the model"
        elif len(node.output) > 1 and node.op_type != "Split":
            self.kept_float[node.name] = "it has more than one output"
        else:
            self.layers.add(node.name)
            if moves:
                source = self.same_scale.get(inputs[0], inputs[0])
                for name in node.output:
                    self.same_scale[name] = source
                    self._make(name)
            else:
                self._make(self._absorb(node) if node.op_type == "Add" else node.output[0])

    def gate(self, node: onnx.NodeProto) -> None:
        """Sigmoid and HardSigmoid: 8-bit where all readers are products that will be."""
        readers = self.graph.readers(node.output[0])
        others = [name for reader in readers for name in reader.input if name != node.output[0]]
        if node.name in self.leave_float:
            self.kept_float[node.name] = "left in float by choice"
        elif node.input[0] not in self.tensors:
            self.kept_float[node.name] = "an input of it is not 8-bit"
        elif node.output[0] in self.graph.outputs or not readers or any(reader.op_type != "Mul" for reader in readers):
            self.kept_float[node.name] = "it is read by more than products"
        elif any(reader.name in self.leave_float for reader in readers):
            self.kept_float[node.name] = "a product that reads it was left in float by choice"
        elif any(name not in self.tensors for name in others):
            self.kept_float[node.name] = "a product that reads it has an input that is not 8-bit"
        elif node.op_type == "HardSigmoid" and hard_sigmoid(node)[0] <= 0:
            self.kept_float[node.name] = "it falls where it should rise"
        else:
            self.layers.add(node.name)
            self._make(node.output[0])

    def _make(self, tensor: str) -> None:
        self.tensors.add(tensor)
        self.made.add(tensor)

    def _absorb(self, node: onnx.NodeProto) -> str:
        """The tensor that is quantized behind `node`: the output of the activation that goes with it, or its own."""
        output = str(node.output[0])
        reader = self.graph.only_reader(output)
        if reader is None or reader.op_type not in _ACTIVATIONS or reader.output[0] in self.graph.outputs:
            return output
        if reader.op_type == "HardSigmoid" and (node.op_type == "Add" or reader.name in self.leave_float):
            return output
        low, high = self._clip_limits(reader)
        if not low <= 0.0 <= high:  # 8-bit ranges hold 0, so saturation cannot do this clip's work
            return output
        self.absorbed[reader.name] = (low, high)
        return str(reader.output[0])

    def _clip_limits(self, node: onnx.NodeProto) -> tuple[float, float]:
        if node.op_type == "Relu":
            return 0.0, np.inf
        if node.op_type == "HardSigmoid":
            return (0.0, 1.0) if hard_sigmoid(node)[0] > 0 else (np.inf, -np.inf)
        bounds = [-np.inf, np.inf]
        for place, name in enumerate(list(node.input)[1:3]):
            if name:
                value = self.graph.constant(name)
                if value is None:
                    return np.inf, -np.inf  # computed limits: never absorbed
                bounds[place] = float(value)
        return bounds[0], bounds[1]

    def _enough(self, tensor: str) -> Span:
        """For x that x * HardSigmoid(x) alone reads: nothing below -beta / alpha, where the product is 0 for good."""
        readers = self.graph.readers(tensor)
        gates = [reader for reader in readers if reader.op_type == "HardSigmoid"]
        if len(gates) == 1 and tensor not in self.graph.outputs and hard_sigmoid(gates[0])[0] > 0:
            pair = {tensor, gates[0].output[0]}
            products = [*self.graph.readers(gates[0].output[0]), *(each for each in readers if each is not gates[0])]
            if all(each.op_type == "Mul" and set(each.input) == pair for each in products):
                alpha, beta = hard_sigmoid(gates[0])
                return min(0.0, -beta / alpha), np.inf
        return -np.inf, np.inf

    def plan(self) -> Plan:
        order = [*self.graph.inputs, *(name for node in self.graph.nodes for name in node.output)]
        gates = [node.output[0] for node in self.graph.nodes if node.op_type in GATES]
        enough = {name: self._enough(name) for name in self.tensors}
        return Plan(
            layers=frozenset(self.layers),
            tensors=tuple(name for name in order if name in self.tensors),
            absorbed=self.absorbed,
            made=frozenset(self.made),
            same_scale=self.same_scale,
            kept_float=self.kept_float,
            known={name: (0.0, 1.0) for name in gates if name in self.tensors},
            enough={name: span for name, span in enough.items() if np.isfinite(span).any()},
        )
