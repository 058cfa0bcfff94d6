"""Where a TensorRT file carries Q/DQ, decided from the float graph alone. The rules are numbered as in trt_lint.py.

TensorRT's INT8 kernels read 8 bits and write what their reader wants, so only *inputs* are quantized (rule 5):

1. Conv, ConvTranspose and Gemm where INT8 pays (rules 10 and 11), each behind the activation of the layer in front.
2. Poolings behind such a layer, which then writes bytes instead of floats.
3. Of a residual sum the skip alone (rule 6): the other branch, a convolution, then adds it inside its own kernel. Where
   both branches are convolutions, the one with the longer way from their common ancestor stays unquantized.
4. Concat where all its inputs come out of INT8 layers and some INT8 layer reads it: inputs and output, at one scale,
   with whatever only moves values on the way (rule 8), so that joining and shuffling move bytes.

A tensor has one Q/DQ pair for all its quantized readers (rule 7); its float readers read the float tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx

from kdedge.errors import BugError
from kdedge_export.graph import Graph
from kdedge_export.table import RangeTable, s8_scale
from kdedge_export.trt.rules import (
    ACTIVATIONS,
    FLOAT_OPS,
    MOVES,
    POOLS,
    WEIGHTED,
    Pooled,
    longer_branch,
    moved_from,
    why_weighted_float,
)

__all__ = ["TrtPlan", "make_trt_plan"]


@dataclass(frozen=True)
class TrtPlan:
    """`layers`: names of the nodes that read 8-bit tensors. `tensors`: those with Q/DQ, in topological order.

    `reads`: layer -> the places of its inputs that are read dequantized. `weighted`: layers with a weight.
    `same_scale`: tensor -> the tensor whose values it holds, moved, be that quantized or not. `groups`: tensors to be
    measured that share one scale, wide enough for all. `kept_float`: node name -> why.

    Leaving more layers in float never asks for a tensor that the whole plan does not measure.
    """

    layers: frozenset[str] = frozenset()
    tensors: tuple[str, ...] = ()
    reads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    weighted: tuple[str, ...] = ()
    same_scale: dict[str, str] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()
    kept_float: dict[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> tuple[str, ...]:
        """The tensors that calibration has to look at."""
        return tuple(dict.fromkeys(self.same_scale.get(name, name) for name in self.tensors))

    def scales(self, table: RangeTable) -> dict[str, float]:
        """The scale of every tensor of the plan, as it is written. BugError where one was not calibrated."""
        missing = [name for name in self.measured if name not in table.spans]
        if missing:
            raise BugError(f"{missing[0]} is planned as 8-bit for TensorRT, but the range table does not have it")
        group_of = {name: group for group in self.groups for name in group}
        found: dict[str, float] = {}
        for name in self.tensors:
            source = self.same_scale.get(name, name)
            spans = [table.s8_span(each) for each in group_of.get(source, (source,))]
            found[name] = s8_scale((min(low for low, _ in spans), max(high for _, high in spans)))
        return found


def make_trt_plan(
    model: onnx.ModelProto,
    leave_float: frozenset[str] = frozenset(),
    *,
    pools: bool = True,
    hard_swish: bool = False,
    batch: int = 1,
) -> TrtPlan:
    """The plan for a float model with named nodes; `leave_float` names layers to be left out of it.

    `pools`: Q/DQ in front of poolings. `hard_swish`: also in front of HardSwish, as NVIDIA's quantizer does it; both
    are to be measured on a device. `batch`: what the engine is built for; at 1 a Gemm is a matrix times one vector.
    """
    planner = _Planner(Graph(model), leave_float, pools, hard_swish)
    for node in planner.graph.nodes:
        if node.op_type in WEIGHTED:
            planner.weighted(node, batch)
    for node in planner.graph.nodes:
        planner.follower(node)
    planner.drop_unread_concats()
    planner.move_bytes()
    return planner.plan()


class _Planner:
    def __init__(self, graph: Graph, leave_float: frozenset[str], pools: bool, hard_swish: bool) -> None:
        self.graph = graph
        self.leave_float = leave_float
        self.pools = pools
        self.hard_swish = hard_swish
        self.pooled = Pooled(graph)
        self.able: set[str] = set()  # weighted layers that INT8 pays for, those left out by choice included
        self.reads: dict[str, tuple[int, ...]] = {}
        self.kept_float: dict[str, str] = {}

    def weighted(self, node: onnx.NodeProto, batch: int) -> None:
        reason = why_weighted_float(node, self.graph, self.pooled, batch)
        if not reason:
            self.able.add(node.name)
            reason = "left in float by choice" if node.name in self.leave_float else ""
        self._settle(node, reason, (0,))

    def follower(self, node: onnx.NodeProto) -> None:
        """Everything that is not decided by its weight, in topological order."""
        kind = node.op_type
        if kind in WEIGHTED or kind in MOVES:
            return  # what moves values is quantized by what stands around it
        if kind in ACTIVATIONS:
            if not self._made_in_int8(node.output[0]):
                self.kept_float[node.name] = "no quantized layer in front of it"
        elif node.name in self.leave_float:
            self.kept_float[node.name] = "left in float by choice"
        elif kind in POOLS:
            self._settle(node, self._why_pool_float(node), (0,))
        elif kind == "HardSwish" and self.hard_swish:
            made = self._made_in_int8(node.input[0])
            self._settle(node, "" if made else "no quantized layer in front of it", (0,))
        elif kind == "Add":
            self._add(node)
        elif kind == "Concat":
            whole = all(self._made_in_int8(name) for name in node.input)
            self._settle(
                node, "" if whole else "not all its inputs come from INT8 layers", tuple(range(len(node.input)))
            )
        elif kind in FLOAT_OPS:
            self.kept_float[node.name] = f"8 bits in front of {kind} cost accuracy and stop its fusion"
        else:
            self.kept_float[node.name] = f"{kind} has no INT8 form here"

    def _settle(self, node: onnx.NodeProto, reason: str, places: tuple[int, ...]) -> None:
        if reason:
            self.kept_float[node.name] = reason
        else:
            self.reads[node.name] = places

    def _made_in_int8(self, tensor: str) -> bool:
        """Whether an INT8 kernel writes `tensor`, the activations and moves behind it included."""
        node = self.graph.producer.get(tensor)
        while node is not None and node.op_type in (*ACTIVATIONS, *MOVES):
            node = self.graph.producer.get(node.input[0])
        return node is not None and node.name in self.reads

    def _why_pool_float(self, node: onnx.NodeProto) -> str:
        if node.name in self.pooled.gates:
            return "it belongs to a squeeze-and-excitation gate"
        if not self.pools:
            return "poolings are left in float by choice"
        return "" if self._made_in_int8(node.input[0]) else "no quantized layer in front of it"

    def _add(self, node: onnx.NodeProto) -> None:
        fused = [place for place, name in enumerate(node.input) if self._ends_in(name, node)]
        computed = {name for name in node.input if name not in self.graph.initializers}
        kept = longer_branch(node, self.graph) if len(fused) == 2 else [*fused, 0][0]
        conv = self.graph.producer.get(node.input[kept])
        if not fused or len(computed) < 2 or conv is None or conv.name not in self.reads:
            self.kept_float[node.name] = "no quantized convolution of its own ends in it"
            return
        self.reads[node.name] = (1 - kept,)
        pool = self.graph.producer.get(node.input[1 - kept])
        if pool is not None and pool.op_type == "MaxPool":
            self.reads[pool.name] = (0,)  # rule 9: else the pooling of the skip runs in float

    def _ends_in(self, tensor: str, add: onnx.NodeProto) -> bool:
        """Whether a convolution for INT8 makes `tensor` for `add` alone, be it left in float by choice or not.

        A layer that is left out must not make the other branch the fused one: its tensor was never measured.
        """
        node, own = self.graph.producer.get(tensor), self.graph.only_reader(tensor)
        conv = node is not None and node.op_type in ("Conv", "ConvTranspose") and node.name in self.able
        return conv and own is not None and own.name == add.name

    def drop_unread_concats(self) -> None:
        """A Concat is joined in 8 bits only for a reader in 8 bits; from the end, since they stand in rows."""
        for node in reversed(self.graph.nodes):
            if node.op_type == "Concat" and node.name in self.reads and not self._is_read(node.output[0]):
                del self.reads[node.name]
                self.kept_float[node.name] = "no quantized layer reads it"

    def move_bytes(self) -> None:
        """What moves values between two quantized tensors reads the first as bytes."""
        read = {node.input[place] for node in self.graph.nodes for place in self.reads.get(node.name, ())}
        read.update(node.output[0] for node in self.graph.nodes if node.op_type == "Concat" and node.name in self.reads)
        for node in self.graph.nodes:
            if node.op_type in MOVES and node.input[0] in read and any(self._is_read(name) for name in node.output):
                self.reads[node.name] = (0,)

    def _is_read(self, tensor: str) -> bool:
        for reader in self.graph.readers(tensor):
            places = self.reads.get(reader.name, ())
            if any(reader.input[place] == tensor for place in places):
                return True
            if reader.op_type in MOVES and any(self._is_read(name) for name in reader.output):
                return True
        return False

    def plan(self) -> TrtPlan:
        nodes = [node for node in self.graph.nodes if node.name in self.reads]
        wanted = {node.input[place] for node in nodes for place in self.reads[node.name]}
        wanted.update(node.output[0] for node in nodes if node.op_type == "Concat")
        order = [*self.graph.inputs, *(name for node in self.graph.nodes for name in node.output)]
        tensors = tuple(name for name in order if name in wanted)
        same_scale = {name: held[-1] for name in tensors if (held := moved_from(name, self.graph))}
        return TrtPlan(
            layers=frozenset(self.reads),
            tensors=tensors,
            reads=self.reads,
            weighted=tuple(node.name for node in nodes if node.op_type in WEIGHTED),
            same_scale=same_scale,
            groups=tuple(self._groups(nodes, same_scale)),
            kept_float=self.kept_float,
        )

    def _groups(self, nodes: list[onnx.NodeProto], same_scale: dict[str, str]) -> Iterator[tuple[str, ...]]:
        """Measured tensors that are tied by Concat, directly or in a row of them, in the order of the graph."""
        group: dict[str, dict[str, None]] = {}
        for node in nodes:
            if node.op_type == "Concat":
                tied = [same_scale.get(name, name) for name in (*node.input, *node.output)]
                joined = {each: None for name in tied for each in group.get(name, {name: None})}
                group |= dict.fromkeys(joined, joined)
        for each in {id(joined): joined for joined in group.values()}.values():
            yield tuple(each)
