"""The model files of a bundle, each written from the same numbers in the form that its runtime wants, and checked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import onnx

from kdedge.errors import ExportError
from kdedge_device.preprocess import Preprocess
from kdedge_export.bundle import ARTIFACTS
from kdedge_export.cpu.cpu_form import trt_form
from kdedge_export.cpu.lint import require_clean
from kdedge_export.float_form.input_form import with_uint8_input
from kdedge_export.quantize import Quantized
from kdedge_export.sessions import open_session
from kdedge_export.trt.emulate import emulator
from kdedge_export.trt.lint import lint_trt
from kdedge_export.trt.plan import TrtPlan, make_trt_plan
from kdedge_export.trt.qdq import write_trt
from kdedge_export.trt.typed import write_trt_fp16

__all__ = ["Files", "TensorRt", "make_tensorrt"]

Batch = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorRt:
    """Both INT8 files for TensorRT, and the plan they are written by. `typed` None: FP16 or opset 20 cannot hold it."""

    plan: TrtPlan
    weak: onnx.ModelProto
    typed: onnx.ModelProto | None
    why_untyped: str = ""

    def to_json(self, quantized: Quantized) -> dict[str, Any]:
        """What quantization.json says of them: their scales are those of the one table."""
        scales = self.plan.scales(quantized.numbers.table)
        return {"layers": sorted(self.plan.layers), "scales": scales, "kept_float": self.plan.kept_float}


def make_tensorrt(quantized: Quantized, lost: Callable[[onnx.ModelProto], tuple[float, float]]) -> TensorRt:
    """From the numbers of the CPU file. Layers that it needs in float for its accuracy stay in float here too.

    Fewer tensors are rounded here and others, so biases that make up for the CPU file's rounding may not suit: of the
    float models before and after, that is taken which loses less. `lost(file)`: points on the gate images, divergence.
    """
    numbers, found = quantized.numbers, []
    for made_of in (quantized.made_of, numbers.reference):
        model = trt_form(made_of)
        plan = make_trt_plan(model, quantized.left_for_accuracy)
        weak = write_trt(model, plan, numbers.table)
        found.append((lost(weak), model, plan, weak))
        if numbers.reference is quantized.made_of:
            break
    _, model, plan, weak = min(found, key=lambda each: each[0])
    kept = frozenset(plan.kept_float)
    require_clean(lint_trt(weak, "trt", kept), ARTIFACTS["trt"].file)
    try:
        typed = write_trt_fp16(model, plan, numbers.table)
    except ExportError as error:
        return TensorRt(plan, weak, None, str(error))
    require_clean(lint_trt(typed, "trt-fp16", kept), ARTIFACTS["trt-fp16"].file)
    return TensorRt(plan, weak, typed)


@final
class Files:
    """The files of a bundle by the names of their artifacts, as they were written, still with a float32 input.

    On disk they take uint8 pixels where that was asked for; the two compute the same.
    """

    def __init__(self, folder: Path, preprocess: Preprocess, *, uint8_input: bool, threads: int) -> None:
        self.folder, self.preprocess = folder, preprocess
        self.uint8_input, self.threads = uint8_input, threads
        self.models: dict[str, onnx.ModelProto] = {}

    @property
    def names(self) -> list[str]:
        return list(self.models)

    @property
    def runnable(self) -> list[str]:
        """Those that ONNX Runtime runs; the others are for an engine."""
        return [name for name in self.models if ARTIFACTS[name].runtime == "onnxruntime"]

    def path(self, name: str) -> Path:
        return self.folder / ARTIFACTS[name].file

    def write(self, name: str, model: onnx.ModelProto) -> None:
        self.models[name] = model
        final_form = with_uint8_input(model, self.preprocess) if self.uint8_input else model
        self.path(name).write_bytes(final_form.SerializeToString())

    def runner(self, name: str) -> Callable[[Batch], Batch]:
        """Logits [N, K] of float32 [N, C, H, W]; of a file for TensorRT, as a device would compute them."""
        content, threads = self.models[name].SerializeToString(), self.threads
        if name not in self.runnable:
            return emulator(content, threads)
        session = open_session(content, threads)
        entry = session.get_inputs()[0].name
        return lambda batch: np.asarray(session.run(None, {entry: batch})[0])
