"""How much each layer's rounding alone takes the network away from FP32: the order in which layers go back to float.

One layer at a time is quantized and all others are left in float, not the other way round: beside the noise of fifty
quantized layers the effect of one could not be seen on a few images, while single effects nearly add up (Wu et al.
2020, arXiv 2004.09602, section 5.2, which orders layers in the same way). N images, K classes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from kdedge_export.cpu.plan import Plan, make_plan
from kdedge_export.cpu.qdq import write_int8
from kdedge_export.cures.taps import Batches, run
from kdedge_export.cures.walk import spread, weighted_layers
from kdedge_export.graph import Graph
from kdedge_export.table import RangeTable

__all__ = ["Sensitivity", "divergences", "sensitivity", "units"]

IMAGES = 64  # an order is asked for, not a number


@dataclass(frozen=True)
class Sensitivity:
    """`layer` is a name for make_plan's `leave_float`; `nodes` are all that go back to float with it.

    `divergence`: mean KL(FP32 || only these quantized) of the outputs, in nats.
    """

    layer: str
    divergence: float
    nodes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "nodes": list(self.nodes)}


def sensitivity(
    model: onnx.ModelProto,
    plan: Plan,
    table: RangeTable,
    batches: Batches,
    say: Callable[[str], None] = lambda sentence: None,
    images: int = IMAGES,
) -> list[Sensitivity]:
    """The quantized layers of `plan`, the worst first; ties as in the graph. Measured with the file that ships.

    Sums, poolings and moves have no place in it: they are 8-bit only where what they read is, and follow.
    """
    few = [spread(batches, images)]
    fp32 = run(model, few)
    layers = [node.name for node in weighted_layers(model, plan)]
    found: list[Sensitivity] = []
    for place, (layer, nodes) in enumerate(units(model, plan).items()):
        others = frozenset(layers) - {layer}
        found.append(Sensitivity(layer, _divergence(model, others, table, few, fp32), nodes))
        if (place + 1) % 10 == 0:
            say(f"Sensitivity: {place + 1} of {len(layers)} layers")
    return sorted(found, key=lambda each: -each.divergence)


def _divergence(
    model: onnx.ModelProto,
    leave_float: frozenset[str],
    table: RangeTable,
    batches: Batches,
    fp32: npt.NDArray[np.float32],
) -> float:
    alone = write_int8(model, make_plan(model, leave_float), table)
    return float(divergences(fp32, run(alone, batches)).mean())


def divergences(fp32: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """KL(FP32 || other) of each image, float64 [N] in nats, of logits [N, K]."""
    log_p, log_q = (_log_softmax(each.astype(np.float64)) for each in (fp32, other))
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(1))


def _log_softmax(logits_NK: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits_NK - logits_NK.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def units(model: onnx.ModelProto, plan: Plan) -> dict[str, tuple[str, ...]]:
    """Each weighted layer of `plan` with the nodes that its leaving the plan leaves in float: make_plan is asked."""
    found: dict[str, tuple[str, ...]] = {}
    for node in weighted_layers(model, plan):
        already = {name for name, why in plan.kept_float.items() if why == "left in float by choice"}
        without = make_plan(model, frozenset({node.name, *already}))
        gone = (plan.layers | set(plan.absorbed)) - without.layers - set(without.absorbed)
        found[node.name] = tuple(each.name for each in Graph(model).nodes if each.name in gone)
    return found
