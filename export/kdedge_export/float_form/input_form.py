"""The model with a camera's image as its input: uint8 [batch, H, W, C], converted and normalised inside the file.

Cast, Transpose, Sub, Mul: the same four in front of every file, float or quantized. What looks cleverer was tried.
The division can go into the first convolution's weights, or into a QuantizeLinear with one scale a channel; the
subtraction can not, since a convolution pads with 0, which is the mean colour behind it and black before it. Both ran
no faster than this by more than timing could tell. To declare the bytes to be the 8-bit tensor would round the weights
anew and pad with the wrong colour, for the channels differ in mean. So INT8 computes the codes of a float input.
B images, H x W pixels, C channels.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper

from kdedge.errors import BugError
from kdedge_device.preprocess import Preprocess
from kdedge_export.graph import Graph, constant_tensor, names_of, prune, unique

__all__ = ["with_uint8_input"]


def with_uint8_input(model: onnx.ModelProto, preprocess: Preprocess) -> onnx.ModelProto:
    """A copy of a finished file, float or quantized, whose input has the same name and takes uint8 [batch, H, W, C].

    Its outputs are those for `preprocess.normalize(images)`, to the last digits of float32.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph, source = Graph(copy), copy.graph.input[0]
    dims = [dim.dim_value for dim in source.type.tensor_type.shape.dim[1:]]
    if dims != [preprocess.channels, preprocess.height, preprocess.width]:
        raise BugError(f"the file takes images of {dims}; {preprocess} makes others")
    nodes = _in_front(copy, preprocess, source.name, source.type.tensor_type.elem_type)
    for node in graph.nodes:
        for place, name in enumerate(node.input):
            if name == source.name:
                node.input[place] = nodes[-1].output[0]
    source.CopyFrom(helper.make_tensor_value_info(source.name, TensorProto.UINT8, ["batch", *dims[1:], dims[0]]))
    prune(copy, [*nodes, *graph.nodes])
    onnx.checker.check_model(copy, full_check=True)
    return copy


def _in_front(model: onnx.ModelProto, preprocess: Preprocess, source: str, kind: int) -> list[onnx.NodeProto]:
    """(pixel / 255 - mean) / std as (pixel - 255 mean) * 1 / (255 std), in float32, then in the type `kind`.

    Cast is first: TensorRT takes uint8 only where it is cast at once.
    """
    offset, factor = 255 * np.array(preprocess.mean), 1 / (255 * np.array(preprocess.std))
    pixels = unique("pixels", {name.partition(".")[0] for name in names_of(model)})
    first, last, planes, centred, normal, cast = (
        f"{pixels}.{name}" for name in ("offset", "factor", "planes", "centred", "normal", "cast")
    )
    for name, values in ((first, offset), (last, factor)):
        model.graph.initializer.append(constant_tensor(name, values.astype(np.float32).reshape(1, -1, 1, 1)))
    nodes = [
        helper.make_node("Cast", [source], [pixels], name=pixels, to=TensorProto.FLOAT),
        helper.make_node("Transpose", [pixels], [planes], name=planes, perm=[0, 3, 1, 2]),
        helper.make_node("Sub", [planes, first], [centred], name=centred),
        helper.make_node("Mul", [centred, last], [normal], name=normal),
    ]
    if kind != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [normal], [cast], name=cast, to=kind))
    return nodes
