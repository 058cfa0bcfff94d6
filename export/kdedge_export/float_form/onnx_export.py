"""torch -> ONNX: torch's current exporter at opset 18, then our own rewrite to opset 17 and IR 8 (`rewrite.py`).

Asked for opset 17 the exporter logs a traceback and writes 18 all the same, hence the detour.
N is the batch, C, H, W the input's channels, height and width, K the classes.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from kdedge.errors import BugError, ExportError
from kdedge_device.preprocess import Preprocess
from kdedge_export.float_form.rewrite import to_opset_17
from kdedge_export.sessions import run_onnx

__all__ = ["INPUT", "OUTPUT", "Verification", "export_float", "verify"]

INPUT, OUTPUT = "input", "logits"
MAX_BATCH = 65536  # a bound is required for a dynamic axis; nothing is allocated for it


def export_float(module: nn.Module, preprocess: Preprocess, classes: Sequence[str]) -> onnx.ModelProto:
    """`module` in eval mode as ONNX: "input" float32 [batch, C, H, W] -> "logits" float32 [batch, K].

    Batch normalisation is folded into the convolutions. Preprocessing and classes are noted inside the file.
    Raises ExportError where torch cannot trace the module or an operator has no form in opset 17.
    """
    shape = (
        2,
        preprocess.channels,
        preprocess.height,
        preprocess.width,
    )  # 2, since torch takes a batch of 1 for constant
    try:
        with _silenced():
            program = torch.onnx.export(
                module.eval(),
                (torch.zeros(shape),),
                dynamo=True,
                opset_version=18,
                external_data=False,
                optimize=True,
                verbose=False,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},),
                input_names=[INPUT],
                output_names=[OUTPUT],
            )
            if program is None:
                raise BugError("torch.onnx.export returned nothing")
            model: onnx.ModelProto = program.model_proto
    except BugError:
        raise
    except Exception as error:  # the exporter raises its own and everybody else's exceptions
        raise ExportError(
            f"torch cannot export this model to ONNX: {_first_line(error)}. "
            "A network of convolutions and linear layers without branches on the values of its input was expected."
        ) from error
    model = to_opset_17(model)
    note = {"preprocess": preprocess.to_json(), "classes": list(classes)}
    model.metadata_props.add(key="kdedge", value=json.dumps(note, ensure_ascii=False))
    onnx.checker.check_model(model, full_check=True)
    return model


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """The exporter tells its progress on standard output and warns of its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Verification(dict[str, float]):
    """max_abs_difference, tolerance, same_class (fraction), images."""


def verify(
    module: nn.Module, model: onnx.ModelProto, batch: npt.NDArray[np.float32], relative: float = 1e-3
) -> Verification:
    """Compare the file with the module by value on real images, float32 [N, C, H, W], one at a time and all at once.

    The tolerance is `relative` times the largest logit: folding batch normalisation and another order of sums move the
    last digits. ExportError where a logit is further off, or where a class differs that was no tie.
    """
    with torch.inference_mode():
        expected = module.eval()(torch.from_numpy(batch)).float().numpy()
    content = model.SerializeToString()
    found = run_onnx(content, batch)
    single = np.concatenate([run_onnx(content, batch[i : i + 1]) for i in range(min(2, len(batch)))])
    difference = float(np.abs(found - expected).max())
    difference = max(difference, float(np.abs(single - expected[: len(single)]).max()))
    tolerance = relative * float(np.abs(expected).max())
    top = np.sort(expected, axis=1)
    decided = (top[:, -1] - top[:, -2] > 2 * tolerance) if expected.shape[1] > 1 else np.ones(len(expected), bool)
    same = found.argmax(1) == expected.argmax(1)
    if not difference <= tolerance or not same[decided].all():
        raise ExportError(
            f"The ONNX file differs from the torch model by {difference:.3g} on {len(batch)} images (same class for "
            f"{same.mean():.1%}); at most {tolerance:.3g} was expected. Please report this model: the export is wrong."
        )
    return Verification(
        max_abs_difference=difference, tolerance=tolerance, same_class=float(same.mean()), images=len(batch)
    )
