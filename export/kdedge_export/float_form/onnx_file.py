"""Reading an ONNX file that came from anywhere: a whole model in memory, or one sentence on why not.

Nothing is computed here, and nothing is allocated that the file does not really hold.
"""

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kdedge.errors import ExportError

__all__ = ["OLDEST_OPSET", "opset_of", "read_onnx", "tensors_of", "type_name"]

OLDEST_OPSET, NEWEST_OPSET = 9, 25
MAX_BYTES = 2**31 - 1  # protobuf's limit for one message
_QUANTIZED = ("Quantize", "Dequantize", "DynamicQuantize", "QLinear", "ConvInteger", "MatMulInteger", "QGemm")
_PACKED = (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)  # two values a byte: none is a float weight


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model in `path`, its external data joined. ExportError where it is no whole float ONNX model."""
    model = _parsed(path, _content(path))
    opset = opset_of(model)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ExportError(
            f"{path} has opset {opset}; {OLDEST_OPSET} to {NEWEST_OPSET} are read. Export the model again, at opset 17."
        )
    _refuse_quantized(path, model)
    _join_external(path, model)
    for tensor in tensors_of(model.graph):
        _require_payload(path, tensor)
        _require_finite(path, tensor)
    return model


def opset_of(model: onnx.ModelProto) -> int:
    """Version of ONNX's own operators; 0 where the model names none."""
    return max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=0)


def type_name(kind: int) -> str:
    """ "float", "int64" ...; what a damaged file calls a type is told as its number."""
    return str(TensorProto.DataType.Name(kind)).lower() if kind in TensorProto.DataType.values() else f"type {kind}"


def tensors_of(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every constant: initializers and what nodes carry, subgraphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from tensors_of(inner)


def _content(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise ExportError(f"{path} is a folder; an ONNX file was expected. Name the .onnx file in it.")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ExportError(
                f"{path} has {size:,} bytes; an ONNX file holds at most {MAX_BYTES:,}, since protobuf reads no more. "
                "Save it with external data."
            )
        content = path.read_bytes()
    except FileNotFoundError:
        raise ExportError(f"{path} does not exist; an ONNX file was expected. Check the path.") from None
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror}); an ONNX file was expected.") from None
    if not content:
        raise ExportError(f"{path} is empty; an ONNX file was expected. Copy or export it again.")
    return content


def _parsed(path: Path, content: bytes) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
        whole = bool(model.ir_version > 0 and model.graph.node and opset_of(model) and model.graph.output)
        whole = whole and all(isinstance(text, str) for text in _texts(model.graph))
    except Exception:  # protobuf's DecodeError, which comes without type information
        whole = False
    if whole:
        return model
    # Field 1, the IR version, is written first: a tag and a small number. Noise that parses is caught by the same test.
    if content[0] == 0x08 and len(content) > 1 and 0 < content[1] < 0x80:
        raise ExportError(
            f"{path} is damaged or cut short: it begins like an ONNX file, but its {len(content):,} bytes hold no "
            "whole model. Copy or export it again."
        )
    raise ExportError(f"{path} is no ONNX file (it starts with {content[:8]!r}). Name a model saved as .onnx.")


def _texts(graph: onnx.GraphProto) -> Iterator[str]:
    """Every name; protobuf gives bytes, not str, for one that is no UTF-8."""
    for value in [*graph.input, *graph.output, *graph.initializer]:
        yield value.name
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def _refuse_quantized(path: Path, model: onnx.ModelProto) -> None:
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        if node.op_type.startswith(_QUANTIZED):
            raise ExportError(
                f"{path} is quantized already: its node {node.name or node.output[0]} is a {node.op_type}. "
                "A float model was expected; give the one it was made from."
            )


