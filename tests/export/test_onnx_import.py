"""A file in anybody's spelling becomes the canonical form: the same values, few words, an open batch."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kdedge.errors import ExportError
from kdedge_device.preprocess import Preprocess
from kdedge_export.cpu.lint import lint_float
from kdedge_export.float_form.onnx_import import Imported, import_onnx
from kdedge_export.sessions import open_session, run_onnx

from .conftest import SMALL
from .foreign_files import after_conv, classifier, model_of, node, saved, weights

X = np.random.default_rng(1).normal(size=(5, 3, 8, 8)).astype(np.float32)
PLAIN = Counter(Conv=1, Relu=1, GlobalAveragePool=1, Flatten=1, Gemm=1)


def words(found: Imported) -> Counter[str]:
    return Counter(each.op_type for each in found.model.graph.node)


def imported(model: onnx.ModelProto, folder: Path, *, x: np.ndarray = X, atol: float = 1e-5) -> Imported:
    """The import, held to the file itself by value for five images at once (or as many as the file takes)."""
    path = saved(model, folder)
    found = import_onnx(path)
    assert lint_float(found.model) == []
    onnx.checker.check_model(found.model, full_check=True)
    session = open_session(path.read_bytes())
    batch = session.get_inputs()[0].shape[0]
    step = batch if isinstance(batch, int) else len(x)
    given = [x[i : i + step] for i in range(0, len(x), step)]
    expected = np.concatenate([session.run(None, {session.get_inputs()[0].name: each})[0] for each in given])
    ours = run_onnx(found.model.SerializeToString(), x.transpose(0, 3, 1, 2) if x.shape[3] == 3 else x)
    np.testing.assert_allclose(ours, expected.reshape(len(x), -1), atol=atol)
    return found


def test_the_canonical_form_is_a_fixed_point(tmp_path: Path, mobilenet_v3: tuple[object, onnx.ModelProto]) -> None:
    _, model = mobilenet_v3
    found = import_onnx(saved(model, tmp_path))
    assert [node.name for node in found.model.graph.node] == [node.name for node in model.graph.node]
    assert words(found) == Counter(node.op_type for node in model.graph.node)
    assert found.preprocess == SMALL
    assert found.classes == tuple("abcdefghij")
    assert found.notes == ()
    again = import_onnx(saved(found.model, tmp_path))
    assert again.model == found.model


def test_names_of_ours_and_theirs(tmp_path: Path) -> None:
    found = imported(classifier(), tmp_path)
    assert [each.name for each in found.model.graph.input] == ["input"]
    assert [each.name for each in found.model.graph.output] == ["logits"]
    assert (found.image, found.num_classes, found.preprocess, found.classes) == ((3, 8, 8), 5, None, None)
    clashing = classifier([node("Identity", "x", "logits"), node("Identity", "logits", "input")], source="input")
    assert words(imported(clashing, tmp_path)) == PLAIN


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 18, 21, 23])
def test_every_opset(opset: int, tmp_path: Path) -> None:
    assert words(imported(classifier(opset=opset, ir=10 if opset > 17 else 7), tmp_path)) == PLAIN


def test_initializers_that_are_inputs_too(tmp_path: Path) -> None:
    model = classifier(opset=9, ir=3)
    for each in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(each.name, each.data_type, each.dims))
    assert words(imported(model, tmp_path)) == PLAIN


def test_constants_identities_and_dropout_are_gone(tmp_path: Path) -> None:
    nodes = [
        node("Constant", "", "k", value=numpy_helper.from_array(np.array(2.0, np.float32), "k")),
        node("Identity", "k", "two"),
        node("Mul", "conv two", "scaled"),
        node("Dropout", "scaled", "dropped mask"),
        node("Cast", "dropped", "cast", to=TensorProto.FLOAT),
        node("Identity", "cast", "end"),
    ]
    found = imported(after_conv(nodes, "end"), tmp_path)
    assert words(found) == PLAIN - Counter(Relu=1), "a scale is folded into the Conv in front"
    assert len(found.model.graph.initializer) == 4, "a weight and a bias of each layer"


def batch_norm(channels: int) -> dict[str, np.ndarray]:
    values = weights(4, channels)
    return {"g": values[0], "be": values[1], "m": values[2], "va": np.abs(values[3]) + 0.1}


def test_batch_normalisation_behind_a_layer_is_folded(tmp_path: Path) -> None:
    nodes = [node("BatchNormalization", "conv g be m va", "bn", epsilon=1e-3), node("Relu", "bn", "relu")]
    assert words(imported(after_conv(nodes, "relu", batch_norm(8)), tmp_path)) == PLAIN
    nodes = [node("BatchNormalization", "conv g be m va", "bn"), node("Add", "bn conv", "sum")]
    found = imported(after_conv(nodes, "sum", batch_norm(8)), tmp_path)
    assert words(found)["BatchNormalization"] == 1, "the layer has another reader, who wants it as it is"


def test_scale_layers_of_caffe_go_into_the_normalisation(tmp_path: Path) -> None:
    nodes = [
        node("BatchNormalization", "conv g be m va", "bn"),
        node("Mul", "bn s", "scaled"),
        node("Add", "t scaled", "shifted"),
        node("Concat", "conv shifted", "joined", axis=1),
    ]
    constants = batch_norm(8) | {"s": weights(8, 1, 1), "t": weights(1, 8, 1, 1), "v": weights(5, 16)}
    found = imported(after_conv(nodes, "joined", constants), tmp_path)
    assert (words(found)["BatchNormalization"], words(found)["Mul"], words(found)["Add"]) == (1, 0, 0)


def test_a_shared_weight_is_not_changed_for_the_others(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "twin", pads=[1, 1, 1, 1]),
        node("BatchNormalization", "twin g be m va", "bn"),
        node("Add", "bn conv", "sum"),
    ]
    assert words(imported(after_conv(nodes, "sum", batch_norm(8)), tmp_path))["BatchNormalization"] == 0


@pytest.mark.parametrize(("pads", "folded"), [([0, 0, 0, 0], True), ([1, 1, 1, 1], False)])
@pytest.mark.parametrize("groups", [1, 4])
def test_batch_normalisation_before_a_layer(pads: list[int], folded: bool, groups: int, tmp_path: Path) -> None:
    """A padded 0 has not been shifted, so only an unpadded layer can take a shift in."""
    nodes = [
        node("Relu", "conv", "relu"),
        node("BatchNormalization", "relu g be m va", "bn"),
        node("Conv", "bn u", "second", pads=pads, group=groups),
    ]
    constants = batch_norm(8) | {"u": weights(8, 8 // groups, 3, 3)}
    found = imported(after_conv(nodes, "second", constants), tmp_path)
    assert words(found)["BatchNormalization"] == (0 if folded else 1)


@pytest.mark.parametrize("opset", [9, 13])
def test_relu6_in_three_spellings(opset: int, tmp_path: Path) -> None:
    limits = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    six = {"high": np.array([6], np.float32)}
    clip = node("Clip", "conv", "end", min=0.0, max=6.0) if opset == 9 else node("Clip", "conv low high", "end")
    min_of_relu = [node("Relu", "conv", "relu"), node("Min", "relu high", "end")]
    for nodes, constants in (([clip], limits if opset > 9 else {}), (min_of_relu, six)):
        found = imported(after_conv(nodes, "end", constants, opset=opset), tmp_path)
        assert words(found) == PLAIN - Counter(Relu=1) + Counter(Clip=1)
        clip_node = next(each for each in found.model.graph.node if each.op_type == "Clip")
        values = {each.name: numpy_helper.to_array(each) for each in found.model.graph.initializer}
        assert [float(values[name]) for name in clip_node.input[1:]] == [0.0, 6.0]


@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
@pytest.mark.parametrize("opset", [11, 18])
def test_means_over_the_map(axes: list[int], opset: int, tmp_path: Path) -> None:
    def mean(keep: int) -> onnx.NodeProto:
        if opset == 18:
            return node("ReduceMean", "relu axes", "pool", keepdims=keep)
        return node("ReduceMean", "relu", "pool", keepdims=keep, axes=axes)

    model = classifier(opset=opset, constants={"axes": np.array(axes)} if opset == 18 else {})
    model.graph.node[2].CopyFrom(mean(1))
    assert words(imported(model, tmp_path)) == PLAIN
    model.graph.node[2].CopyFrom(mean(0))
    model.graph.node[4].input[0] = "pool"
    del model.graph.node[3]
    assert words(imported(model, tmp_path)) == PLAIN


def test_an_average_pool_over_the_whole_map(tmp_path: Path) -> None:
    model = classifier()
    model.graph.node[2].CopyFrom(node("AveragePool", "relu", "pool", kernel_shape=[8, 8]))
    assert words(imported(model, tmp_path)) == PLAIN
    model.graph.node[2].CopyFrom(node("AveragePool", "relu", "half", kernel_shape=[4, 4], strides=[4, 4]))
    model.graph.node.insert(3, node("GlobalAveragePool", "half", "pool"))
    assert words(imported(model, tmp_path))["AveragePool"] == 1


@pytest.mark.parametrize(
    "head",
    [
        [node("Gemm", "flat vt c", "y")],
        [node("Gemm", "flat vt c", "y", alpha=0.5, beta=2.0)],
        [node("Gemm", "flat v row", "y", transB=1)],
        [node("Gemm", "flat v one", "y", transB=1, beta=0.5)],
        [node("Gemm", "flat v one", "y", transB=1)],
        [node("Gemm", "flat vt number", "y", alpha=3.0)],
        [node("Gemm", "flat v row", "product", transB=1, alpha=0.5, beta=2.0), node("Add", "product c", "y")],
        [node("Gemm", "flat v one", "product", transB=1, beta=0.5), node("Mul", "product c", "y")],
        [node("Gemm", "flat v", "y", transB=1, beta=0.5)],
        [node("MatMul", "flat vt", "y")],
        [node("MatMul", "flat vt", "product"), node("Add", "product c", "y")],
        [node("MatMul", "flat vt", "product"), node("Add", "row product", "y")],
    ],
)
def test_linear_layers_have_one_form(head: list[onnx.NodeProto], tmp_path: Path) -> None:
    single = {"one": np.array([0.7], np.float32), "number": np.array(-0.3, np.float32)}
    model = classifier(constants={"vt": weights(8, 5), "row": weights(1, 5), **single})
    del model.graph.node[4]
    model.graph.node.extend(head)
    read = {name for each in model.graph.node for name in each.input}
    kept = [each for each in model.graph.initializer if each.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    found = imported(model, tmp_path)
    assert words(found) == PLAIN
    gemm = found.model.graph.node[-1]
    assert {each.name: helper.get_attribute_value(each) for each in gemm.attribute} == {"transB": 1}
    sizes = {each.name: list(each.dims) for each in found.model.graph.initializer}
    assert [sizes[name] for name in gemm.input[1:]] in ([[5, 8]], [[5, 8], [5]])


def test_flatten_by_arithmetic_on_the_shape(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "pool", "size"),
        node("Gather", "size zero", "count", axis=0),
        node("Unsqueeze", "count at", "counts"),
        node("Concat", "counts rest", "to", axis=0),
        node("Reshape", "pool to", "flat"),
    ]
    model = classifier(constants={"zero": np.array(0), "at": np.array([0]), "rest": np.array([-1])})
    del model.graph.node[3]
    for place, each in enumerate(nodes):
        model.graph.node.insert(3 + place, each)
    assert words(imported(model, tmp_path)) == PLAIN


@pytest.mark.parametrize("shape", [[1, 8], [1, -1], [-1, 8], [0, -1]])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_fixed_batch_is_opened(shape: list[int], batch: int, tmp_path: Path) -> None:
    to = np.array([batch if size == 1 else size for size in shape])
    model = classifier(shape=(batch, 3, 8, 8), output=(batch, 5), constants={"to": to})
    model.graph.node[3].CopyFrom(node("Reshape", "pool to", "flat"))
    assert words(imported(model, tmp_path)) == PLAIN


def test_a_channel_shuffle_keeps_the_batch_open(tmp_path: Path) -> None:
    constants = {"apart": np.array([1, 2, 4, 8, 8]), "joined": np.array([1, 8, 8, 8])}
    nodes = [
        node("Reshape", "conv apart", "groups"),
        node("Transpose", "groups", "mixed", perm=[0, 2, 1, 3, 4]),
        node("Reshape", "mixed joined", "end"),
    ]
    found = imported(after_conv(nodes, "end", constants, shape=(1, 3, 8, 8), output=(1, 5)), tmp_path)
    assert words(found)["Reshape"] == 2


def test_slices_without_a_gap_become_a_split(tmp_path: Path) -> None:
    constants = {"0": np.array([0]), "3": np.array([3]), "end": np.array([2**63 - 1]), "axis": np.array([1])}
    nodes = [
        node("Slice", "conv 3 end axis", "right"),
        node("Relu", "right", "active"),
        node("Slice", "conv 0 3 axis", "left"),
        node("Concat", "left active", "joined", axis=1),
    ]
    found = imported(after_conv(nodes, "joined", constants), tmp_path)
    assert words(found) == Counter(Conv=1, Split=1, Relu=1, Concat=1, GlobalAveragePool=1, Flatten=1, Gemm=1)
    constants["3"] = np.array([2])
    constants["0"] = np.array([1])
    nodes = [node("Slice", "conv 3 end axis", "right"), node("Slice", "conv 0 3 axis", "left")]
    nodes += [node("Concat", "left right", "seven", axis=1), node("Concat", "seven left", "joined", axis=1)]
    assert words(imported(after_conv(nodes, "joined", constants), tmp_path))["Slice"] == 2, "a channel is left out"


def test_a_slice_may_leave_inputs_out(tmp_path: Path) -> None:
    """An empty name keeps its place: without axes a Slice begins with the first, the batch, and cuts no channels."""
    constants = {name: np.array([int(name)]) for name in ("0", "1", "3", "8")}
    nodes = [
        node("Slice", "conv 0 3 1", "left"),
        helper.make_node("Slice", ["conv", "3", "8", "1", ""], ["right"], name="no_steps"),
        node("Concat", "left right", "joined", axis=1),
    ]
    found = imported(after_conv(nodes, "joined", constants), tmp_path)
    assert (words(found)["Split"], words(found)["Slice"]) == (1, 0)
    nodes = [
        helper.make_node("Slice", ["conv", "0", "3", "", "1"], ["some"], name="no_axes"),
        helper.make_node("Slice", ["conv", "3", "all", "", "1"], ["others"], name="no_axes_either"),
        node("Concat", "some others", "joined", axis=0),
    ]
    constants |= {"all": np.array([2**62])}
    assert words(imported(after_conv(nodes, "joined", constants), tmp_path))["Slice"] == 2


THREE = {"3": np.array(3, np.float32), "0": np.array(0, np.float32), "6": np.array(6, np.float32)}
SHIFTED = [node("Add", "conv 3", "shifted"), node("Clip", "shifted 0 6", "clipped")]


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Mul", "conv clipped", "product"), node("Div", "product 6", "end")],
        [node("Div", "clipped 6", "gate"), node("Mul", "gate conv", "end")],
        [node("Mul", "sixth clipped", "gate"), node("Mul", "conv gate", "end")],
        [node("HardSigmoid", "conv", "gate", alpha=1 / 6, beta=0.5), node("Mul", "conv gate", "end")],
    ],
)
def test_hard_swish_in_four_spellings(nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    shifted = [] if nodes[0].op_type == "HardSigmoid" else SHIFTED
    constants = THREE | {"sixth": np.array(1 / 6, np.float32)} if shifted else {}
    found = imported(after_conv([*shifted, *nodes], "end", constants), tmp_path)
    assert words(found) == PLAIN - Counter(Relu=1) + Counter(HardSwish=1)


def test_what_only_looks_like_hard_swish_stays(tmp_path: Path) -> None:
    nodes = [*SHIFTED, node("Div", "clipped 6", "gate"), node("Relu", "conv", "relu"), node("Mul", "relu gate", "end")]
    found = imported(after_conv(nodes, "end", THREE), tmp_path)
    assert (words(found)["HardSwish"], words(found)["HardSigmoid"], words(found)["Mul"]) == (0, 1, 1)
    nodes = [*SHIFTED, node("Mul", "conv clipped", "product"), node("Div", "product 6", "end")]
    found = imported(after_conv(nodes, "end", THREE | {"3": np.array(2, np.float32)}), tmp_path)
    assert words(found)["HardSwish"] == 0


def test_silu_stays_sigmoid_and_mul(tmp_path: Path) -> None:
    nodes = [node("Sigmoid", "conv", "gate"), node("Mul", "conv gate", "end")]
    found = imported(after_conv(nodes, "end"), tmp_path)
    assert words(found) == PLAIN - Counter(Relu=1) + Counter(Sigmoid=1, Mul=1)


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("opset", [11, 13])
def test_a_softmax_at_the_end_is_cut_off(op_type: str, opset: int, tmp_path: Path) -> None:
    model = classifier(opset=opset)
    model.graph.node[4].CopyFrom(node("Gemm", "flat v c", "z", transB=1))
    model.graph.node.append(node(op_type, "z", "y", axis=1))
    path = saved(model, tmp_path)
    found = import_onnx(path)
    assert words(found) == PLAIN
    assert [op_type in note for note in found.notes] == [True]
    logits = run_onnx(found.model.SerializeToString(), X).astype(np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    theirs = run_onnx(path.read_bytes(), X)
    np.testing.assert_allclose(probs if op_type == "Softmax" else np.log(probs), theirs, atol=1e-5)


@pytest.mark.parametrize(
    "tail",
    [
        [node("Softmax", "z", "s", axis=-1), node("Identity", "s", "y")],
        [node("Softmax", "z", "s", axis=1), node("Identity", "s", "t"), node("Identity", "t", "y")],
        [node("Softmax", "z", "s", axis=1), node("Cast", "s", "t", to=TensorProto.FLOAT), node("Flatten", "t", "y")],
        [node("Softmax", "z", "s", axis=1), node("Reshape", "s all", "y")],
        [node("Unsqueeze", "z last", "u"), node("Softmax", "u", "s", axis=1), node("Squeeze", "s last", "y")],
        [node("Unsqueeze", "z first", "u"), node("Softmax", "u", "s", axis=2), node("Flatten", "s", "y")],
        [node("Softmax", "z", "s", axis=1), node("Dropout", "s", "y")],
    ],
)
def test_logits_are_found_behind_a_softmax_and_what_hands_it_on(tail: list[onnx.NodeProto], tmp_path: Path) -> None:
    shapes = {"all": np.array([-1, 5]), "last": np.array([2]), "first": np.array([1])}
    read = {name for each in tail for name in each.input}
    model = classifier(constants={name: value for name, value in shapes.items() if name in read})
    model.graph.node[4].CopyFrom(node("Gemm", "flat v c", "z", transB=1))
    model.graph.node.extend(tail)
    path = saved(model, tmp_path)
    found = import_onnx(path)
    assert words(found)["Softmax"] == 0
    assert found.origin.tail == "Softmax"
    logits = run_onnx(found.model.SerializeToString(), X).astype(np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(probs, run_onnx(path.read_bytes(), X), atol=1e-5)


def test_a_softmax_that_is_not_over_the_classes_is_no_end(tmp_path: Path) -> None:
    """It is over the images of a batch: the answer to an image depends on the others."""
    model = classifier()
    model.graph.node[4].CopyFrom(node("Gemm", "flat v c", "z", transB=1))
    model.graph.node.extend([node("Softmax", "z", "s", axis=0), node("Identity", "s", "y")])
    with pytest.raises(ExportError, match="differs from the file"):
        import_onnx(saved(model, tmp_path))


def test_an_output_of_one_pixel_is_flattened(tmp_path: Path) -> None:
    model = model_of(
        [node("Conv", "x w", "conv"), node("GlobalAveragePool", "conv", "y")],
        {"w": weights(5, 3, 3, 3)},
        output=("n", 5, 1, 1),
    )
    found = imported(model, tmp_path)
    assert found.num_classes == 5
    assert found.notes == ("Its output [batch, K, 1, 1] became [batch, K].",)


def test_channels_last_as_tf2onnx_writes_it(tmp_path: Path) -> None:
    nodes = [node("Transpose", "x", "first", perm=[0, 3, 1, 2])]
    model = classifier(nodes, source="first", shape=("n", 8, 8, 3))
    found = imported(model, tmp_path, x=np.ascontiguousarray(X.transpose(0, 2, 3, 1)))
    assert words(found) == PLAIN
    assert found.image == (3, 8, 8)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_other_float_types_become_float32(kind: int, tmp_path: Path) -> None:
    model = classifier(kind=kind)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for each in model.graph.initializer:
        each.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(each).astype(dtype), each.name))
    found = import_onnx(saved(model, tmp_path))
    assert found.notes == (f"Its {'float16' if kind == TensorProto.FLOAT16 else 'double'} weights became float32.",)
    assert all(each.data_type == TensorProto.FLOAT for each in found.model.graph.initializer)
    expected = run_onnx(classifier_like(found.model), X)
    np.testing.assert_allclose(run_onnx(found.model.SerializeToString(), X), expected)


def classifier_like(model: onnx.ModelProto) -> bytes:
    """The five layers again with the weights of `model`: what those halves mean as floats."""
    values = [numpy_helper.to_array(each) for each in model.graph.initializer]
    names = {value.ndim * 100 + value.shape[0]: value for value in values}
    own = classifier(constants={"w": names[408], "b": names[108], "v": names[205], "c": names[105]})
    return bytes(own.SerializeToString())


def test_open_height_and_width_take_px(tmp_path: Path) -> None:
    path = saved(classifier(shape=("n", 3, "h", "w")), tmp_path)
    assert import_onnx(path, px=8).image == (3, 8, 8)


def test_local_functions_are_written_out(tmp_path: Path) -> None:
    function = helper.make_function(
        "local", "Twice", ["a"], ["r"], [helper.make_node("Add", ["a", "a"], ["r"])], [helper.make_opsetid("", 17)]
    )
    call = helper.make_node("Twice", ["conv"], ["end"], domain="local")
    model = after_conv([call], "end")
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    assert words(imported(model, tmp_path)) == PLAIN - Counter(Relu=1) + Counter(Add=1)


def test_a_note_of_kdedge_that_does_not_fit_is_told(tmp_path: Path) -> None:
    preprocess = Preprocess(8, 8, 3, "squash", (0.5,) * 3, (0.25,) * 3).to_json()
    good = {"preprocess": preprocess, "classes": list("abcde")}
    changes: list[Callable[[], dict[str, object]]] = [
        lambda: good | {"classes": ["a"]},
        lambda: good | {"preprocess": preprocess | {"height": 9}},
        lambda: {"classes": list("abcde")},
    ]
    model = classifier()
    entry = model.metadata_props.add(key="kdedge", value=json.dumps(good))
    assert import_onnx(saved(model, tmp_path)).classes == tuple("abcde")
    for change in changes:
        entry.value = json.dumps(change())
        found = import_onnx(saved(model, tmp_path))
        assert (found.classes, found.preprocess) == (None, None)
        assert found.notes == ("Its metadata 'kdedge' does not fit the model and is not used.",)
