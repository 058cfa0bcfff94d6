"""A run becomes a bundle that is complete, describes itself and runs elsewhere; or nothing is left behind."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from kdedge.errors import DataError, DeviceError, ExportError
from kdedge.runs import Run
from kdedge_device.check import check
from kdedge_device.evaluate import logits_of, predict
from kdedge_device.manifest import Bundle
from kdedge_device.runners import OrtRunner
from kdedge_export import export as steps
from kdedge_export import subject as subjects
from kdedge_export.cpu.lint import lint_float, lint_int8
from kdedge_export.cpu.plan import Plan
from kdedge_export.export import Options, export_run
from kdedge_export.images import calibration_part, open_run_images
from kdedge_export.judging.gate import fill_in
from kdedge_export.judging.latency import Speedup, measure_alone, race
from kdedge_export.table import RangeTable
from kdedge_export.targets import load

from .test_latency import record

SHORT = ("--seconds", "0", "--runs", "50")
FLOAT_BUNDLE = {"manifest.json", "gate.json", "proof.json", "model.onnx", "golden.npz", "run.pyz"}
INT8_FILES = {"quantization.json", "model.int8.onnx", "model.trt.onnx", "model.trt-fp16.onnx", "model.fp16.onnx"}
BUNDLE = FLOAT_BUNDLE | INT8_FILES
FLOAT, LOOSE = Options(), Options(int8=True, max_drop_points=100.0)
Trained = tuple[onnx.ModelProto, RangeTable]


@pytest.fixture
def run(run_folder: Path, tmp_path: Path) -> Run:
    shutil.copytree(run_folder, tmp_path / run_folder.name)
    return Run(tmp_path / run_folder.name)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, exported_student: onnx.ModelProto) -> dict[str, float]:
    """Nothing is traced or timed anew; the latencies are those of the dictionary."""
    p50 = {"model.onnx": 2.0, "model.int8.onnx": 1.0}
    monkeypatch.setattr(subjects, "export_float", lambda *_: exported_student)
    began = {"started_at": "2026-01-01T00:00:00Z"}
    monkeypatch.setattr(steps, "measure_alone", lambda model, threads: record(p50[model.name]) | began)
    return p50


@pytest.fixture(scope="module")
def whole(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any], list[str]]:
    """One export with nothing replaced; only the measurements are short."""
    path = tmp_path_factory.mktemp("whole") / run_folder.name
    shutil.copytree(run_folder, path)
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "measure_alone", lambda model, threads: measure_alone(model, threads, SHORT))
        patch.setattr(steps, "race", partial(race, max_seconds=0))
        document = export_run(Run(path), LOOSE, display=told.append)
    return Run(path), document, told


@pytest.fixture(scope="module")
def exported_student(whole: tuple[Run, dict[str, Any], list[str]]) -> onnx.ModelProto:
    return onnx.load(str(whole[0].bundle_path / "model.onnx"))


def test_every_file_of_the_contract(whole: tuple[Run, dict[str, Any], list[str]]) -> None:
    run, document, told = whole
    assert {path.name for path in run.bundle_path.iterdir()} == BUNDLE
    assert {path.name for path in run.path.iterdir() if path.name.startswith(".")} == set(), "nothing temporary is left"
    manifest = json.loads((run.bundle_path / "manifest.json").read_text())
    models = {each["file"] for each in manifest["artifacts"].values()}
    assert set(manifest["files"]) | models == BUNDLE - {"manifest.json"}
    assert Bundle(run.bundle_path).verify() == sorted(BUNDLE - {"manifest.json"})
    assert manifest["input"] == {"name": "input", "shape": ["batch", 1, 8, 8], "dtype": "float32", "layout": "NCHW"}
    assert manifest["classes"] == list("0123456789")
    assert manifest["provenance"]["run"] == run.path.name
    assert manifest["provenance"]["calibration"]["images"] == 419
    assert str(run.path.parent) not in (run.bundle_path / "manifest.json").read_text(), "no path of this machine"
    assert [line.split()[0] for line in told][:2] == ["Exporting", "Calibrating"]
    assert lint_float(onnx.load(str(run.bundle_path / "model.onnx"))) == []
    kept = json.loads((run.bundle_path / "quantization.json").read_text())["kept_float"]
    assert lint_int8(onnx.load(str(run.bundle_path / "model.int8.onnx")), frozenset(kept)) == []
    assert document["artifacts"]["int8"]["bytes"] < 0.5 * document["artifacts"]["fp32"]["bytes"]


def test_the_document_and_the_gate(whole: tuple[Run, dict[str, Any], list[str]]) -> None:
    run, document, _ = whole
    assert {"artifacts", "drop_points", "speedup", "shipped", "why", "targets"} <= set(document)
    assert set(document["artifacts"]) == {"fp32", "int8", "trt", "trt-fp16", "fp16"}
    for name in ("fp32", "int8"):
        each = document["artifacts"][name]
        assert {"accuracy", "bytes", "latency_ms_p50", "latency_ms_p90"} <= set(each)
        assert each["latency_ms_p50"] > 0
    gate = json.loads((run.bundle_path / "gate.json").read_text())
    assert gate["targets"] == document["targets"]
    assert document["shipped"] == ("int8" if document["speedup"] >= 1 else "fp32")
    low, high = document["targets"]["onnxruntime-cpu"]["speedup_interval"]
    assert low <= document["speedup"] <= high
    assert document["targets"]["tensorrt"]["verdict"] == "undecided", "no TensorRT file was timed"
    assert document["targets"]["tensorrt"]["shipped"] == "fp32"
    json.dumps(document, allow_nan=False)


def test_each_target_named_has_its_entry(run: Run, quick: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was measured here is decided: the CPU of this machine, by the name it also has as a target."""
    monkeypatch.setattr(steps.platform, "machine", lambda: "x86_64")
    targets = tuple(load(name) for name in ("jetson-orin-nano", "x86-cpu", "raspberry-pi"))
    targets += (targets[1].model_copy(update={"name": "two-threads", "threads": 2}),)
    told: list[str] = []
    document = export_run(run, replace(LOOSE, targets=targets), display=told.append)
    gate = json.loads((run.bundle_path / "gate.json").read_text())
    assert list(gate["targets"]) == ["onnxruntime-cpu", "tensorrt", *(each.name for each in targets)]
    assert gate["targets"] == document["targets"]
    here, nano, same, pi = (
        gate["targets"][name] for name in ("onnxruntime-cpu", "jetson-orin-nano", "x86-cpu", "raspberry-pi")
    )
    assert (nano["verdict"], nano["shipped"], list(nano["candidates"])) == ("undecided", "fp32", ["trt", "fp16"])
    assert (pi["verdict"], pi["shipped"], list(pi["candidates"])) == ("undecided", "fp32", ["int8", "fp16"])
    assert (same["verdict"], same["shipped"], same["speedup"]) == (here["verdict"], here["shipped"], here["speedup"])
    assert same["speedup"] is not None
    assert same["why"] == here["why"].replace("onnxruntime-cpu", "x86-cpu")
    assert nano["target"] == targets[0].settings()
    assert "target" not in here
    assert nano["agreement"] == gate["targets"]["tensorrt"]["agreement"]
    filled = fill_in(gate, "jetson-orin-nano", {"trt": Speedup(2.0, 1.9, 2.1, 6)})["targets"]["jetson-orin-nano"]
    assert (filled["shipped"], filled["target"]) == ("int8", targets[0].settings())
    assert gate["targets"]["two-threads"]["verdict"] == "undecided"
    assert any("two-threads stays undecided: of threads it takes 2 and 1 were measured" in each for each in told)


