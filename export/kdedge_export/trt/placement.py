"""The linter's rules 5 to 11: where Q/DQ stand in a TensorRT file. `trt_lint.py` has the others and runs them all."""

from collections.abc import Iterator

import onnx

from kdedge_export.trt.rules import (
    ACTIVATIONS,
    FLOAT_OPS,
    MOVES,
    POOLS,
    WEIGHTED,
    longer_branch,
    moved_from,
    why_weighted_float,
)
from kdedge_export.trt.view import View

__all__ = ["PLACEMENT"]

PAIR = ("QuantizeLinear", "DequantizeLinear")


def rule_5_activation(view: View) -> Iterator[str]:
    """Rule 5: no Q/DQ between a layer and its activation, which would stop their fusion."""
    for node in view.layers:
        source = view.unpaired(node.input[0]) if node.op_type in ACTIVATIONS else None
        before = view.graph.producer.get(source) if source else None
        if before is not None and before.op_type in (*WEIGHTED, "Add", "BatchNormalization"):
            yield f"{node.name}: Q/DQ stand between {before.name} and its {node.op_type}"


def rule_5_inputs_only(view: View) -> Iterator[str]:
    """Rule 5: what no 8-bit layer reads is not quantized: no outputs of layers, none of the model."""
    takers = (*WEIGHTED, *POOLS, *MOVES, *FLOAT_OPS, "Add", "Concat")  # of FLOAT_OPS rule 11 tells
    for node in view.kind("DequantizeLinear"):
        readers = view.graph.readers(node.output[0])
        if not readers or node.output[0] in view.graph.outputs:
            yield f"{node.name}: no layer reads it"
        for reader in readers:
            if reader.op_type not in (*takers, *ACTIVATIONS):  # of activations the rule above tells
                yield f"{node.name}: {reader.op_type} {reader.name} has no 8-bit input"


def rule_5_whole_layers(view: View) -> Iterator[str]:
    """Rule 5: a layer has its input and its weight quantized, or neither; both where INT8 pays."""
    for node in view.layers:
        if node.op_type in WEIGHTED:
            weight = view.unpaired(node.input[1]) is not None
            if weight != (0 in view.eight_bit(node)):
                yield f"{node.name}: {'its weight' if weight else 'its input'} alone is quantized"
            plain = view.plain.producer[node.output[0]]
            if not weight and node.name not in view.kept_float and not _why_float(plain, view):
                yield f"{node.name}: it is left in float, though INT8 pays"


def rule_5_pools(view: View) -> Iterator[str]:
    """Rule 5: a pooling behind an INT8 layer reads bytes, where the plan wants that."""
    for node in view.layers:
        wanted = view.pools and node.name not in view.kept_float and node.name not in view.pooled.gates
        if node.op_type in POOLS and wanted and not view.eight_bit(node) and view.made_in_int8(node.input[0]):
            yield f"{node.name}: it reads floats behind an INT8 layer"


def rule_6_skip_only(view: View) -> Iterator[str]:
    """Rule 6: of a residual sum the skip alone is quantized; the other convolution adds inside its own kernel."""
    for node in view.kind("Add"):
        places = view.eight_bit(node)
        if len(places) == 2:
            yield f"{node.name}: both inputs of the sum are quantized"
        elif places and not _fuses(node, 1 - places[0], view):
            yield f"{node.name}: its float input is no quantized convolution of its own"


def rule_6_skip(view: View) -> Iterator[str]:
    """Rule 6: where a quantized convolution ends in a sum, the other input is quantized."""
    for node in view.kind("Add"):
        computed = [name for name in node.input if name not in view.graph.initializers]
        fused = [place for place in range(len(computed)) if _fuses(node, place, view)]
        if len(set(computed)) == 2 and fused and not view.eight_bit(node) and node.name not in view.kept_float:
            yield f"{node.name}: its skip is float, though {node.input[fused[0]]} could be fused with the sum"


def rule_6_longer_way(view: View) -> Iterator[str]:
    """Rule 6: of two convolutions that end in a sum, the one with the longer way stays unquantized."""
    for node in view.kind("Add"):
        made = [view.plain.producer.get(name) for name in view.plain.producer[node.output[0]].input]
        two = all(each is not None and each.op_type == "Conv" and each.name not in view.kept_float for each in made)
        if two and view.eight_bit(node) == [longer_branch(view.plain.producer[node.output[0]], view.plain)]:
            yield f"{node.name}: the branch with the longer way is the one that is quantized"


