"""A float CNN classifier trained elsewhere, in our canonical float form, proven by value against the file it came from.

The steps: read (`onnx_file`), one opset and one type, shape arithmetic computed and batch opened (`onnx_fold`),
canonical words (`canonical`, `affine`), opset 17 (`rewrite`). ONNX's own reference computes the constants, one node at
a time with its size known beforehand: ONNX Runtime's offline optimiser would change with its version, put operators of
its own into the graph, and allocate whatever a damaged file asks for.
B images, C, H, W the input's channels, height and width, K classes.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from kdedge.errors import ExportError
from kdedge_device.failures import Failure
from kdedge_device.preprocess import Preprocess
from kdedge_export.cpu.lint import lint_float
from kdedge_export.float_form.canonical import canonical
from kdedge_export.float_form.onnx_clean import inlined, one_opset, one_type
from kdedge_export.float_form.onnx_file import read_onnx, type_name
from kdedge_export.float_form.onnx_fold import PROBES, fold
from kdedge_export.float_form.onnx_input import Origin, find_input
from kdedge_export.float_form.onnx_trace import Traced, trace
from kdedge_export.float_form.rewrite import to_opset_17
from kdedge_export.graph import attribute, names_of, unique
from kdedge_export.sessions import open_session

__all__ = ["Imported", "import_onnx", "prove"]

INPUT, OUTPUT = "input", "logits"
_SHAPERS = ("Identity", "Dropout", "Cast", "CastLike", "Flatten", "Reshape", "Squeeze", "Unsqueeze")
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Imported:
    """`model`: "input" float32 [batch, C, H, W] -> "logits" float32 [batch, K], opset 17, IR 8.

    `preprocess` and `classes` where kdedge wrote the file, else None. `notes`: what was changed, a sentence each.
    `origin` is the file as it was, to compare with.
    """

    model: onnx.ModelProto
    preprocess: Preprocess | None
    classes: tuple[str, ...] | None
    notes: tuple[str, ...]
    origin: Origin

    @property
    def image(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = (dim.dim_value for dim in self.model.graph.input[0].type.tensor_type.shape.dim[1:])
        return channels, height, width

    @property
    def num_classes(self) -> int:
        return int(self.model.graph.output[0].type.tensor_type.shape.dim[1].dim_value)


def import_onnx(path: Path, px: int | None = None) -> Imported:
    """The model in `path`; `px` is the side of its input where the file leaves that open.

    ExportError, in a sentence, for anything that is not a whole float classifier of images, and where the result does
    not compute what the file computes.
    """
    original = read_onnx(path)
    origin = find_input(path, original, px)
    notes: list[str] = []
    model = one_type(inlined(original), notes)
    if origin.dtype not in ("float32", "float16"):  # ONNX Runtime has no such convolutions on a CPU
        origin = replace(origin, model=model, dtype="float32")
    model, traced = fold(origin.as_nchw(one_opset(path, model)), origin.image, origin.batch)
    model, tail = _without_softmax(model, traced, notes)
    model = _as_logits(path, model, traced, notes)
    model = to_opset_17(canonical(model, trace(model, (PROBES[0], *origin.image))))
    _name_ends(model)
    preprocess, classes = _own_note(original, model, origin.image, notes)
    _check(path, model)
    found = Imported(model, preprocess, classes, tuple(notes), replace(origin, tail=tail))
    prove(found, _pictures(origin.image))
    return found


def _without_softmax(model: onnx.ModelProto, traced: Traced, notes: list[str]) -> tuple[onnx.ModelProto, str]:
    """Take out a Softmax that ends the graph, be it that what follows only hands on its values."""
    makers = {name: node for node in model.graph.node for name in node.output}
    after, last = None, makers.get(model.graph.output[0].name)
    while last is not None and _hands_on(last, traced):
        after, last = last, makers.get(last.input[0])
    if last is None or last.op_type not in ("Softmax", "LogSoftmax"):
        return model, ""
    shape = traced.shapes[last.output[0]]
    if shape[attribute(last, "axis", -1)] != math.prod(shape[1:]):
        return model, ""  # not over all classes of an image
    if after is None:
        model.graph.output[0].name = last.input[0]
    else:
        after.input[0] = last.input[0]
    model.graph.node.remove(last)
    notes.append(f"Its last layer, {last.op_type}, is left out: logits are compared, and the classes are the same.")
    return model, last.op_type


def _hands_on(node: onnx.NodeProto, traced: Traced) -> bool:
    """Whether the output of `node` is its input, image by image, at most in another shape."""
    source, result = node.input[0] if node.input else "", node.output[0]
    same = traced.types.get(source) == traced.types.get(result) == TensorProto.FLOAT
    return same and node.op_type in _SHAPERS and traced.shapes[source][:1] == traced.shapes[result][:1]


def _as_logits(path: Path, model: onnx.ModelProto, traced: Traced, notes: list[str]) -> onnx.ModelProto:
    """One output [B, K]; [B, K, 1, 1] is made that."""
    result = model.graph.output[0]
    batch, *sizes = traced.shapes[result.name] or (0,)
    kind = traced.types[result.name]
    if (
        batch != PROBES[0]
        or not sizes
        or any(size != 1 for size in sizes[1:])
        or sizes[0] < 2
        or kind != TensorProto.FLOAT
    ):
        written = ["batch" if batch == PROBES[0] else batch, *sizes]
        raise ExportError(
            f"The output {result.name} of {path} is {type_name(kind)} {written}; logits of at "
            "least two classes, float [batch, K], were expected. Export a classifier, without what follows its logits."
        )
    if len(sizes) > 1:
        name = unique(f"{result.name}_flat", names_of(model))
        model.graph.node.append(helper.make_node("Flatten", [result.name], [name], name="flatten_logits", axis=1))
        result.CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", sizes[0]]))
        notes.append("Its output [batch, K, 1, 1] became [batch, K].")
    return model


def _name_ends(model: onnx.ModelProto) -> None:
    """The input is "input" and the output "logits", whatever else is called so."""
    source, result = model.graph.input[0], model.graph.output[0]
    wanted = {source.name: INPUT, result.name: OUTPUT}
    taken = names_of(model) - set(wanted)
    names = {name: unique(f"{name}_", taken) for name in taken & {INPUT, OUTPUT}} | wanted
    for node in model.graph.node:
        for field in (node.input, node.output):
            for place, name in enumerate(field):
                field[place] = names.get(name, name)
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    source.name, result.name = INPUT, OUTPUT


def _own_note(
    original: onnx.ModelProto, model: onnx.ModelProto, image: tuple[int, int, int], notes: list[str]
) -> tuple[Preprocess | None, tuple[str, ...] | None]:
    """What kdedge wrote into a file of its own; a note of another form is told and left out."""
    for each in original.metadata_props:
        if each.key != "kdedge":
            continue
        try:
            note: dict[str, Any] = json.loads(each.value)
            preprocess = Preprocess.from_json(note["preprocess"])
            classes = tuple(str(name) for name in note["classes"])
            size = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
            fits = (preprocess.channels, preprocess.height, preprocess.width) == image and len(classes) == size
        except (ValueError, KeyError, TypeError, Failure):
            fits = False
        if fits:
            model.metadata_props.append(each)
            return preprocess, classes
        notes.append("Its metadata 'kdedge' does not fit the model and is not used.")
    return None, None


def _check(path: Path, model: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = " ".join(str(error).split())[:200]
        raise ExportError(f"{path} is no valid ONNX model: {first}. Export the model again.") from None
    problems = lint_float(model)
    if problems:
        raise ExportError(f"{path} cannot be brought into the usual form: {problems[0]}. Please report this model.")


def _pictures(image: tuple[int, int, int], count: int = 4) -> npt.NDArray[np.float32]:
    """Smooth noise of about unit size, float32 [count, C, H, W]: what a normalised image looks like to a network."""
    channels, height, width = image
    coarse = np.random.default_rng(0).normal(size=(count, channels, 8, 8)).astype(np.float32)
    rows, columns = (np.arange(size) * 8 // size for size in (height, width))
    return np.ascontiguousarray(coarse[:, :, rows][:, :, :, columns])


def prove(imported: Imported, batch: npt.NDArray[np.float32]) -> float:
    """The largest difference of a logit (probability, where the file ends in those) on float32 [B, C, H, W].

    Our file is asked for all images at once and for two alone, so that an open batch is proven too. ExportError above
    0.001 of the largest value, 0.02 for a file of float16, and where values are not finite.
    """
    origin = imported.origin
    expected = origin.logits(batch)  # first: a file that does not run is told as such
    session = open_session(imported.model.SerializeToString())
    found = np.asarray(session.run(None, {INPUT: batch})[0])
    single = np.concatenate([session.run(None, {INPUT: batch[i : i + 1]})[0] for i in range(min(2, len(batch)))])
    ours = _tail(origin.tail, found)
    allowed = (0.02 if origin.dtype == "float16" else 1e-3) * float(np.abs(expected).max())
    with np.errstate(invalid="ignore"):  # infinite values are a difference too
        difference = float(np.abs(ours - expected).max()) if ours.shape == expected.shape else np.inf
        alone = float(np.abs(single - found[: len(single)]).max())
    if not (difference <= allowed and alone <= 1e-3 * float(np.abs(found).max())):
        raise ExportError(
            f"The normalised form of {origin.path} differs from the file by {max(difference, alone):.3g} on "
            f"{len(batch)} images; at most {allowed:.3g} was expected. Please report this model: reading it went wrong."
        )
    return difference


def _tail(op_type: str, logits: Logits) -> Logits:
    if not op_type:
        return logits
    shifted = logits - logits.max(1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return np.asarray(log_probs if op_type == "LogSoftmax" else np.exp(log_probs))
