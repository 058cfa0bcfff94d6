"""The form of TensorRT files, checked on every export; it stands in for TensorRT's parsers, which cannot run here.

The rules are those of section 2.1 of the reference on Q/DQ placement, by its numbers, and the facts that older parsers
bite with. Each rule tells its problems in a file; `RULES` lists all: what a file consists of is here, where Q/DQ stand
(rules 5 to 11) in trt_placement.py. Number 12, that INT8 may lose to FP16 on small networks, no graph tells.

"trt" is the file of TensorRT 8.5 to 10.x (opset 17, IR 8, FP32 body), "trt-fp16" that of strongly typed TensorRT 11
(opset 20, IR 10, FP16 body).
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto

from kdedge_export.float_form.rewrite import IR, OPSET
from kdedge_export.graph import attribute
from kdedge_export.trt.placement import PLACEMENT
from kdedge_export.trt.rules import WEIGHTED, weight_axis
from kdedge_export.trt.typed import TYPED_IR, TYPED_OPSET
from kdedge_export.trt.view import Form, View

__all__ = ["RULES", "Form", "lint_trt"]

_PAIR = ("QuantizeLinear", "DequantizeLinear")


def lint_trt(
    model: onnx.ModelProto,
    form: Form,
    kept_float: frozenset[str] = frozenset(),
    *,
    pools: bool = True,
    hard_swish: bool = False,
    batch: int = 1,
) -> list[str]:
    """The problems of a file of `form`; none is expected. `kept_float` and the switches are those of its plan."""
    view = View(model, form, kept_float, pools, hard_swish, batch)
    return [f"{str(rule.__doc__).split(':')[0]}: {problem}" for rule in RULES for problem in rule(view)]


def rule_1_zero_points(view: View) -> Iterator[str]:
    """Rule 1, fact 5: symmetric and signed; the zero point is always there (TensorRT up to 8.6), int8, all zeros."""
    for node in view.graph.nodes:
        if node.op_type in _PAIR:
            zero = view.graph.constant(node.input[2]) if len(node.input) > 2 else None
            if zero is None or zero.dtype != np.int8 or zero.any():
                yield f"{node.name}: the zero point is not a constant int8 of zeros"


def rule_1_scales(view: View) -> Iterator[str]:
    """Rule 1: scales are constant, positive and finite, and of the body's type."""
    body = np.float32 if view.form == "trt" else np.float16
    for node in view.graph.nodes:
        if node.op_type in _PAIR:
            scale = view.graph.constant(node.input[1])
            if scale is None or not np.isfinite(scale).all() or not (scale > 0).all():
                yield f"{node.name}: a scale is not a positive constant"
            elif scale.dtype != body:
                yield f"{node.name}: the scale is {scale.dtype}, not {np.dtype(body)}"


def rule_2_activations(view: View) -> Iterator[str]:
    """Rule 2: a computed tensor has one scale and one zero point, of the same shape."""
    for name, scale in view.scales.items():
        if scale.ndim:
            yield f"{name}: a computed tensor has {scale.size} scales"
    for node in view.kind("QuantizeLinear"):
        zero = view.graph.constant(node.input[2]) if len(node.input) > 2 else None
        own = view.scales.get(node.input[0])
        if zero is not None and own is not None and zero.shape != own.shape:
            yield f"{node.name}: its scale and zero point differ in shape"


def rule_2_weights(view: View) -> Iterator[str]:
    """Rule 2: a weight has one scale and zero point for each output channel, along the axis of its operator."""
    for layer, quantizer in view.weights():
        weight, scale = (view.graph.constant(name) for name in quantizer.input[:2])
        axis = weight_axis(layer)
        restorer = view.graph.producer[layer.input[1]]
        if weight is None or scale is None or scale.shape != (weight.shape[axis],):
            yield f"{layer.name}: its weight has not one scale for each output channel"
        if any(attribute(node, "axis", 1) != axis for node in (quantizer, restorer)):
            yield f"{layer.name}: its weight is not quantized along axis {axis}"
        zero = view.graph.constant(quantizer.input[2]) if len(quantizer.input) > 2 else None
        if zero is not None and scale is not None and zero.shape != scale.shape:
            yield f"{layer.name}: scales and zero points of its weight differ in number"


