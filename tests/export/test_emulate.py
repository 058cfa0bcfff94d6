"""The device's numerics on a CPU."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kdedge.errors import MissingPackage
from kdedge_export.sessions import run_onnx
from kdedge_export.trt.emulate import emulate, emulate_openvino
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


def test_openvino_runs_at_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with openvino's calls: the real one is no dependency."""
    seen: dict[str, Any] = {}

    class Core:
        def read_model(self, model: bytes) -> list[bytes]:
            return [model]

        def compile_model(self, model: list[bytes], device: str, options: dict[str, Any]) -> Any:
            seen.update(options, device=device, content=model[0])
            return lambda batch: [batch.sum((1, 2, 3))[:, None]]

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core))
    batch = np.ones((20, 3, 2, 2), np.float32)
    assert emulate_openvino(b"model", batch).tolist() == [[12.0]] * 20
    assert (seen["device"], seen["content"], seen["INFERENCE_PRECISION_HINT"]) == ("CPU", b"model", "f32")


def test_openvino_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingPackage, match="pip install openvino"):
        emulate_openvino(b"", np.zeros((1, 3, 2, 2), np.float32))
