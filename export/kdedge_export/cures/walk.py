"""The float network and the quantized one walked side by side, layer by layer, over many images at once.

What a layer should make is known from the float walk, what it reads from the quantized one; a layer whose weights are
changed there is run again, so every layer meets the errors left by those in front of it, in one pass over the images.
N images, C channels, H x W pixels; K output channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from kdedge_export.cpu.plan import Plan
from kdedge_export.cures.taps import Batches, set_constant
from kdedge_export.graph import Graph, names_of, unique
from kdedge_export.table import U8, RangeTable
from kdedge_export.training.fake_quant import round_bias, round_u8, round_weight
from kdedge_export.training.torch_ops import Operator, torch_operator

__all__ = ["Fix", "Layer", "cure_layers", "spread", "weighted_layers"]

LOST = 0.5  # of an image's own squares: an error above says nothing of what rounding does to the others
WALK_BYTES = 768 << 20  # of the tensors of both networks that are alive at one time
_CLIPS = ("Relu", "Clip")
_UNROUNDED = Plan()


@dataclass(frozen=True)
class Layer:
    """A quantized Conv or Gemm and all it takes to look for better weights.

    `read`: its input in the quantized network. `made`: what it makes there, unrounded, before its activation; `wanted`:
    what the float network makes there; both [N, K, ...], without the images that are lost. `limits`: of the absorbed
    activation, infinite without.
    """

    operator: Operator
    weight: Tensor
    bias: Tensor | None
    scales: Tensor
    read: Tensor
    made: Tensor
    wanted: Tensor
    limits: tuple[float, float]


Fix = Callable[[Layer], tuple[Tensor, Tensor | None]]
"""The layer's new weight and bias; float, to be rounded as the plan and the table say."""


def cure_layers(
    model: onnx.ModelProto,
    plan: Plan,
    table: RangeTable,
    batches: Batches,
    reference: onnx.ModelProto,
    fix: Fix,
    images: int,
    say: Callable[[str], None] = lambda sentence: None,
) -> onnx.ModelProto:
    """A copy of the float `model` with the weights that `fix` finds for its quantized layers, in topological order.

    `reference`: the float network to be near, with the nodes of `model`. Up to `images` images, evenly over all of
    them, fewer where WALK_BYTES does not hold so many. ExportError for an operator that torch_ops does not know.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    chosen = torch.from_numpy(spread(batches, images))
    layers = weighted_layers(model, plan)
    names = {node.name: place for place, node in enumerate(layers)}
    with torch.no_grad():
        one = _peak_bytes(model, plan, table, reference, chosen[:1])
        chosen = chosen[: max(1, WALK_BYTES // one)]
        float_walk, walk = _Walk(reference, chosen), _Walk(model, chosen, plan, table)
        for node in model.graph.node:
            wanted, made = float_walk.make(node.name), walk.make(node.name)
            if node.name in names:
                layer = walk.layer(node.name, made[0], wanted[0])
                weight, bias = fix(layer)
                made = (walk.renewed(node.name, weight, bias),)
                _store(copy, node.name, weight, bias)
                say(f"{names[node.name] + 1} of {len(layers)}: {node.name}")
            float_walk.keep(node.name, wanted)
            walk.keep(node.name, made)
    return copy


def weighted_layers(model: onnx.ModelProto, plan: Plan) -> list[onnx.NodeProto]:
    """The quantized layers that have weights, in topological order."""
    return [node for node in model.graph.node if node.name in plan.layers and node.op_type in ("Conv", "Gemm")]


def spread(batches: Batches, count: int) -> npt.NDArray[np.float32]:
    """`count` images evenly over all of `batches`, or all of them: neighbours may be of one class."""
    sizes = [len(batch) for batch in batches]
    places = np.unique(np.linspace(0, sum(sizes) - 1, min(count, sum(sizes))).round().astype(np.int64))
    starts = np.cumsum([0, *sizes])
    parts = [
        batch[places[(places >= a) & (places < b)] - a]
        for batch, a, b in zip(batches, starts[:-1], starts[1:], strict=True)
    ]
    return np.ascontiguousarray(np.concatenate(parts))


def _not_lost(read: Tensor, made: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the images of which the quantized network still makes about what the float one does.

    Ranges that most images fill (`choose.py`) cut a few down to a fraction; their shift would be taken for everyone's.
    All of them, where half are lost: then it is the rounding itself.
    """
    error_N, own_N = ((each**2).flatten(1).sum(1) for each in (made - wanted, wanted))
    kept_N = error_N <= LOST * own_N
    if kept_N.all() or 2 * int(kept_N.sum()) < len(kept_N):
        return read, made, wanted
    return read[kept_N], made[kept_N], wanted[kept_N]


def _store(model: onnx.ModelProto, name: str, weight: Tensor, bias: Tensor | None) -> None:
    node = next(each for each in model.graph.node if each.name == name)
    set_constant(model, node, 1, weight.numpy())
    if bias is not None:
        set_constant(model, node, 2, bias.numpy())


