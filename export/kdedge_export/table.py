"""The one range table: what calibration and QAT both end in, and every INT8 file is written from.

A file is (float model, plan, table): the plan says what becomes 8-bit, the table says at which scale. Each form takes
its own scales from the same spans: U8 with a zero point for ONNX Runtime, symmetric S8 for TensorRT.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from kdedge.errors import BugError
from kdedge_export.graph import Graph

__all__ = ["U8", "RangeTable", "Span", "natural_weight_scales", "s8_scale"]

Span = tuple[float, float]
Scales = npt.NDArray[np.float32]
LEVELS = 255
TINY = 1e-30  # float32's smallest normal number is near; a tensor below it is zero for all that matters


@dataclass(frozen=True)
class U8:
    """q = clamp(round(x / scale) + zero_point, 0, 255), x' = (q - zero_point) * scale: 0 is always exact."""

    scale: float
    zero_point: int

    @classmethod
    def over(cls, span: Span) -> "U8":
        """The range that holds `span` and 0. A tensor that is 0 everywhere gets scale 1."""
        low, high = min(0.0, span[0]), max(0.0, span[1])
        scale = float(np.float32((high - low) / LEVELS))
        if scale < TINY:
            return cls(1.0, 0)
        return cls(scale, int(np.clip(np.rint(-low / scale), 0, LEVELS)))

    @property
    def low(self) -> float:
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        return (LEVELS - self.zero_point) * self.scale

    def apply(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Quantize and dequantize."""
        codes = np.clip(np.rint(values / self.scale) + self.zero_point, 0, LEVELS)
        return np.asarray((codes - self.zero_point) * self.scale, dtype=np.float64)


def s8_scale(span: Span) -> float:
    """The scale of q = clamp(round(x / scale), -128, 127) that clips nothing of `span`; 1 where all is 0."""
    scale = float(np.float32(max(-span[0], span[1]) / 127))
    return scale if scale >= TINY else 1.0


def natural_weight_scales(model: onnx.ModelProto, layers: Iterable[str]) -> dict[str, Scales]:
    """float32 [output channels] for each layer with a constant weight: its channel's largest weight is the code 127."""
    graph = Graph(model)
    wanted = set(layers)
    found: dict[str, Scales] = {}
    for node in graph.nodes:
        if node.name in wanted and node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            weight = graph.constant(node.input[1])
            if weight is None:
                raise BugError(f"{node.name} was planned as INT8, but its weight is computed")
            rows = weight.swapaxes(0, 1) if node.op_type == "ConvTranspose" else weight
            largest = np.abs(rows.reshape(len(rows), -1)).max(1).astype(np.float64) / 127
            found[node.name] = np.where(largest < TINY, 1.0, largest).astype(np.float32)
    return found


@dataclass(frozen=True)
class RangeTable:
    """`spans`: the (low, high) with low <= 0 <= high that each quantized tensor of the float model keeps.

    `s8_spans`: those chosen for symmetric codes, where half of them may be wasted; `spans` for tensors not in it.

    `weight_scales`: of each quantized Conv and Gemm by node name, float32 [output channels] along axis 0, symmetric
    -127..127. They are kept apart from the weights, since rounding that was learned must not move them.
    """

    spans: Mapping[str, Span]
    weight_scales: Mapping[str, Scales] = field(default_factory=dict)
    s8_spans: Mapping[str, Span] = field(default_factory=dict)

    def u8(self, tensor: str) -> U8:
        return U8.over(self.spans[tensor])

    def s8_span(self, tensor: str) -> Span:
        return self.s8_spans.get(tensor) or self.spans[tensor]

    def s8(self, tensor: str) -> float:
        return s8_scale(self.s8_span(tensor))

    def with_spans(self, spans: Mapping[str, Span]) -> "RangeTable":
        """A copy in which `spans` replace or join those there are."""
        return replace(self, spans={**self.spans, **spans})

    def to_json(self) -> dict[str, Any]:
        """`tensors` and `layers` of quantization.json."""
        tensors = {
            name: {
                "low": span[0],
                "high": span[1],
                "u8": {"scale": self.u8(name).scale, "zero_point": self.u8(name).zero_point},
                "s8": {"low": self.s8_span(name)[0], "high": self.s8_span(name)[1], "scale": self.s8(name)},
            }
            for name, span in self.spans.items()
        }
        layers = {
            name: {"weight_scales": [float(each) for each in scales]} for name, scales in self.weight_scales.items()
        }
        return {"tensors": tensors, "layers": layers}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "RangeTable":
        tensors, layers = document["tensors"], document["layers"]
        return cls(
            {name: (float(each["low"]), float(each["high"])) for name, each in tensors.items()},
            {
                name: np.asarray(each["weight_scales"], np.float32)
                for name, each in layers.items()
                if "weight_scales" in each
            },
            {name: (float(each["s8"]["low"]), float(each["s8"]["high"])) for name, each in tensors.items()},
        )
