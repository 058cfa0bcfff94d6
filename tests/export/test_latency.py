"""The gate's measurement is a child process, and its failures are told."""

from pathlib import Path

import onnx
import pytest
from torch import nn

from kdedge.errors import DeviceError
from kdedge_export.latency import measure_alone, speedup

SHORT = ("--seconds", "0", "--runs", "20")


def test_a_child_process_measures(mobilenet_v2: tuple[nn.Module, onnx.ModelProto], tmp_path: Path) -> None:
    path = tmp_path / "a path with spaces.onnx"
    path.write_bytes(mobilenet_v2[1].SerializeToString())
    found = measure_alone(path, 2, SHORT)
    assert found["conditions"]["threads"] == 2
    assert found["latency_ms"]["compute"]["count"] == 20
    assert found["artifact"]["file"] == path.name


def test_what_the_child_says_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"Measuring absent\.onnx failed with exit code 2: .*does not exist"):
        measure_alone(tmp_path / "absent.onnx", 1, SHORT)
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(DeviceError, match="exit code 5"):
        measure_alone(tmp_path / "text.onnx", 1, SHORT)
    with pytest.raises(DeviceError, match=r"exit code 2: .*unrecognized arguments"):
        measure_alone(tmp_path / "text.onnx", 1, ("--fly",))


def test_speedup() -> None:
    slow, fast = ({"latency_ms": {"compute": {"p50": value}}} for value in (3.0, 2.0))
    assert speedup(slow, fast) == 1.5
