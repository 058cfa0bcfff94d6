"""The device's numerics on a CPU."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kdedge.errors import ExportError
from kdedge_export.sessions import run_onnx
from kdedge_export.trt.emulate import emulate, openvino_emulator
from kdedge_export.trt.qdq import write_trt

from .conftest import SMALL, images
from .trt_toys import make_toy


def test_batches_do_not_change_a_logit() -> None:
    _, model, plan, table = make_toy()
    content = write_trt(model, plan, table).SerializeToString()
    batch = SMALL.normalize(images(35))
    found = emulate(content, batch)
    assert found.shape == (35, 10)
    alone = np.concatenate([run_onnx(content, batch[i : i + 1], optimize=False) for i in range(35)])
    assert np.abs(found - alone).max() <= 1e-4 * np.abs(alone).max()


def stand_in(monkeypatch: pytest.MonkeyPatch, seen: dict[str, Any]) -> None:
    """openvino's calls: the real one is no dependency."""

    class Core:
        def read_model(self, model: bytes) -> list[bytes]:
            if not model:
                raise RuntimeError("Unable to read\nthe model")
            return [model]

        def compile_model(self, model: list[bytes], device: str, options: dict[str, Any]) -> Any:
            seen.update(options, device=device, content=model[0])
            return Compiled()

    class Compiled:
        def input(self, place: int) -> SimpleNamespace:
            batch = SimpleNamespace(is_dynamic=True)
            sizes = [SimpleNamespace(is_dynamic=False, get_length=lambda size=size: size) for size in (3, 2, 2)]
            kind = SimpleNamespace(to_dtype=lambda: np.dtype(np.float32))
            return SimpleNamespace(partial_shape=[batch, *sizes], element_type=kind)

        def __call__(self, batch: np.ndarray) -> list[np.ndarray]:  # type: ignore[type-arg]
            seen["shapes"] = [*seen.get("shapes", []), batch.shape]
            return [batch.sum((1, 2, 3))[:, None]]

    module = ModuleType("openvino")
    module.__spec__ = ModuleSpec("openvino", None)
    module.Core = Core  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openvino", module)


def test_openvino_runs_at_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    stand_in(monkeypatch, seen)
    run = openvino_emulator(b"model", threads=3)
    assert run is not None
    assert run(np.ones((20, 3, 2, 2), np.float32)).tolist() == [[12.0]] * 20
    assert (seen["device"], seen["content"], seen["INFERENCE_PRECISION_HINT"]) == ("CPU", b"model", "f32")
    assert seen["INFERENCE_NUM_THREADS"] == 3
    assert seen["shapes"][0] == (1, 3, 2, 2), "tried once, before it is needed"


def test_a_file_that_openvino_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, {})
    with pytest.raises(ExportError, match=r"OpenVINO cannot run the file for TensorRT: Unable to read the model\. "):
        openvino_emulator(b"")


def test_openvino_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert openvino_emulator(b"") is None
