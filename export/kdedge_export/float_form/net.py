"""A float graph while it is rewritten: nodes in order, constants by value, sizes of every tensor."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from kdedge_export.float_form.onnx_trace import Traced
from kdedge_export.graph import constant_tensor, prune, unique

__all__ = ["Net"]

Values = npt.NDArray[Any]


class Net:
    """A graph while it is rewritten. Names of tensors stay; new ones are taken from the node they serve."""

    def __init__(self, model: onnx.ModelProto, traced: Traced) -> None:
        self.nodes = list(model.graph.node)
        self.input, self.output = model.graph.input[0].name, model.graph.output[0].name
        self.shapes = dict(traced.shapes)
        self.types = dict(traced.types)
        self.made = {each.name: np.asarray(onnx.numpy_helper.to_array(each)) for each in model.graph.initializer}
        self._producer: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        self._changed = True

    def _index(self) -> None:
        if self._changed:
            self._producer = {name: node for node in self.nodes for name in node.output}
            self._readers = {}
            for node in self.nodes:
                for name in node.input:
                    self._readers.setdefault(name, []).append(node)
            self._changed = False

    def constant(self, name: str) -> Values | None:
        return self.made.get(name)

    def single(self, name: str) -> float | None:
        """A constant of one number."""
        value = self.made.get(name)
        return float(value.reshape(())) if value is not None and value.size == 1 else None

    def producer(self, name: str) -> onnx.NodeProto | None:
        self._index()
        return self._producer.get(name)

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        self._index()
        readers = self._readers.get(name, [])
        return readers[0] if len(readers) == 1 and name != self.output else None

    def readers(self, name: str) -> list[onnx.NodeProto]:
        self._index()
        return self._readers.get(name, [])

    def sort(self) -> None:
        """Makers before readers again, the rest in its order."""
        self._index()
        placed: set[str] = {self.input, "", *self.made}
        left, ordered = self.nodes, []
        while left:
            ready = [node for node in left if placed.issuperset(node.input)]
            node = ready[0]
            placed.update(node.output)
            ordered.append(node)
            left = [each for each in left if each is not node]
        self.nodes, self._changed = ordered, True

    def add_constant(self, name: str, value: Values) -> str:
        """The name it got: `name`, or one made from it where that is taken by another value."""
        name = unique(name, {*self.made, *self.shapes})
        self.made[name], self.shapes[name] = value, value.shape
        return name

    def set_constant(self, node: onnx.NodeProto, place: int, value: Values, name: str) -> None:
        """Give `node` its own constant; it keeps its name where nobody else reads it."""
        self._index()
        old = node.input[place] if place < len(node.input) else ""
        if old and len(self._readers.get(old, [])) == 1:
            self.made[old], self.shapes[old] = value, value.shape
        else:
            while len(node.input) <= place:
                node.input.append("")
            node.input[place] = self.add_constant(name, value)
        self._changed = True

    def replace(self, old: onnx.NodeProto, *new: onnx.NodeProto) -> None:
        place = next(i for i, node in enumerate(self.nodes) if node is old)
        self.nodes[place : place + 1] = new
        self._changed = True

    def remove(self, node: onnx.NodeProto, source: str = "") -> bool:
        """Take out a node that hands `source` on, its first input unless given.

        False where input and output are both the model's own.
        """
        before, after = source or node.input[0], node.output[0]
        if after == self.output:
            maker = self.producer(before)
            if maker is None:
                return False
            for place, name in enumerate(maker.output):
                if name == before:
                    maker.output[place] = after
            before, after = after, before
        self.nodes = [each for each in self.nodes if each is not node]
        for each in self.nodes:
            for place, name in enumerate(each.input):
                if name == after:
                    each.input[place] = before
        self._changed = True
        return True

    def forget_unread(self) -> None:
        """Drop what leads nowhere any more."""
        while True:
            read = {name for node in self.nodes for name in node.input} | {self.output}
            kept = [node for node in self.nodes if read.intersection(node.output)]
            if len(kept) == len(self.nodes):
                return
            self.nodes, self._changed = kept, True

    def write(self, model: onnx.ModelProto) -> None:
        """Make this the graph of `model`, the one it was read from."""
        del model.graph.initializer[:]
        model.graph.initializer.extend(constant_tensor(name, value) for name, value in self.made.items())
        prune(model, self.nodes)
