"""A TensorRT file as its linter sees it: which tensors are read in 8 bits, at which scale, and the bare graph."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx

from kdedge_export.graph import Graph
from kdedge_export.trt.rules import ACTIVATIONS, MOVES, Pooled

__all__ = ["Form", "View"]

Form = Literal["trt", "trt-fp16"]


@dataclass
class View:
    """`kept_float` and the switches are those of the plan. `plain`: the graph without Q, DQ and Cast."""

    model: onnx.ModelProto
    form: Form
    kept_float: frozenset[str] = frozenset()
    pools: bool = True
    hard_swish: bool = False
    batch: int = 1
    graph: Graph = field(init=False)
    plain: Graph = field(init=False)
    pooled: Pooled = field(init=False)

    def __post_init__(self) -> None:
        self.graph = Graph(self.model)
        self.plain = Graph(_without_pairs(self.model))
        self.pooled = Pooled(self.plain)

    def kind(self, kind: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.nodes if node.op_type == kind]

    @property
    def layers(self) -> list[onnx.NodeProto]:
        return [node for node in self.graph.nodes if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Cast")]

    def unpaired(self, tensor: str) -> str | None:
        """The tensor that was quantized and dequantized into `tensor`; None where it was not."""
        restorer = self.graph.producer.get(tensor)
        if restorer is None or restorer.op_type != "DequantizeLinear":
            return None
        quantizer = self.graph.producer.get(restorer.input[0])
        return str(quantizer.input[0]) if quantizer is not None and quantizer.op_type == "QuantizeLinear" else None

    def eight_bit(self, node: onnx.NodeProto) -> list[int]:
        """The places of computed inputs that `node` reads dequantized."""
        sources = [self.unpaired(name) for name in node.input]
        return [place for place, name in enumerate(sources) if name and name not in self.graph.initializers]

    @property
    def scales(self) -> dict[str, npt.NDArray[np.floating]]:
        """Of each computed tensor with a Q: its scale, where that is constant."""
        found: dict[str, npt.NDArray[np.floating]] = {}
        for node in self.kind("QuantizeLinear"):
            scale = self.graph.constant(node.input[1])
            if scale is not None and node.input[0] not in self.graph.initializers:
                found.setdefault(node.input[0], scale)
        return found

    def weights(self) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
        """Layers whose weight goes through Q, each with that Q."""
        for node in self.layers:
            source = self.unpaired(node.input[1]) if len(node.input) > 1 else None
            if source in self.graph.initializers:
                yield node, self.graph.producer[self.graph.producer[node.input[1]].input[0]]

    def made_in_int8(self, tensor: str) -> bool:
        """Whether a layer with 8-bit inputs writes `tensor`, the activations and moves behind it included."""
        node = self.graph.producer.get(self.unpaired(tensor) or tensor)
        while node is not None and node.op_type in (*ACTIVATIONS, *MOVES):
            node = self.graph.producer.get(self.unpaired(node.input[0]) or node.input[0])
        return node is not None and bool(self.eight_bit(node))


def _without_pairs(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    passed = ("QuantizeLinear", "DequantizeLinear", "Cast")
    before = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in passed}
    kept = [node for node in copy.graph.node if node.op_type not in passed]
    for node in kept:
        for place, name in enumerate(node.input):
            while name in before:
                name = before[name]
            node.input[place] = name
    del copy.graph.node[:]
    copy.graph.node.extend(kept)
    return copy
