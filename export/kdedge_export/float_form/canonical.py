"""A float graph in the words that the rest of the export knows, whoever spelled it: each rule keeps the values.

A rule looks at one node and rewrites around it. Sizes are those of `onnx_fold.fold`; B is the batch they were taken at.
"""

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from kdedge_export.float_form.affine import affine_after, affine_before, matmul
from kdedge_export.float_form.net import Net
from kdedge_export.float_form.onnx_trace import Traced
from kdedge_export.graph import attribute, unique

__all__ = ["canonical"]

Rule = Callable[[Net, onnx.NodeProto], bool]


def canonical(model: onnx.ModelProto, traced: Traced) -> onnx.ModelProto:
    """A copy in canonical words, its batch normalisation folded away where a layer can take it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    net = Net(copy, traced)
    for rules in (
        (_pointless, _flatten, _pool, _relu_six, _slices, matmul),
        (affine_after, affine_before),
        (_hard_sigmoid, _hard_swish),
    ):
        with np.errstate(all="ignore"):  # what is not finite here is found when the result is compared
            _apply(net, rules)
    net.write(copy)
    return copy


def _apply(net: Net, rules: tuple[Rule, ...]) -> None:
    changed = True
    while changed:
        changed = False
        for node in list(net.nodes):
            if any(node is each for each in net.nodes):
                changed |= any(rule(net, node) for rule in rules)


def _pointless(net: Net, node: onnx.NodeProto) -> bool:
    """Nodes that hand on what they get: Identity, Dropout, a Cast to what it is, a Reshape to the same shape."""
    source, result = node.input[0] if node.input else "", node.output[0]
    same_type = net.types.get(source) == net.types.get(result) == TensorProto.FLOAT
    if node.op_type == "Pad":
        pads = net.constant(node.input[1])
        pointless = pads is not None and not pads.any()
    elif node.op_type == "Transpose":
        order = list(attribute(node, "perm", []))
        pointless = order == sorted(order) and bool(order)
    elif node.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand"):
        pointless = net.shapes[source] == net.shapes[result]
    elif node.op_type in ("AveragePool", "MaxPool"):
        ones = [1] * len(attribute(node, "kernel_shape"))
        pointless = list(attribute(node, "kernel_shape")) == ones and net.shapes[source] == net.shapes[result]
    elif node.op_type == "Concat":
        pointless = len(node.input) == 1
    elif node.op_type == "Dropout":
        pointless = not any(net.only_reader(name) for name in list(node.output)[1:])
    else:
        pointless = node.op_type in ("Identity", "Cast", "CastLike")
    return bool(pointless and same_type and net.remove(node))


def _flatten(net: Net, node: onnx.NodeProto) -> bool:
    """[B, C, h, w] -> [B, C h w], in whatever words, is a Flatten, which every quantizer passes through."""
    if node.op_type not in ("Reshape", "Squeeze"):
        return False
    before, after = net.shapes[node.input[0]], net.shapes[node.output[0]]
    if len(after) != 2 or len(before) < 3 or before[0] != after[0]:
        return False
    net.replace(node, helper.make_node("Flatten", node.input[:1], node.output, name=node.name, axis=1))
    return True


def _pool(net: Net, node: onnx.NodeProto) -> bool:
    """A mean over the whole map is a GlobalAveragePool, which has an integer kernel."""
    source, result = node.input[0] if node.input else "", node.output[0]
    shape = net.shapes.get(source, ())
    if len(shape) != 4:
        return False
    if node.op_type == "AveragePool":
        whole = tuple(attribute(node, "kernel_shape")) == shape[2:] and net.shapes[result][2:] == (1, 1)
        if not whole or any(attribute(node, "pads", [])) or attribute(node, "auto_pad", b"NOTSET") == b"SAME_LOWER":
            return False
    elif node.op_type == "ReduceMean":
        axes = attribute(node, "axes")
        if axes is None and len(node.input) > 1 and net.constant(node.input[1]) is not None:
            axes = np.asarray(net.made[node.input[1]]).tolist()
        if axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
            return False
        if not attribute(node, "keepdims", 1):
            pooled = unique(f"{result}_pooled", net.shapes)
            net.shapes[pooled], net.types[pooled] = (*shape[:2], 1, 1), net.types[result]
            net.replace(
                node,
                helper.make_node("GlobalAveragePool", [source], [pooled], name=node.name),
                helper.make_node("Flatten", [pooled], [result], axis=1),
            )
            return True
    else:
        return False
    net.replace(node, helper.make_node("GlobalAveragePool", [source], [result], name=node.name))
    return True


def _slices(net: Net, node: onnx.NodeProto) -> bool:
    """Slices that cut a tensor along one axis without a gap are a Split, which only moves values."""
    first = _cut(net, node)
    if first is None:
        return False
    source, axis = node.input[0], first[0]
    cuts = {}
    for each in net.readers(source):
        cut = _cut(net, each)
        if cut is not None and cut[0] == axis:
            cuts[cut[1:]] = each
    bounds = sorted(cuts)
    ends = [0, *(stop for _, stop in bounds)]
    if not any(each is node for each in cuts.values()):
        return False  # a twin of another Slice, which has its place
    if len(cuts) < 2 or ends != [*(start for start, _ in bounds), net.shapes[source][axis]]:
        return False
    sizes = net.add_constant(f"{source}_sizes", np.array([stop - start for start, stop in bounds], np.int64))
    outputs = [cuts[bound].output[0] for bound in bounds]
    for each in cuts.values():
        if each is not node:
            net.replace(each)
    net.replace(node, helper.make_node("Split", [source, sizes], outputs, name=node.name, axis=axis))
    net.sort()
    return True


def _cut(net: Net, node: onnx.NodeProto) -> tuple[int, int, int] | None:
    """(axis, start, stop) of a Slice along one axis other than the batch, in steps of one."""
    if node.op_type != "Slice":
        return None
    defaults = {3: 0.0, 4: 1.0}  # a Slice without axes begins with the first
    names = dict(enumerate(node.input))
    values = [net.single(names[place]) if names.get(place) else defaults.get(place) for place in range(1, 5)]
    if any(value is None for value in values):
        return None
    start, stop, axis, step = (int(value) for value in values if value is not None)
    shape = net.shapes[node.input[0]]
    axis %= len(shape)
    start, stop, _ = slice(start, stop).indices(shape[axis])
    return (axis, start, stop) if step == 1 and axis > 0 else None


def _relu_six(net: Net, node: onnx.NodeProto) -> bool:
    """min(relu(x), c) is a Clip to [0, c]."""
    found = _with_constant(net, node, "Min") if len(node.input) == 2 else None
    before = net.producer(found[0]) if found else None
    if found is None or before is None or before.op_type != "Relu":
        return False
    limits = [net.add_constant(f"{node.output[0]}_{i}", np.array(v, np.float32)) for i, v in enumerate((0, found[1]))]
    net.replace(node, helper.make_node("Clip", [before.input[0], *limits], node.output, name=node.name))
    net.forget_unread()
    return True


def _clip_of(net: Net, node: onnx.NodeProto | None, low: float, high: float) -> str | None:
    """What `node` clips to exactly [low, high], or None."""
    if node is None or node.op_type != "Clip" or len(node.input) != 3:
        return None
    return str(node.input[0]) if [net.single(name) for name in node.input[1:]] == [low, high] else None


def _with_constant(net: Net, node: onnx.NodeProto | None, op_type: str) -> tuple[str, float] | None:
    """(tensor, number) where `node` is op_type of the two, in any order where order does not matter."""
    if node is None or node.op_type != op_type:
        return None
    for tensor, number in ((0, 1), (1, 0)) if op_type in ("Add", "Mul", "Min") else ((0, 1),):
        value = net.single(node.input[number])
        if value is not None and net.constant(node.input[tensor]) is None:
            return str(node.input[tensor]), value
    return None


def _sixth(net: Net, node: onnx.NodeProto) -> str | None:
    """What `node` divides by six."""
    divided, times = _with_constant(net, node, "Div"), _with_constant(net, node, "Mul")
    if divided and divided[1] == 6.0:
        return divided[0]
    return times[0] if times and np.isclose(times[1], 1 / 6, rtol=1e-6) else None


def _shifted_clip(net: Net, name: str) -> str | None:
    """x where the tensor `name` is clip(x + 3, 0, 6)."""
    inner = _clip_of(net, net.producer(name), 0.0, 6.0)
    shifted = _with_constant(net, net.producer(inner), "Add") if inner else None
    return shifted[0] if shifted and shifted[1] == 3.0 else None


def _hard_sigmoid(net: Net, node: onnx.NodeProto) -> bool:
    """clip(x + 3, 0, 6) / 6."""
    inner = _sixth(net, node)
    source = _shifted_clip(net, inner) if inner else None
    if source is None:
        return False
    made = helper.make_node("HardSigmoid", [source], node.output, name=node.name, alpha=1 / 6, beta=0.5)
    net.replace(node, made)
    net.forget_unread()
    return True


def _hard_swish(net: Net, node: onnx.NodeProto) -> bool:
    """x HardSigmoid(x), or x clip(x + 3, 0, 6) divided by six at the end."""
    inner = _sixth(net, node)
    product = net.producer(inner) if inner else node
    if product is None or product.op_type != "Mul":
        return False
    for x, gate in (tuple(product.input), tuple(product.input)[::-1]):
        source = _shifted_clip(net, gate) if inner else _hard_sigmoid_of(net, gate)
        if source == x:
            net.replace(node, helper.make_node("HardSwish", [x], node.output, name=node.name))
            net.forget_unread()
            return True
    return False


def _hard_sigmoid_of(net: Net, name: str) -> str | None:
    node = net.producer(name)
    if node is None or node.op_type != "HardSigmoid":
        return None
    right = np.isclose(attribute(node, "alpha", 0.2), 1 / 6) and attribute(node, "beta", 0.5) == 0.5
    return str(node.input[0]) if right else None
