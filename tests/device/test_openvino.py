"""The runner of OpenVINO, over a stand-in for it: the real one is not among the packages that tests may need.

Tried by hand with OpenVINO 2026.4: `run.pyz bench | eval --runtime openvino` of a bundle, FP32 and INT8.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kdedge_device.bench_subject import open_subject, runner_of
from kdedge_device.failures import CorruptFailure, Failure, RuntimeFailure
from kdedge_device.openvino_runner import OpenVinoRunner, artifact_for_openvino


class Size:
    def __init__(self, length: int | None) -> None:
        self.is_static, self._length = length is not None, length

    def get_length(self) -> int | None:
        return self._length


class Model:
    """Sums each image; takes float32 [open, 1, 2, 2]."""

    def __init__(self) -> None:
        self.shape: list[int] | None = None

    def input(self, place: int) -> Any:
        kind = SimpleNamespace(to_dtype=lambda: np.dtype(np.float32))
        return SimpleNamespace(partial_shape=[Size(None), Size(1), Size(2), Size(2)], element_type=kind)

    def reshape(self, shape: list[int]) -> None:
        self.shape = shape


class Core:
    compiled: list[tuple[Any, ...]]

    def read_model(self, path: str) -> Model:
        if Path(path).read_bytes() == b"broken":
            raise RuntimeError("Check 'false' failed:\n no protobuf")
        return Model()

    def compile_model(self, model: Model, device: str, settings: dict[str, Any]) -> Any:
        Core.compiled.append((model.shape, device, settings))
        buffer = np.zeros((model.shape or [0])[0], np.float32)[:, None]

        def infer(inputs: list[Any], share_inputs: bool) -> dict[int, Any]:
            if list(inputs[0].shape) != model.shape:
                raise RuntimeError("another shape")
            buffer[:, 0] = inputs[0].sum((1, 2, 3))
            return {0: buffer}

        return SimpleNamespace(create_infer_request=lambda: SimpleNamespace(infer=infer))


@pytest.fixture(autouse=True)
def openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    Core.compiled = []
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core, __version__="2026.4.1-22345-abc"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"fine")
    return path


def test_a_batch_of_each_size_is_compiled_once(model: Path) -> None:
    images = np.arange(24, dtype=np.float32).reshape(6, 1, 2, 2)
    with OpenVinoRunner(model, threads=2) as runner:
        assert (runner.input_shape, runner.takes_pixels, runner.version) == (["?", 1, 2, 2], False, "2026.4.1")
        found = [runner.run(images[:1]), runner.run(images[1:2]), runner.run(images[:4]), runner.run(images[2:])]
    sums = images.sum((1, 2, 3))[:, None]
    for got, wanted in zip(found, (sums[:1], sums[1:2], sums[:4], sums[2:]), strict=True):
        np.testing.assert_array_equal(got, wanted, "the buffer of the runtime is used again by the next call")
    assert [shape for shape, _, _ in Core.compiled] == [[1, 1, 2, 2], [4, 1, 2, 2]]
    (_, device, settings) = Core.compiled[0]
    assert device == "CPU"
    assert settings == {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2, "PERFORMANCE_HINT": "LATENCY"}


def test_what_is_wrong_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Failure, match="0 threads"):
        OpenVinoRunner(model, 0)
    runner = OpenVinoRunner(model)
    with pytest.raises(Failure, match="is not open; use it in a with statement"):
        runner.run(np.zeros((1, 1, 2, 2), np.float32))
    with pytest.raises(Failure, match="does not exist"), OpenVinoRunner(model.with_name("absent.onnx")):
        pass
    model.write_bytes(b"broken")
    with pytest.raises(
        CorruptFailure, match=r"OpenVINO 2026\.4\.1 cannot run .*net\.onnx: Check 'false' failed: no proto"
    ):
        runner.__enter__()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(RuntimeFailure, match="pip install openvino"):
        OpenVinoRunner(model).__enter__()


def test_int8_is_the_file_whose_scales_it_reads() -> None:
    def bundle(*artifacts: str) -> Any:
        def artifact(name: str | None) -> str:
            chosen = name or "int8"
            if chosen not in artifacts:
                raise Failure(f"no artifact '{chosen}'")
            return chosen

        return SimpleNamespace(path="net", artifacts={key: {} for key in artifacts}, artifact=artifact)

    whole = bundle("fp32", "int8", "trt")
    assert [artifact_for_openvino(whole, name) for name in (None, "int8", "fp32", "trt")] == [
        "trt",
        "trt",
        "fp32",
        "trt",
    ]
    with pytest.raises(Failure, match="has no INT8 file for OpenVINO"):
        artifact_for_openvino(bundle("fp32"), "int8")
    with pytest.raises(Failure, match="no artifact 'fp16'"):
        artifact_for_openvino(whole, "fp16")


def test_a_file_is_measured_with_it(model: Path) -> None:
    subject = open_subject(str(model), openvino=True)
    assert subject.openvino
    assert isinstance(runner_of(subject, 3), OpenVinoRunner)
    assert not isinstance(runner_of(open_subject(str(model))), OpenVinoRunner)
