"""A finished run on digits, made in seconds without the pipeline, and the networks that the export is tried on."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from kdedge import recipe_io
from kdedge.data.source import Source
from kdedge.data.sources import open_source
from kdedge.data.splits import Splits, make_splits
from kdedge.models.weights import save_model
from kdedge.models.zoo import ModelSpec, Network, build
from kdedge.runs import Run, write_bytes, write_json
from kdedge_device.preprocess import Preprocess
from kdedge_export.float_form.onnx_export import export_float

torch.set_num_threads(1)

CLASSES = tuple("abcdefghij")
SMALL = Preprocess(16, 16, 3, "squash", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def warm(module: nn.Module, x: torch.Tensor) -> nn.Module:
    """`module` in eval mode, its batch normalisation set by the batch `x`; without, its activations vanish."""
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.momentum = None  # a plain average
            each.reset_running_stats()
    with torch.no_grad():
        module.train()(x)
    return module.eval()


@pytest.fixture(scope="session")
def mobilenet_v2() -> tuple[nn.Module, onnx.ModelProto]:
    """A MobileNetV2 for 16 px and its float ONNX."""
    module = network("mobilenet-v2", width=0.5)
    return module, export_float(module, SMALL, CLASSES)


@pytest.fixture(scope="session")
def mobilenet_v3() -> tuple[nn.Module, onnx.ModelProto]:
    """A MobileNetV3-Small for 16 px and its float ONNX."""
    module = network("mobilenet-v3-small")
    return module, export_float(module, SMALL, CLASSES)


def network(arch: str, halvings: int = 2, width: float = 1.0, px: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return warm(build(ModelSpec(arch, classes=10, width=width, halvings=halvings)), torch.randn(32, 3, px, px))


def images(count: int, px: int = 16, channels: int = 3) -> np.ndarray:
    """Smooth coloured noise, uint8 [count, px, px, channels]."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 4, 4, channels), dtype=np.uint8)
    return np.repeat(np.repeat(coarse, px // 4, axis=1), px // 4, axis=2)


def taught_digits(spec: ModelSpec, preprocess: Preprocess) -> tuple[Network, Source, Splits]:
    """Forty steps for the backbone, least squares for the head: far better than chance, in a few seconds."""
    source = open_source("digits")
    splits = make_splits(source, 40, seed=0)
    pixels = source.load(splits.unlabeled, preprocess).permute(0, 2, 3, 1).numpy()
    x, y = torch.from_numpy(preprocess.normalize(pixels)), torch.from_numpy(splits.truth[splits.unlabeled])
    torch.manual_seed(0)
    module = build(spec).train()
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(40):
        chosen = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x[chosen]), y[chosen]).backward()
        optimizer.step()
    warm(module, x[::2])
    with torch.no_grad():
        features = torch.cat([module.embed(x), torch.ones(len(x), 1)], 1)
        ridge = features.T @ features + 100 * torch.eye(features.shape[1])
        solved = torch.linalg.solve(ridge, features.T @ (nn.functional.one_hot(y, 10).float() * 10 - 1))
        module.head.weight.copy_(solved[:-1].T)
        module.head.bias.copy_(solved[-1])
    return module, source, splits


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as training leaves it, its student far better than chance. Tests copy it."""
    path = tmp_path_factory.mktemp("runs") / "tiny-digits-40-s0"
    path.mkdir()
    run = Run(path)
    spec = ModelSpec("mobilenet-v2", classes=10, channels=1, width=0.25, halvings=2)
    preprocess = Preprocess(8, 8, 1, "squash", (0.3,), (0.38,))
    module, source, splits = taught_digits(spec, preprocess)
    recipe = recipe_io.load("tiny")
    write_bytes(run.recipe_path, recipe_io.dump(recipe).encode())
    write_json(run.splits_path, splits.to_json(source))
    save_model(run.student_path, module, spec, source.classes, preprocess)
    run.update_manifest(status="finished", recipe_sha256=hashlib.sha256(run.recipe_path.read_bytes()).hexdigest())
    write_json(run.result_path, {"schema": 1})
    return path
