"""Which input of a foreign graph is the image, in which layout, and how to ask the file itself for its logits.

B images, C channels (1 grey, 3 RGB), H and W the input's size.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from kdedge.errors import ExportError
from kdedge_export.float_form.onnx_file import type_name
from kdedge_export.graph import attribute
from kdedge_export.sessions import open_session

__all__ = ["Origin", "find_input"]

MAX_PIXELS = 2**24  # of one input: 4,096 x 4,096, beyond any classifier
_FLOATS = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.DOUBLE: "float64"}
_FLOATS |= {TensorProto.BFLOAT16: "bfloat16"}


@dataclass(frozen=True)
class Origin:
    """The file as it came. `batch`: the number of images it was written for, None where that is open.

    `tail`: the operator that was cut off its end, "" for none. `dtype`: numpy's name of what it takes.
    """

    path: Path
    model: onnx.ModelProto
    name: str
    image: tuple[int, int, int]  # C, H, W
    nhwc: bool
    batch: int | None
    dtype: str = "float32"
    tail: str = ""

    def as_nchw(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """`model`, a form of this file, with its input [batch, C, H, W]: the Transposes behind an NHWC input go."""
        if not self.nhwc:
            return model
        gone = {}
        for node in list(model.graph.node):
            if self.name in node.input:
                if node.op_type != "Transpose" or list(attribute(node, "perm", [])) != [0, 3, 1, 2]:
                    raise ExportError(
                        f"{self.path} takes images as [batch, H, W, C], and {node.op_type} {node.name} reads them so. "
                        "Channels first was expected; export it again, with tf2onnx --inputs-as-nchw."
                    )
                gone[node.output[0]] = self.name
                model.graph.node.remove(node)
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                node.input[place] = gone.get(name, name)
        value = helper.make_tensor_value_info(self.name, TensorProto.FLOAT, ["batch", *self.image])
        model.graph.input[0].CopyFrom(value)
        return model

    def logits(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """What the file gives for float32 [B, C, H, W], as float32 [B, K]; probabilities where it ends in those."""
        images = (batch.transpose(0, 2, 3, 1) if self.nhwc else batch).astype(self.dtype)
        try:
            session = open_session(self.model.SerializeToString())
            step = self.batch or len(images)
            filled = np.resize(images, (math.ceil(len(images) / step) * step, *images.shape[1:]))  # repeated to fill it
            parts = [session.run(None, {self.name: filled[i : i + step]})[0] for i in range(0, len(filled), step)]
        except Exception as error:  # the exceptions of ONNX Runtime share no public base class
            raise ExportError(
                f"ONNX Runtime cannot run {self.path}, so nothing can be compared with it: "
                f"{' '.join(str(error).split())[:200]}. A file that it runs was expected; export the model again."
            ) from None
        return np.concatenate(parts)[: len(images)].astype(np.float32).reshape(len(images), -1)


def find_input(path: Path, model: onnx.ModelProto, px: int | None) -> Origin:
    """The image input of `model`; `px` is its side where the file leaves it open. ExportError where there is none."""
    constants = {each.name for each in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in constants]
    for what, found in (("inputs", inputs), ("outputs", list(model.graph.output))):
        if len(found) != 1:
            raise ExportError(
                f"{path} has {len(found)} {what} ({', '.join(each.name for each in found)}); one was expected, "
                "an image in and logits out. Export only that part of the model."
            )
    source = inputs[0]
    kind = source.type.tensor_type.elem_type
    if kind not in _FLOATS or not source.type.tensor_type.HasField("shape"):
        written = type_name(kind) if kind else "not a tensor"
        raise ExportError(
            f"The input {source.name} of {path} is {written}; float32 [batch, C, H, W] was expected, normalised images."
        )
    dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in source.type.tensor_type.shape.dim]
    nhwc, image = _image(path, source.name, dims, px)
    batch = dims[0] if dims[0] is not None and dims[0] > 0 else None
    return Origin(path, model, source.name, image, nhwc, batch, _FLOATS[kind])


def _image(path: Path, name: str, dims: list[int | None], px: int | None) -> tuple[bool, tuple[int, int, int]]:
    written = [size if size is not None and size > 0 else "?" for size in dims]
    if len(dims) != 4 or (dims[1] not in (1, 3) and dims[3] not in (1, 3)):
        raise ExportError(
            f"The input {name} of {path} has the shape {written}, which is no image: [batch, C, H, W] with 1 or 3 "
            "channels was expected."
        )
    nhwc = dims[1] not in (1, 3)
    channels, sides = (dims[3], dims[1:3]) if nhwc else (dims[1], dims[2:4])
    height, width = (size if size is not None and size > 0 else px for size in sides)
    if height is None or width is None:
        raise ExportError(
            f"The input {name} of {path} has the shape {written}, its height or width open. Say which with --px."
        )
    if px is not None and px not in (height, width):
        raise ExportError(
            f"The input {name} of {path} has the shape {written}, so --px {px} cannot be had. Leave it out."
        )
    if height * width > MAX_PIXELS or (dims[0] or 0) * height * width > MAX_PIXELS:
        raise ExportError(
            f"The input {name} of {path} has the shape {written}; at most {MAX_PIXELS:,} pixels were expected. "
            "The file is damaged, or no classifier for a board."
        )
    assert channels is not None  # it is 1 or 3
    return nhwc, (channels, height, width)
