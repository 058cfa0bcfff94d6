"""A small bundle written by hand: one pooled linear layer over 4 x 4 grey images, two classes."""

import ctypes
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kdedge_device.preprocess import Preprocess

from .fake_tensorrt import World

PREPROCESS = Preprocess(4, 4, 1, "squash", (0.5,), (0.5,))


@pytest.fixture(autouse=True)
def _cache_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key that engines are signed with is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SUDO_UID", raising=False)


def linear_model(ir_version: int = 8, opset: int = 17, batch: object = "batch") -> bytes:
    """logits = (-m, m) for the mean m of the normalised pixels: class "dark" or "bright"."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], ["logits"], transB=1),
    ]
    weight = numpy_helper.from_array(np.array([[-1.0], [1.0]], np.float32), "weight")
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 1, 4, 4])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 2])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    return bytes(model.SerializeToString())


def entry(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def write_manifest(folder: Path, **changes: Any) -> None:
    document = {
        "schema": 1,
        "shipped": "fp32",
        "artifacts": {
            "fp32": {
                "file": "model.onnx",
                **entry(folder / "model.onnx"),
                "precision": "fp32",
                "golden_tolerance": 1e-5,
            }
        },
        "input": {"name": "input", "shape": ["batch", 1, 4, 4], "dtype": "float32", "layout": "NCHW"},
        "preprocess": PREPROCESS.to_json(),
        "classes": ["dark", "bright"],
        "files": {"golden.npz": entry(folder / "golden.npz")},
    }
    (folder / "manifest.json").write_text(json.dumps({**document, **changes}), encoding="utf-8")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(linear_model())
    images = np.stack([np.full((4, 4, 1), value, np.uint8) for value in (0, 60, 255)])
    means = PREPROCESS.normalize(images).mean((1, 2, 3))
    np.savez(folder / "golden.npz", images=images, logits__fp32=np.stack([-means, means], 1))
    write_manifest(folder)
    onnx.checker.check_model(str(folder / "model.onnx"))
    return folder


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libcuda.so.1, a driver that works on malloc'ed memory (fake_cuda.c)."""
    compiler = shutil.which("gcc")
    assert compiler, "gcc is not on PATH; install it (apt-get install gcc): the CUDA calls are tested on a fake driver"
    folder = tmp_path_factory.mktemp("cuda")
    source = Path(__file__).with_name("fake_cuda.c")
    command = [compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-O1", "-o", str(folder / "libcuda.so.1"), str(source)]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def world(fake_cuda: Path) -> Iterator[World]:
    """A machine for the fake TensorRT; whatever is allocated on it has to be freed."""
    library = ctypes.CDLL(str(fake_cuda / "libcuda.so.1"))
    library.fake_host.restype = ctypes.c_void_p
    yield World(cuda=library)
    assert library.fake_live() == 0, "something was not freed"


@pytest.fixture
def trt_bundle_folder(bundle: Path) -> Path:
    """The bundle with every file that an engine is built from."""
    from .trt_world import complete  # which is made of what stands above

    return complete(bundle)
