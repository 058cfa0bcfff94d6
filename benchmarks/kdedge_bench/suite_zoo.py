"""A network of the zoo as a bundle, for its speed alone: batch normalisation has seen images, nothing has learned.

Speed does not depend on weights. Quantized as `kdedge export` does it, but by min-max of a few drawn images.
"""

from pathlib import Path

import numpy as np
import onnx
import torch

from kdedge.models.zoo import ModelSpec, architecture, build
from kdedge_bench.int8_families import settled, smooth_images
from kdedge_bench.suite import Model, Suite
from kdedge_device.preprocess import Preprocess
from kdedge_export.bundle import ARTIFACTS, golden_tolerance, write_golden, write_manifest
from kdedge_export.calibration.calibrate import calibrate
from kdedge_export.calibration.ranges import choose_spans, measured
from kdedge_export.cpu.cpu_form import cpu_form, trt_form
from kdedge_export.cpu.plan import make_plan
from kdedge_export.cpu.qdq import write_int8
from kdedge_export.float_form.onnx_export import export_float
from kdedge_export.graph import Graph
from kdedge_export.pyz import build_pyz
from kdedge_export.sessions import run_onnx
from kdedge_export.table import RangeTable, natural_weight_scales
from kdedge_export.trt.fp16 import write_fp16
from kdedge_export.trt.plan import make_trt_plan
from kdedge_export.trt.qdq import write_trt

__all__ = ["zoo_bundle"]

IMAGES, GOLDEN = 16, 8
CLASSES = 1000


def zoo_bundle(model: Model, suite: Suite, folder: Path) -> Path:
    """`folder`, with the files that the suite's precisions and runtimes want. The same bytes on each call."""
    assert model.zoo is not None
    known, classes = architecture(model.zoo), model.classes or CLASSES
    px = model.px or known.standard_px
    preprocess = Preprocess(px, px, 3, "squash", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    seen = smooth_images(IMAGES, px, seed=0)
    torch.manual_seed(0)
    spec = ModelSpec(model.zoo, classes, width=model.width or 1.0, halvings=known.halvings)
    names = tuple(str(k) for k in range(classes))
    files = _files(export_float(settled(build(spec), preprocess, seen), preprocess, names), preprocess, seen, suite)
    folder.mkdir(parents=True)
    for name, made in files.items():
        (folder / ARTIFACTS[name].file).write_bytes(made.SerializeToString())
    golden = smooth_images(GOLDEN, px, seed=1)
    batch = preprocess.normalize(golden)
    logits = {
        name: np.concatenate([run_onnx(made.SerializeToString(), each[None]) for each in batch])
        for name, made in files.items()
        if ARTIFACTS[name].runtime == "onnxruntime"
    }
    write_golden(folder / "golden.npz", golden, logits)
    build_pyz(folder / "run.pyz")
    reference = logits["fp32"]
    artifacts = {name: {"golden_tolerance": golden_tolerance(name, logits.get(name, reference))} for name in files}
    provenance = {"arch": model.zoo, "weights": "random", "px": px}
    write_manifest(folder, artifacts, preprocess, names, "fp32", {"split": None, "images": 0}, provenance)
    return folder


def _files(
    model: onnx.ModelProto, preprocess: Preprocess, seen: "np.typing.NDArray[np.uint8]", suite: Suite
) -> dict[str, onnx.ModelProto]:
    files = {"fp32": model}
    if "fp16" in suite.precisions:
        files["fp16"] = write_fp16(model)
    if "int8" not in suite.precisions:
        return files
    form, symmetric = cpu_form(model), trt_form(model)
    plan, trt_plan = make_plan(form), make_trt_plan(symmetric)
    wanted = sorted({*measured(plan), *trt_plan.measured})
    histograms = calibrate(form, wanted, seen, preprocess)
    spans = choose_spans("minmax", plan, Graph(form), histograms)
    s8 = {name: (histograms[name].low, histograms[name].high) for name in trt_plan.measured}
    scales = natural_weight_scales(form, {*plan.layers, *trt_plan.weighted})
    table = RangeTable({**s8, **spans}, scales, s8)
    files["int8"] = write_int8(form, plan, table)
    if set(suite.runtimes) & {"tensorrt", "openvino"}:
        files["trt"] = write_trt(symmetric, trt_plan, table)
    return files
