"""A bundle holds files for runtimes that this machine has not: they are hashed, and never run by the wrong one."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from kdedge_device.check import check
from kdedge_device.choose_runner import open_runner
from kdedge_device.evaluate import evaluate, predict
from kdedge_device.failures import CorruptFailure, RuntimeFailure
from kdedge_device.manifest import Bundle

from .conftest import entry, write_manifest


@pytest.fixture
def mixed(bundle: Path) -> Path:
    """With a file for TensorRT and one for a runtime nobody knows; golden logits that ONNX Runtime would not give."""
    artifacts = {"fp32": {"file": "model.onnx", "precision": "fp32", "golden_tolerance": 1e-5}}
    for name, runtime in (("trt", "tensorrt"), ("odd", "abacus")):
        shutil.copyfile(bundle / "model.onnx", bundle / f"model.{name}.onnx")
        artifacts[name] = {
            "file": f"model.{name}.onnx",
            "precision": "int8",
            "runtime": runtime,
            "golden_tolerance": 1e-5,
        }
    with np.load(bundle / "golden.npz") as arrays:
        images, logits = arrays["images"], arrays["logits__fp32"]
    np.savez(bundle / "golden.npz", images=images, logits__fp32=logits, logits__trt=logits + 9, logits__odd=logits)
    write_manifest(
        bundle, artifacts={name: {**each, **entry(bundle / each["file"])} for name, each in artifacts.items()}
    )
    return bundle


def test_check_hashes_them_and_says_what_they_need(mixed: Path) -> None:
    found = check(Bundle(mixed))
    assert list(found["golden"]) == ["fp32"]
    assert {"model.trt.onnx", "model.odd.onnx"} <= set(found["files"])
    assert found["not_run"] == {
        "odd": "it needs abacus",
        "trt": "it needs TensorRT and an engine, which `python run.pyz build` makes",
    }
    content = (mixed / "model.trt.onnx").read_bytes()
    (mixed / "model.trt.onnx").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptFailure, match=r"model\.trt\.onnx has sha256"):
        check(Bundle(mixed))


def test_they_are_not_run_by_onnx_runtime(mixed: Path) -> None:
    np.savez(mixed / "eval.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros(2, np.int64))
    for call in (
        lambda: predict(Bundle(mixed), [], "trt"),
        lambda: evaluate(Bundle(mixed), str(mixed / "eval.npz"), "trt"),
        lambda: open_runner(Bundle(mixed), "trt"),
    ):
        with pytest.raises(RuntimeFailure, match=r"'trt' cannot be run by ONNX Runtime: it needs TensorRT.*runs: fp32"):
            call()
    assert evaluate(Bundle(mixed), str(mixed / "eval.npz"))["accuracy"] == 1.0


def test_a_bundle_with_nothing_else_has_nothing_left_out(bundle: Path) -> None:
    assert check(Bundle(bundle))["not_run"] == {}
