"""A layer of a projection head that stays before the classifier: linear, batch norm, ReLU, linear, in every file."""

from collections import Counter
from pathlib import Path

from kdedge.models.zoo import ModelSpec, build, num_params, projection_layer
from kdedge_device.preprocess import Preprocess
from kdedge_export.calibration.calibrate import calibrate
from kdedge_export.calibration.ranges import make_table, measured
from kdedge_export.cpu.cpu_form import cpu_form
from kdedge_export.cpu.lint import lint_float, lint_int8
from kdedge_export.cpu.plan import make_plan
from kdedge_export.cpu.qdq import write_int8
from kdedge_export.float_form.onnx_export import export_float, verify
from kdedge_export.sessions import run_onnx

from .conftest import CLASSES, taught_digits
from .test_int8 import fused, relative_rms

SPEC = ModelSpec("mobilenet-v2", classes=10, channels=1, width=0.25, halvings=2, neck=1)
DIGITS = Preprocess(8, 8, 1, "squash", (0.3,), (0.38,))


def test_a_kept_projection_layer_is_exported_and_quantized(tmp_path: Path) -> None:
    # Taught: in random weights its batch norm magnifies what hardly differs, and every rounding with it.
    module, source, splits = taught_digits(SPEC, DIGITS)
    pixels = source.load(splits.test[:128], DIGITS).permute(0, 2, 3, 1).numpy()
    calibration = source.load(splits.calibration[:128], DIGITS).permute(0, 2, 3, 1).numpy()
    batch = DIGITS.normalize(pixels)
    exported = export_float(module.eval(), DIGITS, CLASSES)
    assert lint_float(exported) == []
    assert verify(module, exported, batch, relative=1e-4)["same_class"] == 1.0
    assert [node.op_type for node in exported.graph.node][-3:] == ["Gemm", "Relu", "Gemm"]

    model = cpu_form(exported)
    plan = make_plan(model)
    assert plan.kept_float == {}
    table = make_table("minmax", model, plan, calibrate(model, measured(plan), calibration, DIGITS))
    int8 = write_int8(model, plan, table)
    assert lint_int8(int8) == []
    expected = run_onnx(model.SerializeToString(), batch)
    for optimize in (True, False):
        found = run_onnx(int8.SerializeToString(), batch, optimize=optimize)
        assert relative_rms(found, expected) <= 0.2
        assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.9  # forty steps of training: many are close
    after = Counter(fused(int8, tmp_path))
    assert after["QGemm"] == 2
    assert not set(after) & {"Gemm", "Relu", "BatchNormalization"}


def test_its_parameters_count() -> None:
    module = build(SPEC)
    features = module.head.in_features
    without = num_params(build(ModelSpec("mobilenet-v2", classes=10, channels=1, width=0.25, halvings=2)))
    assert num_params(module) - without == num_params(projection_layer(features)) == features**2 + 2 * features
