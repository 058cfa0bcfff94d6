"""A float ONNX graph as a torch module, with the roundings of its INT8 file where they are wanted.

Training, corrections of weights and measurements of sensitivity all need the network that ships: batch normalisation
folded, activations absorbed, and rounded exactly where `write_int8` rounds. Gradients pass the rounding as if it were
not there and stop where a value is clipped (straight-through, Jacob et al., arXiv 1712.05877, section 3).

N images, C channels, H and W pixels, K classes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from kdedge_export.cpu.plan import Plan
from kdedge_export.graph import Graph, constant_tensor, names_of, unique
from kdedge_export.table import U8, RangeTable, Span
from kdedge_export.training.fake_quant import LearnedSpans, round_bias, round_u8, round_weight
from kdedge_export.training.torch_ops import Run, torch_operator

__all__ = ["TorchGraph"]

_WEIGHTED = ("Conv", "Gemm")
_CLIPS = ("Relu", "Clip")
_UNROUNDED = Plan()


@dataclass(frozen=True)
class _Step:
    """A node: what it reads (tensors, or weights and constants by name), and makes. `drop`: what nobody reads later.

    `made`: its outputs, and those of them that are rounded once more. `saturates`: an absorbed clip, which is the work
    of the rounded range behind it.
    """

    name: str
    run: Run
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    made: tuple[str, ...]
    has_weights: bool
    saturates: bool
    drop: tuple[str, ...] = ()


@final
class TorchGraph(nn.Module):
    """Images float32 [N, C, H, W] -> the graph's first output, which is rounded where the plan has it.

    Weights and biases of Conv and Gemm are parameters; everything else, batch normalisation too, stays as it is. With
    `plan` and `table` the tensors and weights of the plan are rounded; `float_tensors` and `float_layers` say which are
    not, and may be set between two passes. With `span_step`, that of `LearnedSpans`, the ranges are parameters too, but
    those that follow from the graph. ExportError for an operator that is not known.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        plan: Plan | None = None,
        table: RangeTable | None = None,
        *,
        span_step: float | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.table = plan or _UNROUNDED, table or RangeTable({})
        self.float_tensors: frozenset[str] = frozenset()
        self.float_layers: frozenset[str] = frozenset()
        graph = Graph(model)
        self._input, taken = graph.inputs[0], names_of(model)
        self._rounded = {name: unique(f"{name}_dq", taken) for name in self.plan.tensors}
        self._sources = {rounded: name for name, rounded in self._rounded.items()}
        self._output = self._read(graph.outputs[0], by_rounded=True)
        self._steps = self._without_ballast([self._step(node, graph) for node in graph.nodes])
        trained = {name for step in self._steps if step.has_weights for name in step.inputs[1:]}
        self._weight_names = [name for name in graph.initializers if name in trained]
        self._weights = nn.ParameterList(_tensor(graph, name) for name in self._weight_names)
        used = {name for step in self._steps for name in step.inputs} & set(graph.initializers) - trained
        self._constant_names = sorted(used)
        for index, name in enumerate(self._constant_names):
            self.register_buffer(f"_constant_{index}", _tensor(graph, name), persistent=False)
        for index, step in enumerate(self._steps):
            if step.has_weights and step.name in self.plan.layers:
                scales = torch.from_numpy(np.asarray(self.table.weight_scales[step.name], np.float32))
                self.register_buffer(f"_scales_{index}", scales, persistent=False)

        self._learned = None if span_step is None else self._learnable(graph, span_step)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters by their names in the ONNX file."""
        return dict(zip(self._weight_names, self._weights, strict=True))

    @property
    def spans(self) -> dict[str, Span]:
        """The ranges that were learned, by tensor; none where they are not."""
        return {} if self._learned is None else self._learned.spans()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.watch(x_NCHW, ())[0]

    def watch(self, x_NCHW: Tensor, names: Iterable[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, and the tensors called `names`, as their nodes make them; "NAME_dq" is NAME rounded.

        Where the graph has a tensor of that name, "NAME_dq_2" is.
        Of an absorbed Relu or Clip, "NAME" is what stands in front of it, since nothing else clips there.
        """
        wanted = set(names)
        values: dict[str, Tensor] = {self._input: x_NCHW, **self.weights}
        values |= {name: self.get_buffer(f"_constant_{i}") for i, name in enumerate(self._constant_names)}
        ends_2T = None if self._learned is None else self._learned.ends()
        self._round(self._input, values, ends_2T)
        found = {name: values[name] for name in wanted & set(values)}
        for index, step in enumerate(self._steps):
            self._make(index, step, values)
            for name in step.outputs:
                self._round(name, values, ends_2T)
            found |= {name: values[name] for name in step.made if name in wanted}
            for name in step.drop:
                del values[name]
        return values[self._output], found

    def _make(self, index: int, step: _Step, values: dict[str, Tensor]) -> None:
        """The outputs of a step into `values`. A function of its own, since its locals would keep tensors alive."""
        inputs = [values[name] for name in step.inputs]
        if step.has_weights and step.name in self.plan.layers and step.name not in self.float_layers:
            inputs[1:] = self._rounded_weights(index, step, inputs[1:])
        if step.saturates and step.outputs[0] not in self.float_tensors:
            made: Tensor | tuple[Tensor, ...] = inputs[0]
        else:
            made = step.run(*inputs)
        values.update(zip(step.outputs, (made,) if isinstance(made, Tensor) else made, strict=True))

    def to_onnx(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of the float `model` this was made from, with the parameters as they are now."""
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        weights = self.weights
        for place, each in enumerate(copy.graph.initializer):
            if each.name in weights:
                value = weights[each.name].detach().cpu().contiguous().numpy()
                copy.graph.initializer[place].CopyFrom(constant_tensor(each.name, value))
        return copy

    def _step(self, node: onnx.NodeProto, graph: Graph) -> _Step:
        operator = torch_operator(node, graph)
        weighted = node.op_type in _WEIGHTED and all(node.input[p] in graph.initializers for p in operator.places[1:])
        rounded = node.name in self.plan.layers
        inputs = tuple(self._read(node.input[place], rounded) for place in operator.places)
        saturates = node.name in self.plan.absorbed and node.op_type in _CLIPS
        outputs = tuple(node.output)
        made = (*outputs, *(self._rounded[name] for name in outputs if name in self._rounded))
        return _Step(node.name, operator.run, inputs, outputs, made, weighted, saturates)

    def _read(self, tensor: str, by_rounded: bool = False) -> str:
        """A float reader of a float tensor reads the float tensor, even where another takes its 8-bit form."""
        rounded = tensor in self._rounded and (by_rounded or tensor in self.plan.made)
        return self._rounded[tensor] if rounded else tensor

    def _without_ballast(self, steps: list[_Step]) -> list[_Step]:
        """Each step with the tensors that nobody needs after it, so that memory follows the widest place of the graph.

        Of a tensor that all read rounded, that is the tensor itself, as soon as it is rounded.
        """
        given = (self._input, *(self._rounded[each] for each in (self._input,) if each in self._rounded))
        last = dict.fromkeys(given, 0) | {name: place for place, step in enumerate(steps) for name in step.made}
        last |= {name: place for place, step in enumerate(steps) for name in step.inputs if name in last}
        last.pop(self._output, None)
        drops: dict[int, list[str]] = {}
        for name, place in last.items():
            drops.setdefault(place, []).append(name)
        return [replace(each, drop=tuple(drops.get(place, ()))) for place, each in enumerate(steps)]

    def _learnable(self, graph: Graph, step: float) -> LearnedSpans:
        plan, spans = self.plan, self.table.spans
        chosen = [name for name in plan.tensors if name not in plan.known]
        limits = {name: plan.limits(graph, name) for name in chosen}
        same = {name: source for name, source in plan.same_scale.items() if source not in plan.known}
        return LearnedSpans({name: spans[name] for name in chosen if name not in plan.same_scale}, limits, same, step)

    def _u8(self, tensor: str) -> U8:
        tensor = self.plan.same_scale.get(tensor, tensor)
        return U8.over(self.plan.known[tensor]) if tensor in self.plan.known else self.table.u8(tensor)

    def _round(self, tensor: str, values: dict[str, Tensor], ends_2T: Tensor | None) -> None:
        if tensor not in self._rounded:
            return
        value, name = values[tensor], self._rounded[tensor]
        if tensor in self.float_tensors:
            values[name] = value
        elif self._learned is not None and ends_2T is not None and tensor in self._learned:
            values[name] = self._learned.round(tensor, value, ends_2T)
        else:
            values[name] = round_u8(value, self._u8(tensor))

    def _rounded_weights(self, index: int, step: _Step, weights: list[Tensor]) -> list[Tensor]:
        """The weight, and the bias where there is one."""
        scales, biases = self.get_buffer(f"_scales_{index}"), weights[1:]
        input_scale = self._u8(self._sources[step.inputs[0]]).scale
        for place, bias in enumerate(biases):
            biases[place], scales = round_bias(bias, scales, input_scale)
        return [round_weight(weights[0], scales), *biases]


def _tensor(graph: Graph, name: str) -> Tensor:
    return torch.from_numpy(np.array(graph.constant(name)))
