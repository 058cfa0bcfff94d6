"""Layers take in what is linear around them: batch normalisation, scales and biases kept as nodes of their own.

O output channels, I input channels of one group, G groups, K columns of a Gemm.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from kdedge_export.float_form.net import Net
from kdedge_export.graph import attribute

__all__ = ["affine_after", "affine_before", "matmul"]

Vector = npt.NDArray[np.float64]


def matmul(net: Net, node: onnx.NodeProto) -> bool:
    """x W and x W + b become Gemm in the one form x W^T + b, which is how torch keeps them."""
    if node.op_type == "MatMul":
        weight = net.constant(node.input[1])
        if weight is None or weight.ndim != 2 or len(net.shapes[node.input[0]]) != 2:
            return False
        made = helper.make_node("Gemm", node.input, node.output, name=node.name, transB=1)
        net.replace(node, made)
        net.set_constant(made, 1, np.ascontiguousarray(weight.T), f"{node.output[0]}.weight")
        return True
    return node.op_type == "Gemm" and not attribute(node, "transA", 0) and _gemm(net, node)


def _gemm(net: Net, node: onnx.NodeProto) -> bool:
    """alpha and beta go into weight and bias; the bias becomes one number for each output, however it was spread."""
    weight = net.constant(node.input[1])
    biased = len(node.input) > 2 and bool(node.input[2])
    bias = net.constant(node.input[2]) if biased else None
    if weight is None or weight.ndim != 2 or (biased and bias is None):
        return False
    if bias is not None and bias.ndim == 2 and len(bias) != 1:  # another bias for each image
        return False
    alpha, beta, turned = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0), attribute(node, "transB", 0)
    rows = weight if turned else weight.T
    if alpha == beta == 1.0 and turned and (bias is None or bias.shape == rows.shape[:1]):
        return False
    made = helper.make_node("Gemm", node.input, node.output, name=node.name, transB=1)
    net.replace(node, made)
    net.set_constant(made, 1, np.ascontiguousarray(rows * np.float32(alpha)), f"{node.output[0]}.weight")
    if bias is not None:
        row = np.broadcast_to(bias.reshape(-1) * np.float32(beta), rows.shape[:1])
        net.set_constant(made, 2, np.ascontiguousarray(row), f"{node.output[0]}.bias")
    return True


def affine_after(net: Net, node: onnx.NodeProto) -> bool:
    """scale * layer(x) + shift is the layer with other weights and another bias."""
    found = _affine(net, node)
    if found is None:
        return False
    source, scale, shift = found
    layer = net.producer(source)
    if layer is None or net.only_reader(source) is None:
        return False
    if layer.op_type == "BatchNormalization":
        return _into_normalization(net, layer, scale, shift) and net.remove(node, source)
    if not _plain(net, layer):
        return False
    weight, bias = _parameters(net, layer)
    shape = (-1,) + (1,) * (weight.ndim - 1)
    _set(net, layer, weight * scale.reshape(shape), bias * scale + shift)
    return net.remove(node, source)


def _into_normalization(net: Net, norm: onnx.NodeProto, scale: Vector, shift: Vector) -> bool:
    """scale * (gamma x' + beta) + shift, as Caffe wrote its Scale layers."""
    gamma, beta = (net.constant(name) for name in norm.input[1:3])
    if gamma is None or beta is None:
        return False
    net.set_constant(norm, 1, (gamma * scale).astype(np.float32), f"{norm.input[1]}.folded")
    net.set_constant(norm, 2, (beta * scale + shift).astype(np.float32), f"{norm.input[2]}.folded")
    return True


def affine_before(net: Net, node: onnx.NodeProto) -> bool:
    """layer(scale * x + shift) likewise, where no padding comes between: a padded 0 would not have been shifted."""
    if not _plain(net, node):
        return False
    before = net.producer(node.input[0])
    found = _affine(net, before) if before is not None else None
    if before is None or found is None or net.only_reader(before.output[0]) is None:
        return False
    source, scale, shift = found
    padded = any(attribute(node, "pads", [])) or attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    if node.op_type == "Conv" and padded and shift.any():
        return False
    weight, bias = _parameters(net, node)
    groups = attribute(node, "group", 1) if node.op_type == "Conv" else 1
    size, inputs = len(weight) // groups, weight.shape[1]
    rows = np.arange(len(weight)) // size  # the group of each output channel
    taken = (rows[:, None] * inputs + np.arange(inputs)).reshape(len(weight), inputs)  # [O, I] -> channel of the input
    shape = (*taken.shape, *(1,) * (weight.ndim - 2))
    bias = bias + (weight.reshape(*taken.shape, -1).sum(2) * shift[taken]).sum(1)
    _set(net, node, weight * scale[taken].reshape(shape), bias)
    return net.remove(before, source)


def _affine(net: Net, node: onnx.NodeProto) -> tuple[str, Vector, Vector] | None:
    """(x, scale [C], shift [C]) where `node` is scale * x + shift for each channel of x, else None."""
    if node.op_type == "BatchNormalization":
        values = [net.constant(name) for name in node.input[1:]]
        if any(value is None for value in values) or attribute(node, "training_mode", 0):
            return None
        gamma, beta, mean, variance = (np.asarray(value, np.float64) for value in values)
        scale = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        return str(node.input[0]), scale, beta - mean * scale
    if node.op_type not in ("Add", "Sub", "Mul", "Div"):
        return None
    for tensor, number in ((0, 1), (1, 0)) if node.op_type in ("Add", "Mul") else ((0, 1),):
        source = str(node.input[tensor])
        value = net.constant(node.input[number])
        if value is not None and net.constant(source) is None:
            channels = _per_channel(value, net.shapes[source], net.shapes[node.output[0]])
            return None if channels is None else (source, *_as_affine(node.op_type, channels))
    return None


def _as_affine(op_type: str, value: Vector) -> tuple[Vector, Vector]:
    zeros, ones = np.zeros_like(value), np.ones_like(value)
    if op_type in ("Add", "Sub"):
        return ones, value if op_type == "Add" else -value
    return (value if op_type == "Mul" else 1 / value), zeros


def _per_channel(value: npt.NDArray[Any], source: tuple[int, ...], result: tuple[int, ...]) -> Vector | None:
    """float64 [C] where `value` broadcasts to one number for each channel (axis 1) of `source`."""
    if source != result or len(source) < 2 or value.ndim > len(source):
        return None
    shape = (1,) * (len(source) - value.ndim) + value.shape
    if any(size != 1 for place, size in enumerate(shape) if place != 1):
        return None
    return np.broadcast_to(value.astype(np.float64).reshape(-1), (source[1],)).copy()


def _plain(net: Net, node: onnx.NodeProto) -> bool:
    """A Conv or Gemm whose parameters are constants in the usual form."""
    if node.op_type not in ("Conv", "Gemm") or net.constant(node.input[1]) is None:
        return False
    if len(node.input) > 2 and node.input[2]:
        bias = net.constant(node.input[2])
        if bias is None or bias.ndim != 1:
            return False
    turned = attribute(node, "transB", 0) and not attribute(node, "transA", 0)
    return node.op_type == "Conv" or bool(
        turned and attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
    )


def _parameters(net: Net, node: onnx.NodeProto) -> tuple[npt.NDArray[np.float64], Vector]:
    """Weight [O, ...] and bias [O] as float64, zeros where there is none."""
    weight = np.asarray(net.constant(node.input[1]), np.float64)
    bias = net.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    return weight, np.zeros(len(weight)) if bias is None else np.broadcast_to(bias, (len(weight),)).astype(np.float64)


def _set(net: Net, node: onnx.NodeProto, weight: npt.NDArray[np.float64], bias: Vector) -> None:
    stem = node.input[1].removesuffix(".weight")
    net.set_constant(node, 1, weight.astype(np.float32), f"{stem}.folded.weight")
    net.set_constant(node, 2, bias.astype(np.float32), f"{stem}.bias")
