"""Everything that can be computed without an image is computed, and the batch becomes open.

Shape arithmetic is followed at two batch sizes. What comes out the same is a constant of the network; what grows with
the batch may only say how a Reshape or Expand spreads values, and is written there as "whatever the batch is".
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from kdedge.errors import ExportError
from kdedge_export.float_form.onnx_trace import Traced, named, trace
from kdedge_export.graph import constant_tensor, prune

__all__ = ["PROBES", "fold"]

PROBES = (7, 11)  # two batches: primes, so that no size of the network is a multiple of both by chance


def fold(model: onnx.ModelProto, image: tuple[int, int, int], batch: int | None) -> tuple[onnx.ModelProto, Traced]:
    """`model` for an input [batch, *image] with an open batch, without constant nodes, and its sizes at PROBES[0].

    `batch` is the one number of images that the file was written for, None where it is open. ExportError where the
    batch cannot be opened, and what `trace` raises.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if batch is not None:
        _open_reshapes(copy, trace(copy, (batch, *image)), batch)
    first, second = (trace(copy, (probe, *image)) for probe in PROBES)
    nodes: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        if not all(name in first.constants for name in node.output if name):
            _open(copy, node, first, second)
            nodes.append(node)
    have = {each.name for each in copy.graph.initializer}
    wanted = sorted({name for node in nodes for name in node.input if name in first.constants} - have)
    copy.graph.initializer.extend(constant_tensor(name, first.constants[name]) for name in wanted)
    source, result = copy.graph.input[0], copy.graph.output[0]
    kept = [each for each in copy.graph.output if each.name in first.shapes]
    if result.name in first.constants or len(kept) != 1:
        raise ExportError(f"The output {result.name} does not depend on the image. Export the model again.")
    _reshape_type(source, image)
    _reshape_type(result, first.shapes[result.name][1:])
    prune(copy, _reached(nodes, result.name))
    return copy, first


def _reshape_type(value: onnx.ValueInfoProto, sizes: Sequence[int]) -> None:
    shape = value.type.tensor_type.shape
    del shape.dim[:]
    shape.dim.add(dim_param="batch")
    for size in sizes:
        shape.dim.add(dim_value=size)


def _reached(nodes: Sequence[onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """Those that lead to `output`."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _open_reshapes(model: onnx.ModelProto, traced: Traced, batch: int) -> None:
    """A file for a fixed batch writes it into its Reshapes; 0 there means: as the input has it."""
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.output[0] not in traced.constants:
            before, after = traced.shapes[node.input[0]], traced.shapes[node.output[0]]
            if before[:1] == after[:1] == (batch,) and 0 not in after:
                _set_input(model, node, 1, np.array([0, *after[1:]], np.int64))


def _open(model: onnx.ModelProto, node: onnx.NodeProto, first: Traced, second: Traced) -> None:
    """Write the inputs of `node` that grow with the batch so that they hold for every batch."""
    if node.op_type == "Reshape" and node.input[1] in first.constants:
        before, after = first.shapes[node.input[0]], first.shapes[node.output[0]]
        if before[:1] == after[:1] == PROBES[:1] and 0 not in after:
            _set_input(model, node, 1, np.array([0, *after[1:]], np.int64))
            return
    for place, name in enumerate(node.input):
        if name not in first.constants:
            continue
        one, other = first.constants[name], second.constants[name]
        if one.shape == other.shape and np.array_equal(one, other, equal_nan=one.dtype.kind == "f"):
            continue
        opened = _opened(one, other) if place == 1 and one.shape == other.shape else None
        if opened is None or node.op_type not in ("Reshape", "Expand"):
            raise ExportError(
                f"{named(node)} computes with the number of images in the batch, so the file cannot take another one. "
                "Export the model with a dynamic batch."
            )
        # Expand takes 1 for "as the input has it", Reshape -1 for "what is left".
        _set_input(model, node, 1, np.where(opened == -1, 1, opened) if node.op_type == "Expand" else opened)


def _opened(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[np.int64] | None:
    """-1 in the one place where `one` and `other` are the same multiple of their batches; None where it is not one."""
    grows = one != other
    if grows.sum() != 1 or (one[~grows] == -1).any():
        return None
    if one[grows][0] * PROBES[1] != other[grows][0] * PROBES[0]:
        return None
    return np.where(grows, -1, one).astype(np.int64)


def _set_input(model: onnx.ModelProto, node: onnx.NodeProto, place: int, value: npt.NDArray[Any]) -> None:
    name = f"{node.output[0]}_{place}_{len(model.graph.initializer)}"
    model.graph.initializer.append(constant_tensor(name, value))
    node.input[place] = name
    if node.op_type == "Reshape":
        for each in [each for each in node.attribute if each.name == "allowzero"]:
            node.attribute.remove(each)
