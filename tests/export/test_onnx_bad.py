"""What is no whole float classifier of images is refused in one sentence that names what is wrong."""

import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from kdedge.errors import ExportError
from kdedge_export.float_form import onnx_file, onnx_import
from kdedge_export.float_form.onnx_import import import_onnx

from .foreign_files import after_conv, classifier, model_of, node, saved, weights


def refused(path: Path, match: str, px: int | None = None) -> None:
    before = sorted(path.parent.iterdir())
    with pytest.raises(ExportError, match=match) as caught:
        import_onnx(path, px)
    assert "\n" not in str(caught.value)
    assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty; an ONNX file was expected"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), r"is no ONNX file \(it starts with b'\\x89PNG"),
        (b"import torch\n" * 20, r"is no ONNX file \(it starts with b'import t'"),
        (b"hello\n", r"is no ONNX file"),
        (b"\x08\x08", "is damaged or cut short"),
    ],
)
def test_not_an_onnx_file(content: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(path, match)


def test_no_file_a_folder_and_too_large_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "absent.onnx", r"absent\.onnx does not exist; an ONNX file was expected")
    (tmp_path / "folder.onnx").mkdir()
    refused(tmp_path / "folder.onnx", r"folder\.onnx is a folder; an ONNX file was expected")
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:  # sparse: 3 GB that take no room
        file.truncate(3 << 30)
    refused(path, r"has 3,221,225,472 bytes; an ONNX file holds at most 2,147,483,647")