def _join_external(path: Path, model: onnx.ModelProto) -> None:
    total = 0
    for tensor in tensors_of(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            content = _external(path, tensor, MAX_BYTES - total)
            total += len(content)
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.DEFAULT
            tensor.raw_data = content


def _external(path: Path, tensor: TensorProto, room: int) -> bytes:
    """The bytes of one tensor from a file beside `path`; never from anywhere else."""
    entries = {each.key: each.value for each in tensor.external_data}
    location = entries.get("location", "")
    folder = path.resolve().parent
    try:
        file = (folder / location).resolve()  # follows links: where the bytes really are
        file.is_file()  # a name that no file can have is told of here
    except (OSError, ValueError):
        raise ExportError(
            f"{path} keeps the weight {tensor.name} in a file whose name is no file name ({len(location)} characters). "
            "The name of a file beside the model was expected; save the model again."
        ) from None
    if not location or PurePosixPath(location).is_absolute() or not file.is_relative_to(folder) or file == folder:
        raise ExportError(
            f"{path} keeps the weight {tensor.name} in {location!r}, outside its own folder, which is not opened. "
            "A file beside the model was expected; put it there and save the model again."
        )
    if not file.is_file():
        raise ExportError(
            f"{path} keeps the weight {tensor.name} in {location}, which is not there. Copy that file beside the model."
        )
    expected = _bytes_of(path, tensor)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", expected))
    except ValueError:
        offset, length = -1, -1
    size = file.stat().st_size
    if length != expected or not 0 <= offset <= size - length:
        raise ExportError(
            f"{location} has {size:,} bytes; {path} expects the {expected:,} of the weight {tensor.name} at "
            f"{offset:,}. The file was cut short or belongs to another model; copy both again."
        )
    if length > room:
        raise ExportError(f"{path} has more than {MAX_BYTES:,} bytes of weights, which no ONNX file can hold.")
    with file.open("rb") as opened:
        opened.seek(offset)
        return bytes(opened.read(length))


def _count(path: Path, tensor: TensorProto) -> int:
    if any(size < 0 for size in tensor.dims):
        raise ExportError(f"{path} is damaged: its weight {tensor.name} has the shape {list(tensor.dims)}.")
    return math.prod(int(size) for size in tensor.dims)


def _bytes_of(path: Path, tensor: TensorProto) -> int:
    try:
        return _count(path, tensor) * int(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)
    except KeyError:
        raise ExportError(
            f"{path} is damaged: its weight {tensor.name} is of no known type ({tensor.data_type})."
        ) from None


def _require_payload(path: Path, tensor: TensorProto) -> None:
    """A tensor that declares more values than it holds would be allocated before anybody noticed."""
    count, size = _count(path, tensor), _bytes_of(path, tensor)
    if tensor.data_type in _PACKED:
        raise ExportError(f"{path} is quantized already: {tensor.name} has 4-bit values. Give the float model.")
    typed = sum(len(getattr(tensor, name)) for name in _TYPED)
    if not (len(tensor.raw_data) == size if tensor.HasField("raw_data") else typed == count):
        held = f"{len(tensor.raw_data):,} bytes" if tensor.HasField("raw_data") else f"{typed:,} values"
        raise ExportError(
            f"{path} is damaged: its weight {tensor.name} declares the shape {list(tensor.dims)} and holds {held}. "
            "Export the model again."
        )


_TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def _require_finite(path: Path, tensor: TensorProto) -> None:
    """No NaN anywhere; infinity only as a single number, which is how some exporters write a clip without a limit."""
    if tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16):
        return
    with np.errstate(invalid="ignore"):  # a signalling NaN, which is found right below
        values = np.asarray(numpy_helper.to_array(tensor)).astype(np.float64)
    bad = np.isnan(values) if values.size == 1 else ~np.isfinite(values)
    if bad.any():
        raise ExportError(
            f"{path} has {int(bad.sum())} weights in {tensor.name} that are NaN or infinite, of {values.size:,}. "
            "Finite ones were expected: the training diverged; take an earlier checkpoint."
        )