def rule_7_shared_pairs(view: View) -> Iterator[str]:
    """Rule 7: all quantized readers of a tensor share one Q/DQ pair."""
    read = [(node.op_type, node.input[0]) for node in view.graph.nodes if node.op_type in PAIR]
    for each in dict.fromkeys(read):
        if read.count(each) > 1:
            yield f"{each[1]}: {read.count(each)} times {each[0]} for one tensor"


def rule_8_concat(view: View) -> Iterator[str]:
    """Rule 8: a Concat has all inputs and its output at one scale, or none quantized."""
    for node in view.kind("Concat"):
        places = view.eight_bit(node)
        if not places:
            continue
        names = [view.unpaired(name) or name for name in node.input]
        scales = {float(view.scales[name]) if name in view.scales else None for name in (*names, node.output[0])}
        if len(scales) > 1 or None in scales:
            yield f"{node.name}: inputs and output are not all at one scale"


def rule_8_moves(view: View) -> Iterator[str]:
    """Rule 8: what only moves values leaves the scale alone, from the first quantized tensor to all that hold it."""
    origins: dict[str, list[str]] = {}
    for name in view.scales:
        origins.setdefault([name, *moved_from(name, view.plain)][-1], []).append(name)
    for origin, names in origins.items():
        if len({view.scales[name].tobytes() for name in names}) > 1:
            yield f"{origin}: {', '.join(names)} hold its values at different scales"


def rule_9_pool_in_skip(view: View) -> Iterator[str]:
    """Rule 9: a MaxPool whose output is a quantized skip has its own Q/DQ; any other takes that of its input."""
    for node in view.kind("Add"):
        for place in view.eight_bit(node):
            pool = view.graph.producer.get(view.unpaired(node.input[place]) or "")
            if pool is not None and pool.op_type == "MaxPool" and not view.eight_bit(pool):
                yield f"{pool.name}: a pooling in a skip reads floats"


def rule_10_small_layers(view: View) -> Iterator[str]:
    """Rule 10: depthwise, small and one-pixel layers that are slower in INT8 stay float."""
    for node in view.layers:
        if node.op_type in WEIGHTED and view.eight_bit(node) and node.name not in view.pooled.gates:
            reason = _why_float(view.plain.producer[node.output[0]], view)
            if reason:
                yield f"{node.name}: it is quantized, though {reason}"


def rule_11_float_ops(view: View) -> Iterator[str]:
    """Rule 11: Sigmoid, HardSigmoid, HardSwish, Mul and Softmax read floats."""
    for node in view.layers:
        allowed = node.op_type == "HardSwish" and view.hard_swish
        if node.op_type in FLOAT_OPS and view.eight_bit(node) and not allowed:
            yield f"{node.name}: {node.op_type} reads a quantized tensor"


def rule_11_gates(view: View) -> Iterator[str]:
    """Rule 11: a squeeze-and-excitation gate is float from its pooling to its product."""
    for node in view.layers:
        if node.name in view.pooled.gates and view.eight_bit(node):
            yield f"{node.name}: it belongs to a squeeze-and-excitation gate and is quantized"


def _why_float(plain: onnx.NodeProto, view: View) -> str:
    """`plain`: the layer as it stands in the graph without Q/DQ."""
    return why_weighted_float(plain, view.plain, view.pooled, view.batch)


def _fuses(add: onnx.NodeProto, place: int, view: View) -> bool:
    node = view.graph.producer.get(add.input[place])
    alone = view.graph.only_reader(add.input[place])
    return (
        node is not None
        and node.op_type in ("Conv", "ConvTranspose")
        and bool(view.eight_bit(node))
        and alone is not None
        and alone.name == add.name
    )


PLACEMENT = (
    rule_5_activation,
    rule_5_inputs_only,
    rule_5_whole_layers,
    rule_5_pools,
    rule_6_skip_only,
    rule_6_skip,
    rule_6_longer_way,
    rule_7_shared_pairs,
    rule_8_concat,
    rule_8_moves,
    rule_9_pool_in_skip,
    rule_10_small_layers,
    rule_11_float_ops,
    rule_11_gates,
)