def rule_2_weight_range(view: View) -> Iterator[str]:
    """Rule 2: the codes of weights are -127 to 127, never -128."""
    for layer, quantizer in view.weights():
        weight, scale = (view.graph.constant(name) for name in quantizer.input[:2])
        if weight is not None and scale is not None and scale.ndim == 1:
            steps = np.moveaxis(weight, weight_axis(layer), -1).astype(np.float64) / scale
            if steps.size and np.rint(np.abs(steps)).max() > 127:
                yield f"{layer.name}: a weight lies outside of -127 to 127 steps"


def rule_3_float_weights(view: View) -> Iterator[str]:
    """Rule 3: float initializer -> Q -> DQ. TensorRT 8.5 rejects integer initializers, and a DQ without its Q."""
    zero_points = {node.input[2] for node in view.graph.nodes if node.op_type in _PAIR and len(node.input) > 2}
    for name, tensor in view.graph.initializers.items():
        if tensor.data_type in (TensorProto.INT8, TensorProto.UINT8) and name not in zero_points:
            yield f"{name}: an initializer of 8-bit integers"
    for node in view.kind("DequantizeLinear"):
        before = view.graph.producer.get(node.input[0])
        if before is None or before.op_type != "QuantizeLinear":
            yield f"{node.name}: it reads no QuantizeLinear"
        elif list(before.input[1:]) != list(node.input[1:]):
            yield f"{node.name}: its QuantizeLinear has another scale"
    for node in view.kind("QuantizeLinear"):
        readers = view.graph.readers(node.output[0])
        if not readers or any(each.op_type != "DequantizeLinear" for each in readers):
            yield f"{node.name}: it is not read by DequantizeLinear alone"


def rule_4_bias(view: View) -> Iterator[str]:
    """Rule 4: a bias stays float; a DQ on an INT32 bias is rejected."""
    for node in view.layers:
        bias = node.input[2] if node.op_type in WEIGHTED and len(node.input) > 2 else ""
        producer = view.graph.producer.get(bias)
        if producer is not None and producer.op_type == "DequantizeLinear":
            yield f"{node.name}: its bias is quantized"


def fact_2_types(view: View) -> Iterator[str]:
    """Fact 2: one float type inside: float32 without Cast, or float16 between Casts at the ends."""
    other = TensorProto.FLOAT16 if view.form == "trt" else TensorProto.FLOAT
    for name, tensor in view.graph.initializers.items():
        if tensor.data_type == other:
            yield f"{name}: a constant of the other float type"
    for node in view.kind("Cast"):
        at_an_end = node.input[0] in view.graph.inputs or node.output[0] in view.graph.outputs
        if view.form == "trt" or not at_an_end:
            yield f"{node.name}: a Cast inside the network"


def fact_3_pins(view: View) -> Iterator[str]:
    """Fact 3: the opset and IR that every reader of this form takes."""
    opset, ir = (OPSET, IR) if view.form == "trt" else (TYPED_OPSET, TYPED_IR)
    if [(each.domain, each.version) for each in view.model.opset_import] != [("", opset)]:
        yield f"opset is not {opset} alone"
    if view.model.ir_version != ir:
        yield f"IR version is {view.model.ir_version}, not {ir}"


def fact_4_leftovers(view: View) -> Iterator[str]:
    """Fact 4: nothing of opset 18 in a file of 17: TensorRT 8.5 averages over everything, the batch included."""
    for node in view.graph.nodes if view.form == "trt" else ():
        if node.op_type == "ReduceMean" and len(node.input) > 1:
            yield f"{node.name}: ReduceMean has its axes as an input"
        if node.op_type == "Split" and attribute(node, "num_outputs") is not None:
            yield f"{node.name}: Split has num_outputs"


def fact_5_interface(view: View) -> Iterator[str]:
    """Fact 5 and the runner: inputs and outputs are float32, and the batch is their only open axis."""
    for value in [*view.model.graph.input, *view.model.graph.output]:
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.elem_type != TensorProto.FLOAT:
            yield f"{value.name} is not float32"
        if not dims or not dims[0].dim_param or any(not dim.dim_value for dim in dims[1:]):
            yield f"{value.name} has another open axis than the batch"


RULES = (
    rule_1_zero_points,
    rule_1_scales,
    rule_2_activations,
    rule_2_weights,
    rule_2_weight_range,
    rule_3_float_weights,
    rule_4_bias,
    fact_2_types,
    fact_3_pins,
    fact_4_leftovers,
    fact_5_interface,
    *PLACEMENT,
)
