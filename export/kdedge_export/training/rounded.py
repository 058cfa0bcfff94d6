"""The network that QAT trains: the float graph under the roundings of its INT8 file, as a backbone and a linear head.

B rows, F features, K classes.
"""

from dataclasses import replace
from typing import final

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdedge.errors import ExportError
from kdedge.models.zoo import Network
from kdedge_export.cpu.plan import Plan
from kdedge_export.graph import Graph, prune
from kdedge_export.table import RangeTable
from kdedge_export.training.fake_quant import round_bias, round_weight
from kdedge_export.training.torch_graph import TorchGraph

__all__ = ["RoundedHead", "rounded_network", "trained_model"]


@final
class RoundedHead(nn.Linear):
    """The last layer, its weight and bias in the roundings of the INT8 file. Its input is rounded already.

    Without a bias it learns none: the file has no place for it.
    """

    scales_K: Tensor

    def __init__(self, weight_KF: Tensor, bias_K: Tensor | None, scales_K: Tensor, input_scale: float) -> None:
        super().__init__(weight_KF.shape[1], weight_KF.shape[0], bias=bias_K is not None)
        _take(self, weight_KF, bias_K)
        self.register_buffer("scales_K", scales_K, persistent=False)
        self._input_scale = input_scale

    def forward(self, x_BF: Tensor) -> Tensor:
        bias_K: Tensor | None = self.bias
        scales_K = self.scales_K
        if bias_K is not None:
            bias_K, scales_K = round_bias(bias_K, scales_K, self._input_scale)
        return functional.linear(x_BF, round_weight(self.weight, scales_K), bias_K)


def _take(head: nn.Linear, weight_KF: Tensor, bias_K: Tensor | None) -> None:
    head.weight = nn.Parameter(weight_KF)
    if bias_K is not None:
        head.bias = nn.Parameter(bias_K)


def rounded_network(model: onnx.ModelProto, plan: Plan, table: RangeTable, span_step: float | None = None) -> Network:
    """The float `model`, whose last node is a Gemm, with the roundings of `plan` and `table`, as backbone and head.

    With `span_step` the ranges are learned (`LearnedSpans`).
    ExportError where it ends otherwise, or in an operator that torch_ops does not know.
    """
    graph = Graph(model)
    last = graph.producer[graph.outputs[0]]
    weight = graph.constant(last.input[1]) if last.op_type == "Gemm" else None
    if weight is None:
        raise ExportError(
            f"The model ends in a {last.op_type}; QAT expects a linear layer there. Export without --qat."
        )
    body = onnx.ModelProto()
    body.CopyFrom(model)
    features = onnx.helper.make_tensor_value_info(last.input[0], onnx.TensorProto.FLOAT, None)
    body.graph.output[0].CopyFrom(features)
    prune(body, [node for node in body.graph.node if node.name != last.name])
    backbone = TorchGraph(body, plan, table, span_step=span_step)
    bias = graph.constant(last.input[2]) if _has_bias(last) else None
    weight_KF, bias_K = torch.from_numpy(weight.copy()), None if bias is None else torch.from_numpy(bias.copy())
    if last.name in plan.layers:
        scales_K = torch.from_numpy(np.asarray(table.weight_scales[last.name], np.float32))
        return Network(backbone, RoundedHead(weight_KF, bias_K, scales_K, table.u8(last.input[0]).scale))
    head = nn.Linear(weight_KF.shape[1], weight_KF.shape[0], bias=bias_K is not None)
    _take(head, weight_KF, bias_K)
    return Network(backbone, head)


def _has_bias(gemm: onnx.NodeProto) -> bool:
    return len(gemm.input) > 2 and bool(gemm.input[2])


def trained_model(network: Network, model: onnx.ModelProto, table: RangeTable) -> tuple[onnx.ModelProto, RangeTable]:
    """The float model and the range table that the network has become.

    A range that was learned is the one for symmetric codes too: what was chosen for them was chosen for other weights,
    and does not know where the network has learned to clip.
    """
    backbone, graph = network.backbone, Graph(model)
    assert isinstance(backbone, TorchGraph)
    last = graph.producer[graph.outputs[0]]
    made = backbone.to_onnx(model)
    head = {last.input[1]: network.head.weight, **({last.input[2]: network.head.bias} if _has_bias(last) else {})}
    for place, each in enumerate(made.graph.initializer):
        if each.name in head:
            value = head[each.name].detach().cpu().contiguous().numpy()
            made.graph.initializer[place].CopyFrom(onnx.numpy_helper.from_array(value, each.name))
    symmetric = {name: span for name, span in table.s8_spans.items() if name not in backbone.spans}
    return made, replace(table.with_spans(backbone.spans), s8_spans=symmetric)