def test_accuracy_is_of_the_test_images_through_the_files(whole: tuple[Run, dict[str, Any], list[str]]) -> None:
    run, document, _ = whole
    images, bundle = open_run_images(run), Bundle(run.bundle_path)
    pixels = images.test.load(bundle.preprocess)
    assert len(pixels) == 540
    with np.load(run.predictions_path) as predictions:
        arrays = {key: predictions[key] for key in predictions.files}
    assert arrays["test_id"].tolist() == images.test.ids
    for name in ("fp32", "int8"):
        with OrtRunner(bundle.model_path(name)) as runner:
            logits = logits_of(runner, bundle.preprocess, pixels)
        np.testing.assert_allclose(arrays[f"test_logits__{name}"], logits, atol=1e-4)
        accuracy = float((logits.argmax(1) == arrays["test_label"]).mean())
        assert document["artifacts"][name]["accuracy"] == accuracy == bundle.artifacts[name]["accuracy"]
        assert accuracy > 0.5
        assert arrays[f"gate_logits__{name}"].shape == (len(images.gate), 10)
    differ = (arrays["gate_logits__fp32"].argmax(1) != arrays["gate_logits__int8"].argmax(1)).mean()
    found = document["targets"]["onnxruntime-cpu"]["agreement"]
    assert found["disagreement_points"] == pytest.approx(100 * differ)
    assert document["drop_points"] == pytest.approx(found["drop_points"])


