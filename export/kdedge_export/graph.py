"""Reading and editing an ONNX graph: who makes a tensor, who reads it, what is constant."""

from collections.abc import Container, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

__all__ = ["Graph", "attribute", "constant_tensor", "input_channels", "names_of", "prune", "unique"]


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute, or `default`."""
    for each in node.attribute:
        if each.name == name:
            return onnx.helper.get_attribute_value(each)
    return default


class Graph:
    """An index over a model, as it was when this was made: nodes are in topological order, as ONNX demands."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.inputs = [each.name for each in model.graph.input]
        self.outputs = [each.name for each in model.graph.output]
        self.initializers = {each.name: each for each in model.graph.initializer}
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def constant(self, name: str) -> npt.NDArray[Any] | None:
        """The value of an initializer, or None for anything computed."""
        found = self.initializers.get(name)
        return None if found is None else numpy_helper.to_array(found)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        return self.consumers.get(name, [])

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads `name`, or None where there are more, none, or the model's caller does."""
        readers = self.readers(name)
        return readers[0] if len(readers) == 1 and name not in self.outputs else None


def input_channels(node: onnx.NodeProto, weight: npt.NDArray[Any]) -> int:
    """How many channels (features) a Conv or Gemm with this weight reads."""
    if node.op_type == "Gemm":
        return int(weight.shape[1 if attribute(node, "transB", 0) else 0])
    return int(weight.shape[1] * attribute(node, "group", 1))


def prune(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Make `nodes` the graph's nodes and drop the initializers and shapes that nobody reads any more."""
    kept = list(nodes)
    read = {name for node in kept for name in node.input} | {each.name for each in model.graph.output}
    initializers = [each for each in model.graph.initializer if each.name in read]
    del model.graph.node[:]
    del model.graph.initializer[:]
    del model.graph.value_info[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(initializers)


def names_of(model: onnx.ModelProto) -> set[str]:
    """Every name in use: of tensors, constants and nodes."""
    graph = model.graph
    used = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
    return used | {each.name for each in [*graph.input, *graph.output, *graph.initializer]}


def unique(wanted: str, taken: Container[str]) -> str:
    """`wanted`, or where that is taken the first free one of wanted_2, wanted_3 and so on: names are a user's own."""
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def constant_tensor(name: str, value: npt.NDArray[Any]) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, order="C"), name)  # ascontiguousarray would make scalars 1-d
