"""A network with every kind of layer that TensorRT's placement tells apart, and min-max tables for it.

Wherever the rules of section 2.1 want Q/DQ, `forward` passes the tensor through `at`, by a name of its own. So the same
code is the float network and, with `at` a fake quantization, the oracle of the INT8 file: the places are written down
here by hand, and not taken from the plan.
"""

import functools
from collections.abc import Callable

import numpy as np
import onnx
import torch
from torch import nn

from kdedge_device.preprocess import Preprocess
from kdedge_export.calibration.calibrate import calibrate
from kdedge_export.float_form.onnx_export import export_float
from kdedge_export.table import RangeTable, natural_weight_scales
from kdedge_export.trt.plan import TrtPlan, make_trt_plan

from .conftest import CLASSES, SMALL, images

SITES = ["input", "stem", "deep", "sum", "down1", "short", "gated", "left", "right", "made", "joined", "odd", "end"]
ONE_SCALE = ("left", "right", "made", "joined")
FLOAT_LAYERS = ("squeeze", "excite", "lone", "head")


class Everything(nn.Module):
    """float [N, 3, 16, 16] -> [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d
        self.stem, self.deep, self.narrow = (
            conv(3, 16, 3, padding=1),
            conv(16, 16, 3, padding=1, groups=16),
            conv(16, 16, 1),
        )
        self.down1, self.down2 = conv(16, 32, 3, stride=2, padding=1), conv(32, 32, 3, padding=1)
        self.short = conv(16, 32, 1, stride=2)
        self.squeeze, self.excite, self.mix = conv(32, 8, 1), conv(8, 32, 1), conv(32, 32, 1)
        self.right, self.last = conv(16, 16, 1), conv(32, 12, 3, padding=1)
        self.lone = conv(12, 12, 3, padding=1, groups=12)  # twelve channels: no depthwise kernel in INT8
        self.end, self.head = conv(12, 16, 1), nn.Linear(16, 10)
        self.at: Callable[[str, torch.Tensor], torch.Tensor] = lambda site, x: x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = self.at("stem", torch.relu(self.stem(self.at("input", x))))
        branch = self.narrow(self.at("deep", torch.relu(self.deep(stem))))
        total = self.at("sum", torch.relu(branch + stem))
        longer = self.down2(self.at("down1", torch.relu(self.down1(total))))
        total = torch.relu(longer + self.at("short", self.short(total)))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(total.mean((2, 3), keepdim=True)))))
        left, right = torch.relu(self.mix(self.at("gated", total * gate))).chunk(2, 1)
        made = torch.relu(self.right(self.at("right", right)))
        joined = self.at("joined", torch.cat([self.at("left", left), self.at("made", made)], 1))
        count, _, height, width = x.size()
        shuffled = joined.view(count, 2, 16, height // 2, width // 2).transpose(1, 2)
        last = torch.relu(self.last(shuffled.reshape(count, 32, height // 2, width // 2)))
        lone = self.at("odd", torch.relu(self.lone(last)))
        return self.head(self.at("end", torch.relu(self.end(lone))).mean((2, 3)))


Toy = tuple[Everything, onnx.ModelProto, TrtPlan, RangeTable]


def everything() -> Everything:
    """With random weights that keep the signal's size, so that every layer's rounding is seen at the end."""
    torch.manual_seed(0)
    module = Everything().eval()
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.uniform_(layer.bias, -0.2, 0.2)
    return module


def minmax_table(model: onnx.ModelProto, plan: TrtPlan, pixels: np.ndarray, preprocess: Preprocess) -> RangeTable:
    histograms = calibrate(model, plan.measured, pixels, preprocess)
    spans = {name: (min(0.0, each.low), max(0.0, each.high)) for name, each in histograms.items()}
    return RangeTable(spans, natural_weight_scales(model, plan.weighted))


@functools.cache
def make_toy() -> Toy:
    """Made once, and not to be changed: a network, its float file, its plan and its min-max table over 16 images."""
    module = everything()
    model = export_float(module, SMALL, CLASSES)
    plan = make_trt_plan(model)
    return module, model, plan, minmax_table(model, plan, images(16), SMALL)