def test_gate_and_calibration_know_no_hidden_label(run: Run) -> None:
    """Training knows 40 labels; the gate knows the same and no others, though digits has them all."""
    images = open_run_images(run)
    known = images.gate.labels >= 0
    assert 0 < known.sum() <= 40
    assert not set(images.gate.ids) & set(images.calibration.ids)
    assert not (set(images.gate.ids) | set(images.calibration.ids)) & set(images.test.ids)
    assert (images.calibration.labels == -1).all()


def test_the_table_names_every_range(whole: tuple[Run, dict[str, Any], list[str]]) -> None:
    run, _, _ = whole
    table = json.loads((run.bundle_path / "quantization.json").read_text())
    model = onnx.load(str(run.bundle_path / "model.int8.onnx"))
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    # A name with a colon is a part of a layer that was cut to suit the kernels; it has its layer's scale.
    quantized = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    quantized = {name for name in quantized if ":" not in name}
    assert quantized <= set(table["tensors"])
    for name in quantized:
        each = table["tensors"][name]
        assert constants[f"{name}_scale"] == np.float32(each["u8"]["scale"])
        assert constants[f"{name}_zero_point"] == each["u8"]["zero_point"]
    for name, layer in table["layers"].items():
        if "weight_scales" in layer:
            told = np.float32(layer["weight_scales"])  # behind them the file may have channels of zeros
            np.testing.assert_array_equal(constants[f"{name}.weight_q_scale"][: len(told)], told)
    assert table["chosen"] in table["ways"]
    assert table["fallback"]["tries"][0]["left_float"] == 0
    assert table["kept_float"] == {}
    assert set(table["tensorrt"]["scales"]) <= set(table["tensors"])
    for name, scale in table["tensorrt"]["scales"].items():
        assert scale == table["tensors"][name]["s8"]["scale"]
    assert table["images"]["count"] == 419


