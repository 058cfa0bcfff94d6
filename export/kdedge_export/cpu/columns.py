"""The first convolution, over a few channels, computed for four columns at once; the function is the same.

ONNX Runtime copies each pixel under the kernel by itself, three bytes at a time, and that takes longer than all the
products. Four neighbours taken for one pixel of twelve channels make it a third of the copies: the convolution reads
and makes groups of columns, its weights repeated at every place, zeros in between.

O, I channels out and in, y and t a place in the kernel, j a column of a group read, q one of a group made.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from kdedge_export.cpu.plan import Plan
from kdedge_export.graph import Graph, attribute, constant_tensor
from kdedge_export.table import RangeTable

__all__ = ["in_columns"]

COLUMNS = 4
MAX_CHANNELS = 4  # from there on a pixel is worth its copy
CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
COLUMN_GROUPS_LAST = (0, 2, 3, 1, 4)  # [N, I, H, groups, j]: blocks of j stay together, which is twice as fast
Shapes = dict[str, list[int]]


def in_columns(model: onnx.ModelProto, plan: Plan, table: RangeTable) -> tuple[onnx.ModelProto, Plan, RangeTable]:
    """Copies in which the plan's convolutions over at most 4 channels work on groups of columns, where that fits."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    writer = _Writer(copy, plan, table)
    for node in writer.graph.nodes:
        fit = _fit(node, writer.graph, writer.shapes) if node.name in plan.layers else None
        if fit is not None:
            writer.regroup(node, fit)
        else:
            writer.add(node)
    del copy.graph.node[:]
    copy.graph.node.extend(writer.nodes)
    return copy, writer.plan, writer.table


@dataclass(frozen=True)
class _Fit:
    """Columns made at once, how many groups are read in front of and behind the one at the place, and the stride."""

    made: int
    before: int
    behind: int
    stride: int