def test_cut_anywhere(tmp_path: Path) -> None:
    """Cut at a border of two fields the rest still parses."""
    content = classifier().SerializeToString()
    path = tmp_path / "model.onnx"
    for size in [*range(2, 40), *range(40, len(content) - 1, 97), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(ExportError, match="is damaged or cut short: it begins like an ONNX file"):
            import_onnx(path)


def test_bytes_flipped_anywhere_never_crash(tmp_path: Path) -> None:
    """Each of these is either refused in a sentence or still a model that computes what it says."""
    content = bytearray(classifier().SerializeToString())
    rng = np.random.default_rng(0)
    outcomes = {"refused": 0, "read": 0}
    path = tmp_path / "model.onnx"
    for place in rng.choice(len(content), 60, replace=False):
        damaged = bytearray(content)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            import_onnx(path)
            outcomes["read"] += 1
        except ExportError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 0


@pytest.mark.parametrize(("opset", "match"), [(8, "has opset 8; 9 to 25 are read"), (99, "has opset 99; 9 to 25")])
def test_opsets_that_are_not_read(opset: int, match: str, tmp_path: Path) -> None:
    refused(saved(classifier(opset=opset), tmp_path), match)


def external(folder: Path, location: str) -> tuple[Path, onnx.TensorProto]:
    """A model whose weight "w" is said to lie in `location`, where nothing was written."""
    model = classifier()
    tensor = next(each for each in model.graph.initializer if each.name == "w")
    external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    return saved(model, folder), tensor


def test_external_data(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weight = weights(8, 3, 3, 3)
    path, _ = external(folder, "model.bin")
    refused(path, r"keeps the weight w in model\.bin, which is not there")
    (folder / "model.bin").write_bytes(weight.tobytes()[:-1])
    refused(path, r"model\.bin has 863 bytes; .* expects the 864 of the weight w at 0")
    (folder / "model.bin").write_bytes(weight.tobytes())
    found = import_onnx(path)
    values = {each.name: numpy_helper.to_array(each) for each in found.model.graph.initializer}
    np.testing.assert_array_equal(values["w"], weight)


@pytest.mark.parametrize("location", ["../secret.bin", "sub/../../secret.bin", "{absolute}", "link.bin", "", "."])
def test_external_data_never_leaves_the_folder(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(bytes(864))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    path, _ = external(folder, location.format(absolute=tmp_path / "secret.bin"))
    refused(path, "keeps the weight w in .* outside its own folder, which is not opened")


def huge(model: onnx.ModelProto, name: str, dims: list[int]) -> onnx.ModelProto:
    tensor = next(each for each in model.graph.initializer if each.name == name)
    del tensor.dims[:]
    tensor.dims.extend(dims)
    return model


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (
            lambda: huge(classifier(), "w", [1 << 40, 3, 3, 3]),
            r"weight w declares the shape \[1099511627776, 3, 3, 3\]",
        ),
        (lambda: huge(classifier(), "w", [-8, 3, 3, 3]), r"weight w has the shape \[-8, 3, 3, 3\]"),
        (lambda: classifier(shape=("n", 3, 1 << 20, 1 << 20)), r"shape \['\?', 3, 1048576, 1048576\]; at most"),
        (lambda: classifier(shape=(1 << 30, 3, 8, 8)), r"shape \[1073741824, 3, 8, 8\]; at most"),
        (
            lambda: after_conv(
                [node("Pad", "conv pads", "end")], "end", {"pads": np.array([0, 0, 0, 0, 0, 0, 1 << 30, 9])}
            ),
            r"Pad n_end declares an output of the shape .* values; at most 268,435,456",
        ),
        (
            lambda: after_conv(
                [node("ConstantOfShape", "size", "big"), node("ReduceMax", "big", "m"), node("Mul", "conv m", "end")],
                "end",
                {"size": np.array([1 << 20, 1 << 20])},
            ),
            r"ConstantOfShape n_big declares an output of the shape \[1048576, 1048576\]",
        ),
        (
            lambda: after_conv(
                [
                    node("Range", "zero end one", "range"),
                    node("ReduceMax", "range", "m"),
                    node("Cast", "m", "f", to=1),
                    node("Mul", "conv f", "out"),
                ],
                "out",
                {"zero": np.array(0), "end": np.array(1 << 40), "one": np.array(1)},
            ),
            r"Range n_range declares an output of the shape \[1099511627776\]",
        ),
    ],
)
def test_sizes_that_are_only_declared_allocate_nothing(
    model: Callable[[], onnx.ModelProto], match: str, tmp_path: Path
) -> None:
    path = saved(model(), tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, match)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_unsupported_operators_are_named_with_their_node(tmp_path: Path) -> None:
    foreign = node("FusedConv", "conv", "end", domain="com.microsoft")
    model = after_conv([foreign], "end")
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    refused(saved(model, tmp_path), r"operator com\.microsoft\.FusedConv n_end is not part of ONNX")
    refused(saved(after_conv([node("Conf", "conv", "end")], "end"), tmp_path), "operator Conf n_end does not exist")
    refused(saved(after_conv([node("Mish", "conv", "end")], "end", opset=18), tmp_path), "operator Mish of node n_end")
    refused(saved(after_conv([node("RandomNormalLike", "conv", "end")], "end"), tmp_path), "RandomNormalLike n_end")
    nodes = [node("NonZero", "conv", "where"), node("Cast", "where", "f", to=1), node("ReduceMax", "f", "m")]
    model = after_conv([*nodes, node("Mul", "conv m", "end")], "end")
    refused(saved(model, tmp_path), "NonZero n_where is not supported: the size of what it makes depends on")
    branch = helper.make_graph(
        [helper.make_node("Identity", ["conv"], ["r"])], "b", [], [helper.make_empty_tensor_value_info("r")]
    )
    model = after_conv(
        [node("If", "yes", "end", then_branch=branch, else_branch=branch)], "end", {"yes": np.array(True)}
    )
    refused(saved(model, tmp_path), "If n_end is not supported: a network without branches")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    weight = weights(8, 3, 3, 3)
    weight[2, 1] = value
    refused(saved(classifier(constants={"w": weight}), tmp_path), "has 9 weights in w that are NaN or infinite, of 216")


def test_an_infinite_limit_of_a_clip_is_fine(tmp_path: Path) -> None:
    constants = {"low": np.array(0, np.float32), "high": np.array(np.inf, np.float32)}
    assert import_onnx(saved(after_conv([node("Clip", "conv low high", "end")], "end", constants), tmp_path))


def test_several_inputs_or_outputs(tmp_path: Path) -> None:
    model = after_conv([node("Add", "conv x2", "end")], "end")
    model.graph.input.append(helper.make_tensor_value_info("x2", TensorProto.FLOAT, ["n", 8, 8, 8]))
    refused(saved(model, tmp_path), r"has 2 inputs \(x, x2\); one was expected")
    model = classifier()
    model.graph.output.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, ["n", 8]))
    refused(saved(model, tmp_path), r"has 2 outputs \(y, flat\); one was expected")


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        (("n", 8), r"input x of .* has the shape \['\?', 8\], which is no image"),
        (("n", 4, 8, 8), r"shape \['\?', 4, 8, 8\], which is no image"),
        (("n", 3, "h", "w"), r"its height or width open\. Say which with --px"),
    ],
)
def test_not_an_image_input(shape: tuple[str | int, ...], match: str, tmp_path: Path) -> None:
    refused(saved(classifier(shape=shape), tmp_path), match)