def test_the_zipapp_needs_only_python_numpy_and_a_runtime(
    whole: tuple[Run, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    """Run from another folder, isolated from this checkout, on a copy of the bundle."""
    run, _, _ = whole
    board = tmp_path / "board"
    shutil.copytree(run.bundle_path, board)
    black = str(tmp_path / "black.png")
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(black)

    def call(*arguments: str) -> tuple[int, dict[str, Any]]:
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [sys.executable, "-I", str(board / "run.pyz"), *arguments, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
        return done.returncode, json.loads(done.stdout)

    code, document = call("check")
    assert code == 0
    assert document["golden"]["int8"]["same_class"] == 1.0
    code, document = call("predict", black)
    assert (code, document["predictions"][0]["class"]) == (0, predict(Bundle(board), [black])[0]["class"])
    code, document = call("bench", "--seconds", "0", "--runs", "20", "--artifact", "int8")
    assert (code, document["artifact"]["precision"]) == (0, "int8")
    (board / "model.onnx").write_bytes(b"altered")
    assert call("check")[0] == 5


def test_golden_logits_are_those_of_the_files(whole: tuple[Run, dict[str, Any], list[str]]) -> None:
    found = check(Bundle(whole[0].bundle_path))
    assert all(each["max_abs_difference"] <= 1e-4 for each in found["golden"].values())


def test_without_int8(run: Run, quick: dict[str, float]) -> None:
    document = export_run(run, FLOAT)
    assert set(document["artifacts"]) == {"fp32"}
    assert (document["shipped"], document["speedup"], document["drop_points"]) == ("fp32", None, None)
    assert {path.name for path in run.bundle_path.iterdir()} == FLOAT_BUNDLE
    with np.load(run.predictions_path) as predictions:
        assert {"test_logits__fp32"} == {key for key in predictions.files if "logits" in key}


def test_engines_are_proved_on_the_same_images(
    run: Run, quick: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This engine gives every second image another class. TensorRT itself is faked in tests/device."""
    built = {"fp32": {"reused": False}}

    def logits(folder: Path, precision: str, images: Path) -> np.ndarray:
        bundle = Bundle(folder)
        with OrtRunner(bundle.model_path(precision)) as runner:
            found = logits_of(runner, bundle.preprocess, np.load(images))
        found[::2] = np.roll(found[::2], 1, axis=1)
        return found

    monkeypatch.setattr(steps, "require_tensorrt", lambda: None)
    monkeypatch.setattr(steps, "build_here", lambda folder, precisions, say: {name: built[name] for name in precisions})
    monkeypatch.setattr(steps, "engine_logits", logits)
    document = export_run(run, replace(FLOAT, tensorrt=True))
    assert document["tensorrt"] == built
    proof = json.loads((run.bundle_path / "proof.json").read_text())
    assert proof == document["proof"]
    fp32, engine = proof["files"]["fp32"], proof["files"]["engine-fp32"]
    assert engine["agreement"]["disagreement_points"] == 50.0
    assert engine["top1"] < fp32["top1"]
    assert engine["logit_error"]["rms"] > 0
    assert sum(each["left"] for each in engine["classes"]) == proof["images"] / 2
    assert "proof.json" in Bundle(run.bundle_path).verify(), "its hash is that of what was written last"


def test_qat_that_is_not_better_is_not_kept_and_that_is_told(
    run: Run, quick: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(run: Run, model: onnx.ModelProto, plan: Plan, table: RangeTable, *_: object) -> Trained:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        head = next(each for each in copy.graph.initializer if each.name == "head.weight")
        head.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(head), "head.weight"))
        return copy, table

    monkeypatch.setattr(steps, "run_qat", spoilt)
    told: list[str] = []
    export_run(run, replace(LOOSE, qat=True), display=told.append)
    table = json.loads((run.bundle_path / "quantization.json").read_text())
    assert table["ways"]["trained"]["divergence"] > table["ways"][table["chosen"]]["divergence"]
    assert table["chosen"] != "trained"
    assert [each for each in told if each.endswith(f"{table['chosen']} is kept, trained is not better")]


def test_a_slow_int8_is_written_but_not_shipped(run: Run, quick: dict[str, float]) -> None:
    quick["model.int8.onnx"] = 4.0
    document = export_run(run, LOOSE, out=run.path / "elsewhere")
    assert (document["shipped"], document["speedup"]) == ("fp32", 0.5)
    assert (run.path / "elsewhere" / "model.int8.onnx").is_file()
    assert Bundle(run.path / "elsewhere").shipped == "fp32"
    assert not run.bundle_path.exists()


def test_training_predictions_stay_and_a_second_export_replaces_the_first(run: Run, quick: dict[str, float]) -> None:
    ids = np.array(open_run_images(run).test.ids)
    ones = np.ones((540, 10), np.float32)
    np.savez(run.predictions_path, test_id=ids, test_label=np.zeros(540, np.int64), test_logits__student=ones)
    export_run(run, LOOSE)
    with np.load(run.predictions_path) as predictions:
        assert (predictions["test_logits__student"] == 1).all()
        assert predictions["test_logits__int8"].shape == (540, 10)
    export_run(run, FLOAT)
    assert not (run.bundle_path / "model.int8.onnx").exists()
    assert sorted(path.name for path in run.path.iterdir() if "bundle" in path.name) == ["bundle"]


@pytest.mark.parametrize("failing", ["measure_alone", "build_pyz"])
def test_a_failure_leaves_the_old_bundle_and_nothing_else(
    failing: str, run: Run, quick: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    export_run(run, FLOAT)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device") if failing == "build_pyz" else DeviceError("no runtime")

    monkeypatch.setattr(steps, failing, fail)
    with pytest.raises((ExportError, DeviceError), match=r"No space left on device|no runtime"):
        export_run(run, LOOSE)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_an_interrupt_leaves_nothing(run: Run, quick: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "measure_alone", stop)
    before = sorted(run.path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        export_run(run, LOOSE)
    kept = run.path / ".bundle-calibration.npz"
    assert sorted(run.path.iterdir()) == sorted([*before, kept]), "an interrupted calibration is gone on with"
    monkeypatch.undo()


def test_a_folder_that_is_no_bundle_is_left_alone(run: Run, quick: dict[str, float], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("precious")
    with pytest.raises(ExportError, match="exists and is no bundle"):
        export_run(run, FLOAT, out=tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "precious"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ExportError, match="exists and is no bundle"):
        export_run(run, FLOAT, out=tmp_path / "file")


def test_a_run_is_no_bundle(run: Run, quick: dict[str, float]) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(ExportError, match="exists and is no bundle"):
        export_run(run, FLOAT, out=run.path)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_without_test_images_nothing_is_scored(
    run: Run, quick: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_run_images(run)
    empty = replace(images.test, indices=images.test.indices[:0], labels=images.test.labels[:0])
    monkeypatch.setattr(subjects, "open_run_images", lambda _: replace(images, test=empty))
    document = export_run(run, LOOSE)
    assert {each["accuracy"] for each in document["artifacts"].values()} == {None}
    assert document["proof"]["split"] == "gate"
    with pytest.raises(DataError, match="no labels"):
        export_run(run, replace(FLOAT, with_eval=3), out=run.path / "elsewhere")


def test_other_images_are_never_those_that_judge(run: Run) -> None:
    images = open_run_images(run)
    part = calibration_part("digits", images=2000, judged=(images.gate, images.test))
    assert len(part) > 100
    assert not set(part.ids) & {*images.gate.ids, *images.test.ids}


def test_what_half_cannot_hold_is_not_written(
    run: Run, quick: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "overflowing", lambda *_: {"Conv_1": 1e6})
    document = export_run(run, LOOSE)
    assert set(document["artifacts"]) == {"fp32", "int8", "trt"}
    assert set(document["proof"]["layers"]) == {"int8", "trt"}, "of files that are there"
    with pytest.raises(ExportError, match=r"Conv_1 reaches 1e\+06, and FP16 ends at 65504"):
        export_run(run, replace(FLOAT, fp16=True), out=run.path / "elsewhere")


def test_a_place_that_cannot_be_written(run: Run, quick: dict[str, float], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"Cannot write .*file"):
        export_run(run, FLOAT, out=tmp_path / "file" / "bundle")


def test_calibrating_on_other_images(run: Run, quick: dict[str, float], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("train/0", "train/1", "test/0", "test/1"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    part = calibration_part(str(tmp_path / "data"))
    assert len(part) == 8
    assert all(identity.startswith("train") for identity in part.ids)
    export_run(run, LOOSE, calibrate=str(tmp_path / "data"))
    table = json.loads((run.bundle_path / "quantization.json").read_text())
    assert table["images"]["count"] == 8
    with pytest.raises(DataError):
        export_run(run, LOOSE, calibrate=str(tmp_path / "absent"))


def test_a_float_file_that_differs_is_not_exported(
    run: Run, quick: dict[str, float], monkeypatch: pytest.MonkeyPatch, exported_student: onnx.ModelProto
) -> None:
    with_other_head = onnx.ModelProto()
    with_other_head.CopyFrom(exported_student)
    head = next(each for each in with_other_head.graph.initializer if each.name == "head.bias")
    value = onnx.numpy_helper.to_array(head)
    head.CopyFrom(onnx.numpy_helper.from_array(value[::-1].copy() + np.float32(1), "head.bias"))
    monkeypatch.setattr(subjects, "export_float", lambda *_: with_other_head)
    with pytest.raises(ExportError, match="differs from the torch model"):
        export_run(run, FLOAT)
    assert not run.bundle_path.exists()
