"""Networks that torch's own exporters wrote, old and new, at the opsets that people have: same values as in torch."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kdedge_export.cpu.lint import lint_float
from kdedge_export.float_form.onnx_import import import_onnx
from kdedge_export.sessions import run_onnx

from .conftest import warm
from .foreign_files import from_torch


class Everything(nn.Module):
    """What the families are made of: stem, depthwise block with hard-swish, gate, residual add, shuffle, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
        self.project = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.right = nn.Conv2d(4, 4, 1)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depthwise(x)
        x = x + self.project(y * functional.hardsigmoid(self.gate(y)))
        left, right = x.chunk(2, 1)
        right = self.right(right)
        x = functional.silu(torch.cat([left, right], 1))
        count, channels, height, width = x.size()
        x = x.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(count, channels, height, width)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def everything() -> nn.Module:
    torch.manual_seed(0)
    return warm(Everything(), torch.randn(64, 3, 16, 16))


WORDS = {"Conv", "HardSwish", "HardSigmoid", "Clip", "Relu", "Sigmoid", "Mul", "Add", "GlobalAveragePool", "Flatten"}
WORDS |= {"Split", "Concat", "Reshape", "Transpose", "Gemm"}


@pytest.mark.parametrize(
    ("opset", "dynamo", "batch"),
    [
        (9, False, 1),
        (11, False, None),
        (11, False, 1),
        (13, False, None),
        (17, False, None),
        (17, False, 4),
        (18, True, None),
        (20, True, 2),
        (23, True, None),
    ],
)
def test_torch_exporters(opset: int, dynamo: bool, batch: int | None, everything: nn.Module, tmp_path: Path) -> None:
    path = from_torch(everything, tmp_path / "model.onnx", opset, dynamo=dynamo, batch=batch, px=16)
    found = import_onnx(path)
    assert lint_float(found.model) == []
    kinds = Counter(each.op_type for each in found.model.graph.node)
    assert set(kinds) == WORDS, "nothing of the exporter's shape arithmetic, and no batch normalisation"
    assert (kinds["HardSwish"], kinds["Conv"], kinds["Split"], kinds["Reshape"]) == (1, 6, 1, 2)
    content = found.model.SerializeToString()
    for count in (1, 2, 7):
        x = torch.randn(count, 3, 16, 16)
        with torch.inference_mode():
            expected = everything(x).numpy()
        np.testing.assert_allclose(run_onnx(content, x.numpy()), expected, atol=1e-5)