def test_an_input_of_another_type_or_size(tmp_path: Path) -> None:
    nodes = [node("Cast", "x", "f", to=TensorProto.FLOAT)]
    model = classifier(nodes, source="f")
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    refused(saved(model, tmp_path), r"input x of .* is uint8; float32 \[batch, C, H, W\] was expected")
    refused(saved(classifier(), tmp_path), r"shape \['\?', 3, 8, 8\], so --px 16 cannot be had", px=16)
    refused(saved(classifier(shape=("n", 8, 8, 3)), tmp_path), r"takes images as \[batch, H, W, C\], and Conv n_conv")


def test_quantized_files(tmp_path: Path) -> None:
    constants = {"s": np.array(0.1, np.float32), "z": np.array(0, np.uint8)}
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d")]
    model = classifier(nodes, source="d", constants=constants)
    refused(saved(model, tmp_path), "is quantized already: its node n_q is a QuantizeLinear")
    nodes = [node("DynamicQuantizeLinear", "conv", "q sc zp"), node("DequantizeLinear", "q sc zp", "end")]
    refused(saved(after_conv(nodes, "end"), tmp_path), "its node n_q is a DynamicQuantizeLinear")


@pytest.mark.parametrize(
    ("nodes", "output", "match"),
    [
        ([node("Relu", "conv", "y")], ("n", 8, 8, 8), r"output y of .* is float \['batch', 8, 8, 8\]; logits"),
        ([node("ArgMax", "conv", "y", axis=1)], ("n", 1, 8, 8), r"output y of .* is int64"),
        ([node("ReduceMean", "conv", "y", keepdims=1, axes=[1, 2, 3])], ("n", 1, 1, 1), r"float \['batch', 1, 1, 1\]"),
        ([node("ReduceMean", "conv", "y", keepdims=0, axes=[0, 2, 3])], (8,), r"is float \[8\]"),
    ],
)
def test_another_output_than_logits(
    nodes: list[onnx.NodeProto], output: tuple[str | int, ...], match: str, tmp_path: Path
) -> None:
    first = node("Conv", "x w", "conv", pads=[1, 1, 1, 1])
    model = model_of([first, *nodes], {"w": weights(8, 3, 3, 3)}, output=output)
    if nodes[0].op_type == "ArgMax":
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    refused(saved(model, tmp_path), match)


def test_a_fixed_batch_that_cannot_be_opened(tmp_path: Path) -> None:
    model = classifier(shape=(2, 3, 8, 8), output=(2, 5), constants={"each": weights(2, 8, 1, 1)})
    model.graph.node[2].CopyFrom(node("Mul", "relu each", "scaled"))
    model.graph.node.insert(3, node("GlobalAveragePool", "scaled", "pool"))
    refused(saved(model, tmp_path), r"Mul n_scaled cannot take inputs of the shapes \[\(7, 8, 8, 8\), \(2, 8, 1, 1\)\]")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    refused(
        saved(classifier(constants={"w": weights(8, 4, 3, 3)}), tmp_path),
        r"ONNX Runtime cannot run .* kernel channels",
    )
    refused(saved(classifier(constants={"v": weights(5, 9)}), tmp_path), r"Gemm n_y cannot take inputs of the shapes")


def test_a_graph_with_a_gap(tmp_path: Path) -> None:
    refused(
        saved(classifier([node("Relu", "nothing", "end")], source="end"), tmp_path),
        "reads nothing, which nothing makes",
    )


def test_the_proof_finds_another_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def wrong(model: onnx.ModelProto) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(onnx_file_rewrite(model))
        bias = next(each for each in copy.graph.initializer if each.name == "c")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.5), "c"))
        return copy

    onnx_file_rewrite = onnx_import.to_opset_17
    monkeypatch.setattr(onnx_import, "to_opset_17", wrong)
    refused(saved(classifier(), tmp_path), r"differs from the file by 0\.5 on 4 images; at most")


def test_the_limit_of_all_external_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = external(tmp_path, "model.bin")
    (tmp_path / "model.bin").write_bytes(bytes(864))
    monkeypatch.setattr(onnx_file, "MAX_BYTES", 863)
    assert path.stat().st_size < 863
    refused(path, "has more than 863 bytes of weights, which no ONNX file can hold")
