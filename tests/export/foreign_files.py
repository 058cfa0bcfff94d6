"""ONNX files as other tools write them: small graphs made by hand, and networks from torch's two exporters."""

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

Node = onnx.NodeProto
RNG = np.random.default_rng(0)


def node(op_type: str, inputs: str, output: str, **attributes: Any) -> Node:
    """`inputs` and `output` are names with spaces between."""
    return helper.make_node(op_type, inputs.split(), output.split(), name=f"n_{output.split()[0]}", **attributes)


def weights(*shape: int) -> np.ndarray:
    return (RNG.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def model_of(
    nodes: Sequence[Node],
    constants: Mapping[str, np.ndarray],
    *,
    opset: int = 17,
    shape: Sequence[int | str] = ("n", 3, 8, 8),
    output: Sequence[int | str] = ("n", 5),
    kind: int = TensorProto.FLOAT,
    ir: int = 8,
) -> onnx.ModelProto:
    """A model x -> y."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, output)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def classifier(nodes: Sequence[Node] = (), source: str = "x", **options: Any) -> onnx.ModelProto:
    """`nodes` on the image make `source`; then Conv, Relu, GlobalAveragePool, Flatten, Gemm to five classes."""
    constants = {"w": weights(8, 3, 3, 3), "b": weights(8), "v": weights(5, 8), "c": weights(5)}
    constants |= options.pop("constants", {})
    tail = [
        node("Conv", f"{source} w b", "conv", pads=[1, 1, 1, 1]),
        node("Relu", "conv", "relu"),
        node("GlobalAveragePool", "relu", "pool"),
        node("Flatten", "pool", "flat"),
        node("Gemm", "flat v c", "y", transB=1),
    ]
    return model_of([*nodes, *tail], constants, **options)


def after_conv(nodes: Sequence[Node], result: str, constants: Mapping[str, np.ndarray] = {}, **options: Any) -> Any:
    """A Conv to eight channels, `nodes` on "conv", then pooled to classes from the tensor `result`."""
    known = {"w": weights(8, 3, 3, 3), "v": weights(5, 8), "c": weights(5), **constants}
    tail = [
        node("GlobalAveragePool", result, "pool"),
        node("Flatten", "pool", "flat"),
        node("Gemm", "flat v c", "y", transB=1),
    ]
    return model_of([node("Conv", "x w", "conv", pads=[1, 1, 1, 1]), *nodes, *tail], known, **options)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def from_torch(
    module: nn.Module, path: Path, opset: int, *, dynamo: bool, batch: int | None = None, px: int = 32
) -> Path:
    """What torch writes; `batch` None leaves the batch open."""
    example = (torch.zeros(batch or 2, 3, px, px),)
    options: dict[str, Any] = {}
    if dynamo:
        options["external_data"] = False
        if batch is None:
            options["dynamic_shapes"] = ({0: torch.export.Dim("n", min=1, max=64)},)
    elif batch is None:
        options["dynamic_axes"] = {"image": {0: "n"}}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), example, str(path), opset_version=opset, dynamo=dynamo, input_names=["image"], **options
        )
    return path
