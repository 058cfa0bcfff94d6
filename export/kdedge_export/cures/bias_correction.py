"""Empirical bias correction: what rounding adds to each channel on average is taken off its bias.

Nagel et al. 2019 (arXiv 1906.04721), section 4.2 and appendix D: rounded weights and inputs shift the mean of a
layer's output, and the shift of one layer is an error of all behind it. Measured layer by layer, each after those in
front of it were corrected. K output channels.
"""

import onnx
import torch
from torch import Tensor

from kdedge_export.cpu.plan import Plan
from kdedge_export.cures.taps import Batches
from kdedge_export.cures.walk import Layer, cure_layers
from kdedge_export.table import RangeTable

__all__ = ["correct_bias", "corrected"]

IMAGES = 128  # means settle early: 512 images gave no smaller divergence than 64


def correct_bias(
    model: onnx.ModelProto, plan: Plan, table: RangeTable, batches: Batches, reference: onnx.ModelProto | None = None
) -> onnx.ModelProto:
    """A copy of the float `model` whose biases make the mean outputs of its INT8 file those of `reference`.

    `reference`: the float network to be near; `model` itself unless its weights were altered already. Means are over
    images and positions, before the activation. A layer without a bias is given one; nothing else changes.
    """

    def fix(layer: Layer) -> tuple[Tensor, Tensor | None]:
        return layer.weight, corrected(layer.bias, layer.made, layer.wanted)

    return cure_layers(model, plan, table, batches, reference or model, fix, IMAGES)


def corrected(bias: Tensor | None, made: Tensor, wanted: Tensor) -> Tensor:
    """The bias [K] (None: 0) with which `made` [N, K, ...] has the channels' means of `wanted`."""
    axes = [axis for axis in range(made.ndim) if axis != 1]
    shift = (wanted - made).mean(axes, dtype=torch.float64)
    return ((0.0 if bias is None else bias) + shift).float()