def _peak_bytes(
    model: onnx.ModelProto, plan: Plan, table: RangeTable, reference: onnx.ModelProto, image: Tensor
) -> int:
    walks, peak = (_Walk(reference, image), _Walk(model, image, plan, table)), 1
    for node in model.graph.node:
        made = [walk.make(node.name) for walk in walks]
        peak = max(peak, sum(walk.bytes for walk in walks) + sum(each.nbytes for found in made for each in found))
        for walk, found in zip(walks, made, strict=True):
            walk.keep(node.name, found)
    return peak


@final
class _Walk:
    """The tensors that are still to be read, of one network, for all images."""

    def __init__(
        self, model: onnx.ModelProto, x_NCHW: Tensor, plan: Plan = _UNROUNDED, table: RangeTable | None = None
    ) -> None:
        self.graph, self.plan, self.table = Graph(model), plan, table or RangeTable({})
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.operators = {name: torch_operator(node, self.graph) for name, node in self.nodes.items()}
        taken = names_of(model)
        self.rounded = {each: unique(f"{each}_dq", taken) for each in plan.tensors}  # what its 8-bit form is kept as
        self.last: dict[str, str] = {}
        for name in self.nodes:
            self.last |= dict.fromkeys(self._inputs(name), name)
        self.values: dict[str, Tensor] = {}
        self._add(self.graph.inputs[0], x_NCHW)

    @property
    def bytes(self) -> int:
        return sum(each.nbytes for each in self.values.values())

    def make(self, name: str) -> tuple[Tensor, ...]:
        """What the node makes of what it reads: unrounded, and unclipped where the rounded range does that."""
        node = self.nodes[name]
        inputs = [self._value(each) for each in self._inputs(name)]
        if name in self.plan.absorbed and node.op_type in _CLIPS:
            return (inputs[0],)
        if self._weighted(name):
            weight, bias = inputs[1], inputs[2] if len(inputs) > 2 else None
            return (self.renewed(name, weight, bias),)
        made = self.operators[name].run(*inputs)
        return (made,) if isinstance(made, Tensor) else made

    def renewed(self, name: str, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same of a quantized layer with other weights, rounded here."""
        inputs = self._inputs(name)
        scales = self._scales(name)
        read = self.values[inputs[0]]
        if bias is not None:
            bias, scales = round_bias(bias, scales, self._u8(self.nodes[name].input[0]).scale)
        made = self.operators[name].run(read, round_weight(weight, scales), *([] if bias is None else [bias]))
        assert isinstance(made, Tensor)
        return made

    def layer(self, name: str, made: Tensor, wanted: Tensor) -> Layer:
        inputs = self._inputs(name)
        weight, *bias = (self._value(each) for each in inputs[1:])
        reader = self.graph.only_reader(self.nodes[name].output[0])
        limits = self.plan.absorbed.get(reader.name) if reader is not None and reader.op_type in _CLIPS else None
        read, made, wanted = _not_lost(self.values[inputs[0]], made, wanted)
        return Layer(
            operator=self.operators[name],
            weight=weight,
            bias=bias[0] if bias else None,
            scales=self._scales(name),
            read=read,
            made=made,
            wanted=wanted,
            limits=limits or (-np.inf, np.inf),
        )

    def keep(self, name: str, made: Sequence[Tensor]) -> None:
        """Round the outputs of a node where the plan does, and let go of what nobody reads any more."""
        for output, value in zip(self.nodes[name].output, made, strict=True):
            self._add(output, value)
        for each in set(self._inputs(name)) & set(self.values):
            if self.last[each] == name:
                del self.values[each]

    def _add(self, tensor: str, value: Tensor) -> None:
        if tensor in self.last:
            self.values[tensor] = value
        if self.rounded.get(tensor) in self.last:
            self.values[self.rounded[tensor]] = round_u8(value, self._u8(tensor))

    def _inputs(self, name: str) -> list[str]:
        """A float reader of a float tensor reads the float tensor, even where another takes its 8-bit form."""
        node = self.nodes[name]
        rounded = name in self.plan.layers
        names = [node.input[place] for place in self.operators[name].places]
        wanted = [each in self.plan.tensors and (rounded or each in self.plan.made) for each in names]
        return [self.rounded[each] if dq else each for each, dq in zip(names, wanted, strict=True)]

    def _value(self, name: str) -> Tensor:
        return self.values[name] if name in self.values else torch.from_numpy(np.array(self.graph.constant(name)))

    def _weighted(self, name: str) -> bool:
        return name in self.plan.layers and self.nodes[name].op_type in ("Conv", "Gemm")

    def _scales(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.table.weight_scales[name], np.float32))

    def _u8(self, tensor: str) -> U8:
        tensor = self.plan.same_scale.get(tensor, tensor)
        return U8.over(self.plan.known[tensor]) if tensor in self.plan.known else self.table.u8(tensor)
