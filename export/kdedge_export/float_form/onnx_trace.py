"""What a graph says of sizes without looking at a pixel: the shape of every tensor, the value of every constant one.

This is where shape arithmetic ends: for one size of the input, Shape is a constant, and all that is computed from it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import checker, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from kdedge.errors import ExportError
from kdedge_export.float_form.onnx_file import opset_of

__all__ = ["Traced", "named", "trace"]

MAX_VALUES = 2**28  # of one tensor, a batch of a few images: a gigabyte of floats, far above any network for a board
_SMALL = 4096  # values of a constant that shape inference is shown; sizes and axes are fewer, weights more
_NEVER = ("Random", "Multinomial", "Bernoulli", "Sequence", "SplitToSequence", "ConcatFromSequence", "Optional")


@dataclass(frozen=True)
class Traced:
    """`shapes` of all tensors; `constants`: the value of those that no pixel reaches, initializers included."""

    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, int]
    constants: Mapping[str, npt.NDArray[Any]]


def named(node: onnx.NodeProto) -> str:
    """How a message calls a node."""
    return f"{node.op_type} {node.name or next(iter(node.output), '')}"


def trace(model: onnx.ModelProto, shape: tuple[int, ...]) -> Traced:
    """Follow a float32 input of `shape` through the graph.

    ExportError for an operator that ONNX does not have, one whose output depends on pixels in size, and for sizes that
    no board could hold; each with its node.
    """
    tracer = _Tracer(model, shape)
    for node in model.graph.node:
        tracer.follow(node)
    return Traced(tracer.shapes, tracer.types, tracer.constants)


class _Tracer:
    def __init__(self, model: onnx.ModelProto, shape: tuple[int, ...]) -> None:
        self.opset = opset_of(model)
        self.constants: dict[str, npt.NDArray[Any]] = {
            each.name: np.asarray(numpy_helper.to_array(each)) for each in model.graph.initializer
        }
        self.room = MAX_VALUES
        self.shapes = {name: value.shape for name, value in self.constants.items()}
        self.types = {each.name: int(each.data_type) for each in model.graph.initializer}
        source = model.graph.input[0].name
        self.shapes[source], self.types[source] = shape, int(onnx.TensorProto.FLOAT)

    def follow(self, node: onnx.NodeProto) -> None:
        schema = self._schema(node)
        if not any(node.output):
            raise ExportError(f"{named(node)} makes nothing. The file is damaged; export the model again.")
        if node.op_type == "Shape" and all(name in self.shapes for name in node.input):
            value = self._shape(node)
            self._note(node, node.output[0], value.shape, int(onnx.TensorProto.INT64), value)
            return
        found = self._inferred(schema, node)
        constant = all(name in self.constants for name in node.input if name)
        for name in node.output:
            if name and name in found:
                self._require_small(node, found[name][1])
        if constant:
            for name, value in zip(node.output, self._computed(node), strict=False):
                if name:
                    kind = int(helper.np_dtype_to_tensor_dtype(value.dtype))
                    self._note(node, name, value.shape, kind, value)
            return
        for name in node.output:
            if name:
                self._note(node, name, *self._known(node, name, found))

    def _schema(self, node: onnx.NodeProto) -> "defs.OpSchema":
        if node.domain not in ("", "ai.onnx"):
            raise ExportError(
                f"The operator {node.domain}.{named(node)} is not part of ONNX. Export the model without it."
            )
        graphs = any(each.type in (each.GRAPH, each.GRAPHS) for each in node.attribute)
        if graphs or node.op_type.startswith(_NEVER):
            raise ExportError(
                f"The operator {named(node)} is not supported: a network without branches, loops, lists and chance "
                "was expected. Export the model in eval mode, without it."
            )
        try:
            return defs.get_schema(node.op_type, self.opset, "")
        except defs.SchemaError:
            raise ExportError(
                f"The operator {named(node)} does not exist in opset {self.opset}, which the file declares. "
                "Export the model again."
            ) from None

    def _shape(self, node: onnx.NodeProto) -> npt.NDArray[np.int64]:
        shape = self.shapes[node.input[0]]
        bounds = {each.name: each.i for each in node.attribute}
        return np.array(shape[bounds.get("start", 0) : bounds.get("end", len(shape))], np.int64)

    def _inferred(self, schema: "defs.OpSchema", node: onnx.NodeProto) -> dict[str, tuple[int, tuple[int, ...] | None]]:
        """Output -> element type and shape, None where the shape is not known."""
        missing = [name for name in node.input if name and name not in self.shapes]
        if missing:
            raise ExportError(f"{named(node)} reads {missing[0]}, which nothing makes. Export the model again.")
        types = {
            name: helper.make_tensor_type_proto(self.types[name], self.shapes[name]) for name in node.input if name
        }
        data = {
            name: numpy_helper.from_array(self.constants[name], name)
            for name in node.input
            if name in self.constants and self.constants[name].size <= _SMALL
        }
        try:
            outputs = shape_inference.infer_node_outputs(
                schema, node, types, data, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8
            )
        except (checker.ValidationError, shape_inference.InferenceError, RuntimeError, ValueError) as error:
            raise ExportError(
                f"{named(node)} cannot take inputs of the shapes {[self.shapes[name] for name in types]}: "
                f"{' '.join(str(error).split())[:200]}. Export the model again."
            ) from None
        found: dict[str, tuple[int, tuple[int, ...] | None]] = {}
        for name, kind in outputs.items():
            tensor = kind.tensor_type
            dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
            known = tensor.HasField("shape") and min(dims, default=0) >= 0
            found[name] = int(tensor.elem_type), tuple(dims) if known else None
        return found

    def _known(
        self, node: onnx.NodeProto, name: str, found: Mapping[str, tuple[int, tuple[int, ...] | None]]
    ) -> tuple[tuple[int, ...], int]:
        kind, shape = found.get(name, (0, None))
        if shape is None or kind == 0:
            raise ExportError(
                f"The operator {named(node)} is not supported: the size of what it makes depends on more than the size "
                "of the image. Export the model without it."
            )
        return shape, kind

    def _require_small(self, node: onnx.NodeProto, shape: tuple[int, ...] | None) -> None:
        if shape is not None and math.prod(shape) > MAX_VALUES:
            raise ExportError(
                f"{named(node)} declares an output of the shape {list(shape)}, {math.prod(shape):,} values; at most "
                f"{MAX_VALUES:,} were expected. The file is damaged, or meant for other machines than these."
            )

    def _computed(self, node: onnx.NodeProto) -> list[npt.NDArray[Any]]:
        try:
            with np.errstate(all="ignore"):
                values = ReferenceEvaluator(node, opsets={"": self.opset}).run(
                    None, {name: self.constants[name] for name in node.input if name}
                )
        except Exception as error:  # the reference raises whatever numpy does
            raise ExportError(
                f"{named(node)} cannot be computed from its constants ({' '.join(str(error).split())[:200]}). "
                "Export the model again."
            ) from None
        return [np.asarray(value) for value in values]

    def _note(
        self,
        node: onnx.NodeProto,
        name: str,
        shape: tuple[int, ...],
        kind: int,
        value: npt.NDArray[Any] | None = None,
    ) -> None:
        self._require_small(node, shape)
        self.shapes[name], self.types[name] = shape, kind
        if value is not None:
            self.room -= value.size  # many constants, each just small enough, would fill the memory too
            self._require_small(node, shape if self.room >= 0 else (MAX_VALUES + 1,))
            self.constants[name] = value
