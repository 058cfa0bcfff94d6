"""Channel shuffles folded into the order of weights: no transposition is left, and every channel is rounded once.

ShuffleNet (arXiv 1707.01083, 1807.11164) joins two halves, shuffles their channels and cuts them again, over and over.
A convolution reads channels in any order if its weights have the same one: so each reads those that it needs from the
tensors that they were made in, as they lie there, in parts that are joined once.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from kdedge_export.cpu.plan import Plan
from kdedge_export.graph import Graph, attribute, constant_tensor, prune
from kdedge_export.table import RangeTable

__all__ = ["unshuffled"]

Channels = list[tuple[str, int]]
"""What a tensor holds: for each channel the tensor that it was made in, and its place there."""


def unshuffled(model: onnx.ModelProto, plan: Plan, table: RangeTable) -> tuple[onnx.ModelProto, Plan, RangeTable]:
    """Copies without channel shuffles; just as they were where there is none, or where anything but a convolution (and
    the activation absorbed behind it) reads shuffled channels.
    """
    shaped = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim]
        for each in [*shaped.value_info, *shaped.input, *shaped.output]
    }
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    found = _trace(Graph(copy), plan, shapes)
    if found is None:
        return model, plan, table
    return _Writer(copy, plan, table, shapes, found).write()


@dataclass
class _Found:
    """`holds`: what the tensors hold that are moved to or in another order. `gone`: nodes that only moved."""

    holds: dict[str, Channels] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    orders: dict[str, list[int]] = field(default_factory=dict)
    reads: dict[str, Channels] = field(default_factory=dict)
    shuffles: int = 0


def _trace(graph: Graph, plan: Plan, shapes: dict[str, list[int]]) -> _Found | None:
    """Follow all channels through the moves of the plan. None where there is no shuffle, or one that must stay."""
    found = _Found()

    def channels(name: str) -> Channels:
        return found.holds.get(name) or [(name, place) for place in range(shapes[name][1])]

    for node in graph.nodes:
        if node.name in found.gone:
            continue
        inputs = [name for name in node.input if name in found.holds]
        moves = node.name in plan.layers and attribute(node, "axis") == 1
        shuffle = _shuffle(node, graph, shapes) if node.name in plan.layers else None
        if shuffle is not None:
            last, groups, nodes = shuffle
            held = channels(node.input[0])
            found.holds[last] = [held[i] for i in np.arange(len(held)).reshape(groups, -1).T.ravel()]
            found.gone.update(nodes)
            found.shuffles += 1
        elif node.op_type == "Concat" and moves:
            found.holds[node.output[0]] = [each for name in node.input for each in channels(name)]
            found.gone.add(node.name)
        elif node.op_type == "Split" and moves:
            ends = np.cumsum([shapes[name][1] for name in node.output])
            for name, start, end in zip(node.output, [0, *ends[:-1]], ends, strict=True):
                found.holds[name] = channels(node.input[0])[start:end]
            found.gone.add(node.name)
        elif inputs and not _read(node, graph, plan, found):
            return None
    return found if found.shuffles and not found.holds.keys() & set(graph.outputs) else None


def _shuffle(
    node: onnx.NodeProto, graph: Graph, shapes: dict[str, list[int]]
) -> tuple[str, int, tuple[str, str, str]] | None:
    """Reshape to groups, Transpose, Reshape back: the last tensor, the groups, the three names."""
    second = graph.only_reader(node.output[0]) if node.op_type == "Reshape" else None
    third = graph.only_reader(second.output[0]) if second is not None and second.op_type == "Transpose" else None
    if second is None or third is None or third.op_type != "Reshape":
        return None
    before, cut, after = (shapes.get(name, []) for name in (node.input[0], node.output[0], third.output[0]))
    whole = len(before) == 4 and before == after and len(cut) == 5 and cut[3:] == before[2:]
    if not whole or cut[1] * cut[2] != before[1] or list(attribute(second, "perm", [])) != [0, 2, 1, 3, 4]:
        return None
    return third.output[0], cut[1], (node.name, second.name, third.name)


def _read(node: onnx.NodeProto, graph: Graph, plan: Plan, found: _Found) -> bool:
    """Note in which order `node` takes its channels; False where it must have them in theirs."""
    held = found.holds.get(node.input[0], [])
    sources = list(dict.fromkeys(source for source, _ in held))
    order = sorted(range(len(held)), key=lambda i: (sources.index(held[i][0]), held[i][1]))
    if node.name in plan.absorbed:
        found.holds[node.output[0]] = [(node.output[0], place) for _, place in held]
        return len(sources) == 1
    weight = graph.constant(node.input[1]) if node.op_type == "Conv" and node.name in plan.layers else None
    if weight is None or any(len(graph.readers(name)) > 1 for name in node.input[1:] if name):
        return False
    groups = attribute(node, "group", 1)
    if groups == len(weight) == len(held) and groups > 1:  # depthwise: it makes its channels in the order that it reads
        place = np.argsort(order)
        found.holds[node.output[0]] = [(node.output[0], int(i)) for i in place]
    elif groups != 1:
        return False
    found.orders[node.name] = order
    found.reads[node.name] = [held[i] for i in order]
    return True


class _Writer:
    def __init__(
        self, model: onnx.ModelProto, plan: Plan, table: RangeTable, shapes: dict[str, list[int]], found: _Found
    ) -> None:
        self.model = model
        self.graph = Graph(model)
        self.plan = plan
        self.spans = dict(table.spans)
        self.scales = dict(table.weight_scales)
        self.shapes = shapes
        self.found = found
        self.cuts = self._cuts()
        self.joined: dict[tuple[tuple[str, int], ...], str] = {}
        self.made: dict[str, str | None] = {}  # new 8-bit tensor -> whose scale it takes
        self.layers: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []

    def write(self) -> tuple[onnx.ModelProto, Plan, RangeTable]:
        for node in self.graph.nodes:
            if node.name in self.found.gone:
                continue
            if node.name in self.found.reads:
                self._reorder(node)
            self.nodes.append(node)
            for name in node.output:
                self._cut(name)
        prune(self.model, self.nodes)
        plan = replace(
            self.plan,
            layers=self.plan.layers | self.layers,
            tensors=(*self.plan.tensors, *self.made),
            made=self.plan.made | self.made.keys(),
            same_scale={
                **self.plan.same_scale,
                **{name: source for name, source in self.made.items() if source is not None},
            },
        )
        return self.model, plan, RangeTable(self.spans, self.scales)

    def _cuts(self) -> dict[str, list[int]]:
        """Where each tensor is cut so that every reader's share is whole parts of it."""
        cuts: dict[str, set[int]] = {}
        for channels in self.found.reads.values():
            for source, start, end in _runs(channels):
                cuts.setdefault(source, set()).update((start, end))
        return {source: sorted({0, self.shapes[source][1], *places}) for source, places in cuts.items()}

    def _cut(self, name: str) -> None:
        cuts = self.cuts.get(name, [])
        if len(cuts) <= 2:
            return
        parts = [_part(name, start) for start in cuts[:-1]]
        sizes = self._constant(f"{name}:sizes", np.diff(cuts).astype(np.int64))
        self.nodes.append(helper.make_node("Split", [name, sizes], parts, name=f"{name}:cut", axis=1))
        self.layers.add(f"{name}:cut")
        for part in parts:
            self.made[part] = self.plan.same_scale.get(name, name)
            self.spans[part] = self.spans[name]

    def _reorder(self, node: onnx.NodeProto) -> None:
        """Read the joined parts, with weights in their order."""
        order, channels = self.found.orders[node.name], self.found.reads[node.name]
        node.input[0] = self._join(f"{node.name}:joined", channels)
        weight = np.asarray(self.graph.constant(node.input[1]))
        if attribute(node, "group", 1) == 1:
            self._store(node.input[1], weight[:, order])
            return
        self._store(node.input[1], weight[order])
        if len(node.input) > 2 and node.input[2]:
            self._store(node.input[2], np.asarray(self.graph.constant(node.input[2]))[order])
        self.scales[node.name] = self.scales[node.name][order]

    def _join(self, name: str, channels: Channels) -> str:
        parts = [
            (source, place)
            for source, start, end in _runs(channels)
            for place in self.cuts[source][:-1]
            if start <= place < end
        ]
        names = [source if len(self.cuts[source]) == 2 else _part(source, place) for source, place in parts]
        if len(names) == 1:
            return names[0]
        known = self.joined.setdefault(tuple(channels), name)
        if known == name:
            self.nodes.append(helper.make_node("Concat", names, [name], name=name, axis=1))
            self.layers.add(name)
            self.made[name] = None
            spans = [self.spans[source] for source, _ in parts]
            self.spans[name] = (min(low for low, _ in spans), max(high for _, high in spans))
        return known

    def _constant(self, name: str, value: npt.NDArray[np.int64]) -> str:
        self.model.graph.initializer.append(constant_tensor(name, value))
        return name

    def _store(self, name: str, value: npt.NDArray[np.float32]) -> None:
        self.graph.initializers[name].CopyFrom(constant_tensor(name, value))


def _part(source: str, place: int) -> str:
    return f"{source}:from{place}"


def _runs(channels: Channels) -> list[tuple[str, int, int]]:
    """Channels in order -> (source, first, behind the last) of each run of neighbours."""
    runs: list[tuple[str, int, int]] = []
    for source, place in channels:
        if runs and runs[-1][0] == source and runs[-1][2] == place:
            runs[-1] = (source, runs[-1][1], place + 1)
        else:
            runs.append((source, place, place + 1))
    return runs
