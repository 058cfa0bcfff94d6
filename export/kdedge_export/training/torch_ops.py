"""What each ONNX operator of a float network is in torch: opset 17, maps of two dimensions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor
from torch.nn import functional

from kdedge.errors import ExportError
from kdedge_export.graph import Graph, attribute

__all__ = ["Operator", "Run", "torch_operator"]

Run = Callable[..., Tensor | tuple[Tensor, ...]]


class Operator:
    """`run` computes a node's outputs from the tensors at its input `places`; other inputs are constants it knows."""

    def __init__(self, node: onnx.NodeProto, graph: Graph) -> None:
        if node.op_type not in _MAKERS or node.domain not in ("", "ai.onnx"):
            raise ExportError(
                f"The node {node.name} is a {node.op_type}, which cannot be computed in torch here; known are "
                f"{', '.join(sorted(_MAKERS))}. Export without what trains or corrects the weights."
            )
        self.node, self._graph = node, graph
        self._known: set[int] = set()
        self.run: Run = _MAKERS[node.op_type](self)
        self.places = [place for place, name in enumerate(node.input) if name and place not in self._known]

    def attribute(self, name: str, default: Any = None) -> Any:
        return attribute(self.node, name, default)

    def constant(self, place: int, default: Any = None) -> Any:
        """The constant at an input place as nested lists or a number, or `default` where there is no such input."""
        self._known.add(place)
        name = self.node.input[place] if len(self.node.input) > place else ""
        if not name:
            return default
        value: npt.NDArray[Any] | None = self._graph.constant(name)
        if value is None:
            raise self.refused(f"its input {name} is computed; a constant was expected")
        return value.tolist()

    def refused(self, why: str) -> ExportError:
        return ExportError(
            f"The {self.node.op_type} {self.node.name} cannot be computed in torch here: {why}. "
            "Export without what trains or corrects the weights."
        )

    def pads(self) -> list[int]:
        """[top, left, bottom, right]"""
        if self.attribute("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise self.refused(f"auto_pad is {self.attribute('auto_pad').decode()}; explicit pads were expected")
        pads = list(self.attribute("pads", [0, 0, 0, 0]))
        if len(pads) != 4:
            raise self.refused(f"it pads {len(pads) // 2} dimensions; 2 were expected")
        return pads


def torch_operator(node: onnx.NodeProto, graph: Graph) -> Operator:
    """ExportError where the operator, or this form of it, is not known."""
    return Operator(node, graph)


def _padded(op: Operator, value: float) -> tuple[tuple[int, int], Callable[[Tensor], Tensor]]:
    """torch's own padding, for the same on both sides; else none, and what pads beforehand."""
    top, left, bottom, right = op.pads()
    if (top, left) == (bottom, right):
        return (top, left), lambda x: x
    return (0, 0), lambda x: functional.pad(x, (left, right, top, bottom), value=value)


def _conv(op: Operator) -> Run:
    padding, pad = _padded(op, 0.0)
    stride, dilation = op.attribute("strides", [1, 1]), op.attribute("dilations", [1, 1])
    groups = op.attribute("group", 1)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.conv2d(pad(x), weight, bias, stride, padding, dilation, groups)

    return run


def _gemm(op: Operator) -> Run:
    alpha, beta = op.attribute("alpha", 1.0), op.attribute("beta", 1.0)
    turn_a, turn_b = op.attribute("transA", 0), op.attribute("transB", 0)

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        if (alpha, beta, turn_a, turn_b) == (1.0, 1.0, 0, 1):
            return functional.linear(a, b, c)
        product: Tensor = alpha * ((a.T if turn_a else a) @ (b.T if turn_b else b))
        return product if c is None else product + beta * c

    return run


def _max_pool(op: Operator) -> Run:
    padding, pad = _padded(op, -np.inf)
    kernel, stride = op.attribute("kernel_shape"), op.attribute("strides", [1, 1])
    dilation, ceil = op.attribute("dilations", [1, 1]), bool(op.attribute("ceil_mode", 0))
    return lambda x: functional.max_pool2d(pad(x), kernel, stride, padding, dilation, ceil)


def _average_pool(op: Operator) -> Run:
    padding, counts = op.pads(), bool(op.attribute("count_include_pad", 0))
    if padding[:2] != padding[2:]:
        raise op.refused(f"its pads {padding} differ between the sides")
    kernel, stride, ceil = op.attribute("kernel_shape"), op.attribute("strides", [1, 1]), op.attribute("ceil_mode", 0)
    return lambda x: functional.avg_pool2d(x, kernel, stride, tuple(padding[:2]), bool(ceil), counts)


def _batch_norm(op: Operator) -> Run:
    epsilon = op.attribute("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        normalized: Tensor = functional.batch_norm(x, mean, var, scale, bias, eps=epsilon)
        return normalized

    return run


def _clip(op: Operator) -> Run:
    low, high = op.constant(1), op.constant(2)
    return lambda x: x.clamp(low, high)


def _hard_sigmoid(op: Operator) -> Run:
    alpha, beta = op.attribute("alpha", 0.2), op.attribute("beta", 0.5)
    if beta == 0.5 and np.float32(alpha) == np.float32(1 / 6):
        return functional.hardsigmoid
    return lambda x: (alpha * x + beta).clamp(0.0, 1.0)


def _leaky_relu(op: Operator) -> Run:
    slope = op.attribute("alpha", 0.01)
    return lambda x: functional.leaky_relu(x, slope)


def _flatten(op: Operator) -> Run:
    axis = op.attribute("axis", 1)
    if axis != 1:
        raise op.refused(f"its axis is {axis}; 1 was expected")
    return lambda x: x.flatten(1)


def _reshape(op: Operator) -> Run:
    shape = op.constant(1)
    copied = not op.attribute("allowzero", 0)
    return lambda x: x.reshape([x.shape[i] if size == 0 and copied else size for i, size in enumerate(shape)])


def _transpose(op: Operator) -> Run:
    order = op.attribute("perm")
    return lambda x: x.permute(order if order is not None else list(range(x.ndim))[::-1])


def _split(op: Operator) -> Run:
    axis, sizes, parts = op.attribute("axis", 0), op.constant(1), len(op.node.output)
    return lambda x: x.split(sizes if sizes is not None else x.shape[axis] // parts, axis)


def _concat(op: Operator) -> Run:
    axis = op.attribute("axis")
    return lambda *parts: torch.cat(parts, axis)


def _reduce_mean(op: Operator) -> Run:
    axes, keep = op.attribute("axes"), bool(op.attribute("keepdims", 1))
    return lambda x: x.mean(axes if axes is not None else list(range(x.ndim)), keepdim=keep)


def _squeeze(op: Operator) -> Run:
    axes = op.constant(1)
    return lambda x: x.squeeze() if axes is None else x.squeeze(axes)


def _unsqueeze(op: Operator) -> Run:
    axes = op.constant(1)

    def run(x: Tensor) -> Tensor:
        for axis in sorted(axis if axis >= 0 else axis + x.ndim + len(axes) for axis in axes):
            x = x.unsqueeze(axis)
        return x

    return run


def _pad(op: Operator) -> Run:
    if op.attribute("mode", b"constant") != b"constant":
        raise op.refused(f"it pads by {op.attribute('mode').decode()}; a constant was expected")
    pads, value = op.constant(1), op.constant(2, 0.0)
    half = len(pads) // 2
    pairs = [side for axis in reversed(range(half)) for side in (pads[axis], pads[half + axis])]
    return lambda x: functional.pad(x, pairs, value=value)


def _softmax(op: Operator) -> Run:
    axis = op.attribute("axis", -1)
    return lambda x: x.softmax(axis)


def _plain(run: Run) -> Callable[[Operator], Run]:
    return lambda op: run


_MAKERS: dict[str, Callable[[Operator], Run]] = {
    "Add": _plain(torch.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _plain(torch.div),
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _plain(lambda x: x.mean((2, 3), keepdim=True)),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(functional.hardswish),
    "Identity": _plain(lambda x: x),
    "LeakyRelu": _leaky_relu,
    "MatMul": _plain(torch.matmul),
    "MaxPool": _max_pool,
    "Mul": _plain(torch.mul),
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": _plain(functional.relu),
    "Reshape": _reshape,
    "Sigmoid": _plain(torch.sigmoid),
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _plain(torch.sub),
    "Tanh": _plain(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
