"""A model run as far as some of its tensors, over many images, in bounded memory; and its constants replaced.

N images, C channels, H x W pixels.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from kdedge_export.graph import Graph, constant_tensor, prune
from kdedge_export.sessions import open_session

__all__ = ["Batches", "run", "set_constant", "tap"]

Array = npt.NDArray[np.float32]
Batches = Sequence[Array]
"""Normalised images, float32 [N, C, H, W] each; walked through more than once, so a list or what reads like one."""

CHUNK_BYTES = 64 << 20  # of the tapped tensors at a time


def tap(model: onnx.ModelProto, tensors: Sequence[str], batches: Batches) -> Iterator[dict[str, Array]]:
    """The values of `tensors` [n, ...] for a few images at a time, in the order of the images, by ONNX Runtime."""
    source = model.graph.input[0].name
    made = [name for name in tensors if name != source]
    session = open_session(_cut(model, made).SerializeToString()) if made else None

    def values(batch: Array) -> dict[str, Array]:
        found = session.run(made, {source: batch}) if session else []
        return {source: batch, **dict(zip(made, found, strict=True))}

    size = 0
    for batch in batches:
        if not size:
            size = max(1, CHUNK_BYTES // max(1, sum(each.nbytes for each in values(batch[:1]).values())))
        for start in range(0, len(batch), size):
            yield values(batch[start : start + size])


def run(model: onnx.ModelProto, batches: Batches) -> Array:
    """The model's first output for all images: of a float model or an INT8 file."""
    name = model.graph.output[0].name
    return np.concatenate([each[name] for each in tap(model, [name], batches)])


def _cut(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy that ends at `tensors`, its outputs, and holds only what they need."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    needed, nodes = set(tensors), []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    del copy.graph.output[:]
    copy.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors)
    prune(copy, reversed(nodes))
    return copy


def set_constant(model: onnx.ModelProto, node: onnx.NodeProto, place: int, value: npt.NDArray[Any]) -> None:
    """Make `value`, as float32, the constant that `node` of `model` reads at `place`; other readers keep theirs."""
    while len(node.input) <= place:
        node.input.append("")
    name = node.input[place]
    known = Graph(model)
    if not name or len(known.readers(name)) > 1:
        taken = {*known.initializers, *known.producer, *known.inputs}
        name = f"{node.name}.{('data', 'weight', 'bias')[place]}"
        while name in taken:
            name += "_own"
        node.input[place] = name
    else:
        model.graph.initializer.remove(known.initializers[name])
    model.graph.initializer.append(constant_tensor(name, value.astype(np.float32)))
