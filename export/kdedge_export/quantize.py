"""Float ONNX -> INT8 ONNX: calibrate once, write a candidate for each calibrator, keep the one nearest to FP32.

The choice is made on the gate split: fewest images given another class, then the smaller divergence of the outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from kdedge_device.preprocess import Preprocess
from kdedge_export.calibrate import Histogram, calibrate
from kdedge_export.gate import Agreement, agreement
from kdedge_export.graph import Graph
from kdedge_export.images import Part
from kdedge_export.lint import lint_int8, require_clean
from kdedge_export.plan import Plan, make_plan
from kdedge_export.qdq import write_int8
from kdedge_export.ranges import CALIBRATORS, make_table
from kdedge_export.table import RangeTable

__all__ = ["Quantized", "quantize"]

SCHEMA = 1
Say = Callable[[str], None]


@dataclass(frozen=True)
class Quantized:
    """The chosen INT8 model, how it agrees with FP32 on the gate images, its logits there, and quantization.json."""

    model: onnx.ModelProto
    agreement: Agreement
    gate_fp32: npt.NDArray[np.float32]
    gate_int8: npt.NDArray[np.float32]
    document: dict[str, Any]


def quantize(
    model: onnx.ModelProto, preprocess: Preprocess, calibration: Part, gate: Part, folder: Path, threads: int, say: Say
) -> Quantized:
    """Candidates are written into `folder`, which holds model.onnx. DataError without images to calibrate on."""
    plan, graph = make_plan(model), Graph(model)
    measured = [name for name in plan.tensors if name not in plan.same_scale]
    say(f"Calibrating {len(measured)} tensors on {len(calibration)} images ({calibration.name})")
    histograms = calibrate(model, measured, calibration.load(preprocess), preprocess, threads)
    tables = {name: make_table(name, model, plan, histograms) for name in CALIBRATORS}
    models: dict[str, onnx.ModelProto] = {}
    for name, table in tables.items():
        models[name] = write_int8(model, plan, table)
        require_clean(lint_int8(models[name], frozenset(plan.kept_float)), f"the INT8 file of calibrator {name}")
        (folder / f"candidate-{name}.onnx").write_bytes(models[name].SerializeToString())
    files = [folder / "model.onnx", *(folder / f"candidate-{name}.onnx" for name in models)]
    fp32, *logits = gate.logits(files, preprocess, threads)
    found = {name: agreement(fp32, each, gate.labels) for name, each in zip(models, logits, strict=True)}
    chosen = min(found, key=lambda name: _badness(found[name]))
    for file in files[1:]:
        file.unlink()
    document = _document(chosen, found, plan, graph, tables[chosen], histograms, calibration)
    gate_int8 = dict(zip(models, logits, strict=True))[chosen]
    return Quantized(models[chosen], found[chosen], fp32, gate_int8, document)


def _badness(found: Agreement) -> tuple[float, float]:
    """Without gate images all candidates are equal, and the first, min-max, is taken."""
    return found.drop_points or 0.0, found.divergence or 0.0


def _document(
    chosen: str,
    found: Mapping[str, Agreement],
    plan: Plan,
    graph: Graph,
    table: RangeTable,
    histograms: Mapping[str, Histogram],
    calibration: Part,
) -> dict[str, Any]:
    document = table.to_json()
    for name, entry in document["tensors"].items():
        seen = histograms[plan.same_scale.get(name, name)]
        entry |= {"seen_low": seen.low, "seen_high": seen.high, "same_as": plan.same_scale.get(name)}
    operators = {node.name: node for node in graph.nodes}
    layers = {
        name: {
            "operator": operators[name].op_type,
            "input": operators[name].input[0],
            **document["layers"].get(name, {}),
        }
        for name in sorted(plan.layers)
    }
    return {
        "schema": SCHEMA,
        "calibrator": chosen,
        "candidates": {name: asdict(each) for name, each in found.items()},
        "chosen_on": "gate",
        "images": {"from": calibration.name, "count": len(calibration), "sha256": calibration.sha256},
        "form": "u8: q = clamp(round(x / scale) + zero_point, 0, 255); s8: q = clamp(round(x / scale), -128, 127); "
        "weights: int8 = round(w / scale), per output channel",
        "tensors": document["tensors"],
        "layers": layers,
        "kept_float": plan.kept_float,
    }
