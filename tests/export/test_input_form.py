"""uint8 pixels in front of every file: the logits of the normalised input, and a bundle of such files works."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from PIL import Image

from kdedge.errors import BugError
from kdedge_device.evaluate import logits_of
from kdedge_device.preprocess import Preprocess
from kdedge_device.runners import OrtRunner
from kdedge_export.bundle import golden_tolerance, write_golden, write_manifest
from kdedge_export.calibration.calibrate import calibrate
from kdedge_export.calibration.ranges import make_table, measured
from kdedge_export.cpu.plan import make_plan
from kdedge_export.cpu.qdq import write_int8
from kdedge_export.float_form.input_form import with_uint8_input
from kdedge_export.float_form.onnx_import import import_onnx
from kdedge_export.pyz import build_pyz
from kdedge_export.sessions import open_session, run_onnx
from kdedge_export.table import RangeTable, natural_weight_scales
from kdedge_export.trt.fp16 import write_fp16
from kdedge_export.trt.plan import make_trt_plan
from kdedge_export.trt.qdq import write_trt
from kdedge_export.trt.typed import write_trt_fp16

from .conftest import images
from .foreign_files import classifier, node, saved, weights

P = Preprocess(8, 8, 3, "squash", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PIXELS = images(40, px=8)
COLOURS = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 1, 127, 255)])


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """Two convolutions; the first pads, and its weights differ from colour to colour."""
    nodes = [node("Conv", "x first", "early", pads=[1, 1, 1, 1]), node("Relu", "early", "active")]
    constants = {"first": weights(16, 3, 3, 3), "w": weights(8, 16, 3, 3)}
    return import_onnx(saved(classifier(nodes, "active", constants=constants), tmp_path_factory.mktemp("m"))).model


@pytest.fixture(scope="module")
def files(float_file: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
    plan = make_plan(float_file)
    trt_plan = make_trt_plan(float_file)
    histograms = calibrate(float_file, sorted({*measured(plan), *trt_plan.measured}), PIXELS, P)
    spans = {name: (min(0.0, each.low), max(0.0, each.high)) for name, each in histograms.items()}
    trt_table = RangeTable(spans, natural_weight_scales(float_file, trt_plan.weighted))
    return {
        "fp32": float_file,
        "int8": write_int8(float_file, plan, make_table("minmax", float_file, plan, histograms)),
        "fp16": write_fp16(float_file),
        "trt": write_trt(float_file, trt_plan, trt_table),
        "trt-fp16": write_trt_fp16(float_file, trt_plan, trt_table),
    }


@pytest.mark.parametrize("name", ["fp32", "int8", "fp16", "trt", "trt-fp16"])
def test_every_file_says_the_same_of_pixels(name: str, files: dict[str, onnx.ModelProto]) -> None:
    model = files[name]
    form = with_uint8_input(model, P)
    pixels = np.concatenate([PIXELS, COLOURS])
    expected = run_onnx(model.SerializeToString(), P.normalize(pixels), optimize=False)
    # A pixel may meet the border between two codes exactly, and then the last digit decides; none of these does.
    tolerance = 1e-5 if name in ("fp32", "int8", "trt") else 2e-3
    for count in (1, len(pixels)):
        found = open_session(form.SerializeToString(), optimize=False).run(None, {"input": pixels[:count]})[0]
        np.testing.assert_allclose(found, expected[:count], atol=tolerance * float(np.abs(expected).max()))
    optimized = open_session(form.SerializeToString()).run(None, {"input": pixels})[0]
    np.testing.assert_allclose(optimized, expected, atol=0.05 * float(np.ptp(expected)))


def test_the_interface(files: dict[str, onnx.ModelProto]) -> None:
    before = files["int8"].SerializeToString()
    form = with_uint8_input(files["int8"], P)
    assert files["int8"].SerializeToString() == before, "the file itself is left alone"
    (source,) = form.graph.input
    dims = source.type.tensor_type.shape.dim
    assert (source.name, source.type.tensor_type.elem_type) == ("input", TensorProto.UINT8)
    assert (dims[0].dim_param, [dim.dim_value for dim in dims[1:]]) == ("batch", [8, 8, 3])
    assert form.graph.output == files["int8"].graph.output
    assert (form.ir_version, form.opset_import) == (files["int8"].ir_version, files["int8"].opset_import)
    assert form.metadata_props == files["int8"].metadata_props
    first = form.graph.node[0]
    assert (first.op_type, list(first.input)) == ("Cast", ["input"]), "TensorRT casts uint8 at once, or not at all"
    readers = [each for each in form.graph.node if "input" in each.input]
    assert readers == [first]


def test_padding_is_the_mean_colour(float_file: onnx.ModelProto) -> None:
    """The subtraction stands in front of the padding: folded into weights and bias it would darken the border."""
    kinds = [each.op_type for each in with_uint8_input(float_file, P).graph.node][:5]
    assert kinds == ["Cast", "Transpose", "Sub", "Mul", "Conv"]


def test_an_image_that_is_not_square_and_grey(tmp_path: Path) -> None:
    model = classifier(constants={"w": weights(8, 1, 3, 3)}, shape=("n", 1, 6, 10))
    imported = import_onnx(saved(model, tmp_path)).model
    grey = Preprocess(6, 10, 1, "squash", (0.3,), (0.2,))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 10, 1), dtype=np.uint8)
    expected = run_onnx(imported.SerializeToString(), grey.normalize(pixels))
    form = with_uint8_input(imported, grey)
    found = open_session(form.SerializeToString()).run(None, {"input": pixels})[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(BugError, match=r"takes images of \[1, 6, 10\]"):
        with_uint8_input(imported, P)


@pytest.fixture(scope="module")
def bundle(files: dict[str, onnx.ModelProto], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    logits = {}
    for name, file in (("fp32", "model.onnx"), ("int8", "model.int8.onnx")):
        (folder / file).write_bytes(with_uint8_input(files[name], P).SerializeToString())
        with OrtRunner(folder / file) as runner:
            assert runner.takes_pixels
            assert runner.input_shape[1:] == [8, 8, 3]
            logits[name] = logits_of(runner, P, PIXELS[:8])
    write_golden(folder / "golden.npz", PIXELS[:8], logits)
    build_pyz(folder / "run.pyz")
    artifacts = {name: {"golden_tolerance": golden_tolerance(name, each)} for name, each in logits.items()}
    write_manifest(folder, artifacts, P, tuple("abcde"), "int8", {}, {})
    return folder


def run(bundle: Path, *arguments: str) -> dict[str, object]:
    command = [sys.executable, str(bundle / "run.pyz"), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=bundle.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, object] = json.loads(done.stdout)
    return document


def test_a_bundle_of_such_files(bundle: Path, files: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    """run.pyz feeds pixels where the file takes them: check, bench, eval and predict."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["input"] == {"name": "input", "shape": ["batch", 8, 8, 3], "dtype": "uint8", "layout": "NHWC"}
    golden = run(bundle, "check")["golden"]
    assert isinstance(golden, dict)
    assert {name: each["same_class"] for name, each in golden.items()} == {"fp32": 1.0, "int8": 1.0}
    record = run(bundle, "bench", "--seconds", "0", "--runs", "3")
    assert record["conditions"]["input_shape"] == [1, 8, 8, 3]  # type: ignore[index]
    bare = tmp_path / "bare.onnx"
    bare.write_bytes((bundle / "model.int8.onnx").read_bytes())
    record = run(bundle, "bench", str(bare), "--seconds", "0", "--runs", "3")
    assert record["conditions"]["inputs"] == "random numbers"  # type: ignore[index]

    expected = run_onnx(files["int8"].SerializeToString(), P.normalize(PIXELS)).argmax(1)
    np.savez(tmp_path / "set.npz", images=PIXELS, labels=expected)
    assert run(bundle, "eval", "--data", str(tmp_path / "set.npz"))["accuracy"] == 1.0
    Image.fromarray(PIXELS[0]).save(tmp_path / "one.png")
    (answer,) = run(bundle, "predict", str(tmp_path / "one.png"))["predictions"]  # type: ignore[misc]
    assert answer["class"] == "abcde"[expected[0]]