def _fit(node: onnx.NodeProto, graph: Graph, shapes: Shapes) -> _Fit | None:
    """How `node` can work on groups of columns, or None."""
    weight = graph.constant(node.input[1]) if node.op_type == "Conv" else None
    shape, made = shapes.get(node.input[0], []), shapes.get(node.output[0], [])
    if weight is None or weight.ndim != 4 or len(shape) != 4 or len(made) != 4 or not all(shape[1:] + made[1:]):
        return None
    strides, pads = attribute(node, "strides", [1, 1]), attribute(node, "pads", [0, 0, 0, 0])
    plain = attribute(node, "group", 1) == 1 and set(attribute(node, "dilations", [1])) == {1}
    named = attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"
    if not plain or not named or shape[1] > MAX_CHANNELS or shape[3] % COLUMNS or COLUMNS % strides[1]:
        return None
    reader = graph.only_reader(node.output[0])
    if made[3] * strides[1] != shape[3] or (reader is not None and reader.op_type == "HardSigmoid"):
        return None
    last = COLUMNS - strides[1] - pads[1] + weight.shape[3] - 1  # the last column that a group reads, from its start
    return _Fit(COLUMNS // strides[1], -(-pads[1] // COLUMNS), max(0, last // COLUMNS), strides[1])


def _columns(weight: npt.NDArray[np.float32], fit: _Fit, left: int) -> npt.NDArray[np.float32]:
    """[O, I, y, t] -> [q O, I j, y, groups]: at group g and column j of it lies t = COLUMNS g + j - stride q + left."""
    outputs, inputs, height, width = weight.shape
    groups = fit.before + 1 + fit.behind
    made = np.zeros((fit.made, outputs, inputs, COLUMNS, height, groups), weight.dtype)
    for q in range(fit.made):
        for group in range(groups):
            for j in range(COLUMNS):
                t = COLUMNS * (group - fit.before) + j - fit.stride * q + left
                if 0 <= t < width:
                    made[q, :, :, j, :, group] = weight[:, :, :, t]
    return made.reshape(fit.made * outputs, inputs * COLUMNS, height, groups)


class _Writer:
    def __init__(self, model: onnx.ModelProto, plan: Plan, table: RangeTable) -> None:
        shaped = onnx.shape_inference.infer_shapes(model).graph
        self.shapes = {
            each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim]
            for each in [*shaped.value_info, *shaped.input, *shaped.output]
        }
        del model.graph.value_info[:]
        self.model = model
        self.graph = Graph(model)
        self.plan = plan
        self.table = table
        self.nodes: list[onnx.NodeProto] = []
        self.pending: dict[
            str, str
        ] = {}  # the output of a convolution or its activation -> the layer, until it is made

    def add(self, node: onnx.NodeProto) -> None:
        self.nodes.append(node)
        layer = self.pending.pop(node.output[0], None)
        if layer is not None:
            tensor, grouped = node.output[0], f"{layer}:columns"
            node.output[0] = grouped
            self._eight_bit(grouped, None)
            self.table = self.table.with_spans({grouped: self.table.spans[tensor]})
            channels, height, width = self.shapes[tensor][1:]
            self._move(grouped, f"{layer}:out1", "Transpose", CHANNELS_LAST)
            self._move(f"{layer}:out1", f"{layer}:out2", "Reshape", (0, height, width, channels))
            self._move(f"{layer}:out2", tensor, "Transpose", CHANNELS_FIRST)

    def regroup(self, node: onnx.NodeProto, fit: _Fit) -> None:
        """`node` between moves into groups of columns and the moves back, which come behind its activation."""
        channels, height, width = self.shapes[node.input[0]][1:]
        steps = [f"{node.name}:in{step}" for step in (1, 2, 3)]
        self._move(node.input[0], steps[0], "Reshape", (0, channels, height, width // COLUMNS, COLUMNS))
        self._move(steps[0], steps[1], "Transpose", COLUMN_GROUPS_LAST)
        self._move(steps[1], steps[2], "Reshape", (0, height, width // COLUMNS, channels * COLUMNS))
        self._move(steps[2], f"{node.name}:in", "Transpose", CHANNELS_FIRST)
        strides, pads = attribute(node, "strides", [1, 1]), attribute(node, "pads", [0, 0, 0, 0])
        weight = np.asarray(self.graph.constant(node.input[1]))
        inputs = [f"{node.name}:in", self._constant(f"{node.name}:weight", _columns(weight, fit, pads[1]))]
        if len(node.input) > 2 and node.input[2]:
            bias = np.tile(np.asarray(self.graph.constant(node.input[2])), fit.made)
            inputs.append(self._constant(f"{node.name}:bias", bias))
        copy = helper.make_node(
            "Conv",
            inputs,
            node.output,
            name=node.name,
            kernel_shape=[weight.shape[2], fit.before + 1 + fit.behind],
            strides=[strides[0], 1],
            pads=[pads[0], fit.before, pads[2], fit.behind],
        )
        scales = self.table.weight_scales
        self.table = replace(self.table, weight_scales={**scales, node.name: np.tile(scales[node.name], fit.made)})
        reader = self.graph.only_reader(node.output[0])
        absorbed = reader is not None and reader.name in self.plan.absorbed
        self.pending[reader.output[0] if reader is not None and absorbed else node.output[0]] = node.name
        self.add(copy)

    def _move(self, source: str, target: str, operator: str, to: tuple[int, ...]) -> None:
        """`target` from `source`, at its scale: a Reshape to the shape `to`, or a Transpose by it."""
        inputs, attributes = [source], {"perm": to}
        if operator == "Reshape":
            inputs, attributes = [source, self._constant(f"{target}:shape", np.array(to, np.int64))], {}
        self.nodes.append(helper.make_node(operator, inputs, [target], name=f"{target}:move", **attributes))
        self._eight_bit(target, self.plan.same_scale.get(source, source))
        self.table = self.table.with_spans({target: self.table.spans[source]})
        self.plan = replace(self.plan, layers=self.plan.layers | {f"{target}:move"})

    def _eight_bit(self, name: str, source: str | None) -> None:
        plan = self.plan
        self.plan = replace(
            plan,
            tensors=plan.tensors if name in plan.tensors else (*plan.tensors, name),
            made=plan.made | {name},
            same_scale=plan.same_scale if source is None else {**plan.same_scale, name: source},
        )

    def _constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        self.model.graph.initializer.append(constant_tensor(name, value))
        return name
