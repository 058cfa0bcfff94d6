"""Log lines, word by word as the libraries write them, and the inspector's JSON of both layouts."""

import json

import pytest

from kdedge_device.failures import CorruptFailure, DeviceFailure, Failure, RuntimeFailure, VersionFailure
from kdedge_device.trt_errors import classify
from kdedge_device.trt_inspect import count_layers

LINES = [
    ("CUDA initialization failure with error: 35", RuntimeFailure, 6),
    ("CUDA driver version is insufficient for CUDA runtime version", RuntimeFailure, 6),
    (
        "The engine plan file is not compatible with this version of TensorRT, expecting library version 10.3.0.30 got "
        "8.6.2.3, please rebuild.",
        VersionFailure,
        3,
    ),
    ("Version tag does not match. Note: Current Version: 213, Serialized Engine Version: 96", VersionFailure, 3),
    ("Failed due to an old deserialization call on a newer plan file.", VersionFailure, 3),
    (
        "Cannot deserialize engine with lean runtime since IRuntime::getEngineHostCodeAllowed() is false.",
        VersionFailure,
        3,
    ),
    (
        "The engine plan file is generated on an incompatible device, expecting compute 8.7 got compute 7.2, please "
        "rebuild.",
        DeviceFailure,
        4,
    ),
    (
        "Platform specific tag mismatch detected. TensorRT plan files are only supported on the target runtime "
        "platform they were created on.",
        DeviceFailure,
        4,
    ),
    ("Using an engine plan file across different models of devices is not supported.", DeviceFailure, 4),
    ("Magic tag does not match", CorruptFailure, 5),
    ("Cannot deserialize with an empty memory buffer.", CorruptFailure, 5),
    ("Could not find any implementation for node /features/1/conv.", Failure, 2),
    ("Error Code 2: OutOfMemory (Requested size was 1073741824 bytes.)", Failure, 2),
    ("In node 3 (importModel): UNSUPPORTED_NODE: No importer registered for op: GridMix.", VersionFailure, 3),
]


@pytest.mark.parametrize(("line", "failure", "code"), LINES)
def test_lines_are_classified(line: str, failure: type[Failure], code: int) -> None:
    found = classify(["Some other line", line, "Engine deserialization failed."], "The engine x cannot be loaded")
    assert type(found) is failure
    assert found.exit_code == code
    assert str(found).startswith(f"The engine x cannot be loaded: {line.rstrip('.')}.")
    assert len(str(found)) > len(line) + 40, "a remedy follows"


def test_a_missing_driver_comes_before_what_follows_from_it() -> None:
    found = classify(["Magic tag does not match", "CUDA initialization failure with error: 100"], "x")
    assert isinstance(found, RuntimeFailure)


def test_unknown_lines_and_silence() -> None:
    assert str(classify(["Something   new\n happened"], "x failed")) == "x failed: Something new happened."
    assert str(classify([], "x failed")) == "x failed: TensorRT gives no reason."
    # 8.5 says this as a warning and goes on: it is no reason to refuse
    assert (
        type(classify(["Using an engine plan file across different models of devices is not recommended"], "x"))
        is Failure
    )


def old(kind: str, description: str, **more: str) -> dict:  # type: ignore[type-arg]
    tensor = {"Name": "t", "Location": "Device", "Dimensions": [1, 8], "Format/Datatype": description}
    return {"Name": "n", "LayerType": kind, "Inputs": [tensor], "Outputs": [], **more}


def new(kind: str, data_type: str, **more: str) -> dict:  # type: ignore[type-arg]
    tensor = {
        "Name": "t",
        "Dimensions": [1, 8],
        "Format": "Row major linear FP32 format (kLINEAR)",
        "DataType": data_type,
    }
    return {"Name": "n", "LayerType": kind, "Inputs": [tensor], "Outputs": [], **more}


def test_layers_of_tensorrt_8_and_10() -> None:
    layers = [
        old("CaskConvolution", "Thirty-two wide channel vectorized row major Int8 format"),
        old("CaskConvolution", "Four wide channel vectorized row major INT8 format (kCHW4)"),
        old("CaskConvolution", "Channel major FP16 format where channel % 8 == 0"),
        old("CaskPooling", "Int8"),
        old("gemm", "Half", Metadata="[ONNX Layer: Gemm_3]"),
        old("kgen", "Half", Metadata="[ONNX Layer: Conv_7]"),
        old("PointWiseV2", "Row major linear FP32 format (kLINEAR)"),
        old("PointWiseV2", "BFloat16"),
        old("Reformat", "Row major linear FP32 format (kLINEAR)"),
        {"Name": "constant", "LayerType": "Constant", "Inputs": [], "Outputs": []},
    ]
    found = count_layers(json.dumps({"Layers": layers, "Bindings": ["input", "logits"]}))
    assert found == {
        "layers": 10,
        "reformats": 1,
        "int8": 3,
        "fp16": 3,
        "fp32": 1,
        "other": 2,
        "convolutions": {"int8": 2, "fp16": 2, "fp32": 0, "other": 0},
    }


def test_layers_of_tensorrt_11() -> None:
    """The type stands apart from the format, whose words must not be taken for it."""
    layers = [new("Convolution", "Int8"), new("Convolution", "Half"), new("Pooling", "Float"), new("Cast", "UInt8")]
    found = count_layers(json.dumps({"Layers": layers, "I/O Tensors": [{"Name": "input", "DataType": "Float"}]}))
    assert [found[key] for key in ("int8", "fp16", "fp32", "other")] == [1, 1, 1, 1]
    assert found["convolutions"] == {"int8": 1, "fp16": 1, "fp32": 0, "other": 0}


@pytest.mark.parametrize("text", ["", "no JSON", "[]", '{"Layers": 3}', '{"Layers": [{"Name": "a "b" c"}]}'])
def test_what_cannot_be_read_is_none_not_zero(text: str) -> None:
    assert set(count_layers(text).values()) == {None}


def test_names_only_are_counted_but_not_typed() -> None:
    found = count_layers(json.dumps({"Layers": ["conv1 + relu", "fc"], "Bindings": []}))
    assert (found["layers"], found["int8"], found["convolutions"]) == (2, None, None)
