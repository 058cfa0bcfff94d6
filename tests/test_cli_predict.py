"""`kdedge predict` and `kdedge eval` on a bundle whose network is known: the brighter image is "light"."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from kdedge.cli import run
from kdedge_device.manifest import sha256_file

Capture = pytest.CaptureFixture[str]


def network() -> onnx.ModelProto:
    """logits = [-s, s] of s = mean of the normalised 4 x 4 pixels."""
    weights = np.stack([np.full(16, -1 / 16), np.full(16, 1 / 16)]).astype(np.float32).T
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor("weights", TensorProto.FLOAT, weights.shape, weights.ravel())],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    path = folder / "model.onnx"
    path.write_bytes(network().SerializeToString())
    manifest = {
        "schema": 1,
        "artifacts": {
            "fp32": {
                "file": path.name, "sha256": sha256_file(path), "bytes": path.stat().st_size,
                "precision": "fp32", "golden_tolerance": 0.001,
            }
        },
        "files": {},
        "input": {"name": "input", "shape": ["batch", 1, 4, 4], "dtype": "float32", "layout": "NCHW"},
        "preprocess": {
            "height": 4, "width": 4, "channels": 1, "resize": "short-side-crop", "mean": [0.5], "std": [0.25],
        },
        "classes": ["dark", "light"],
        "shipped": "fp32",
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def grey(path: Path, tone: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (9, 7), tone).save(path)
    return path


def test_predict_gives_the_class_and_its_probability(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    dark, light = grey(tmp_path / "a.png", 0), grey(tmp_path / "b.png", 255)
    assert run(["predict", str(bundle), str(dark), str(light), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["predictions"]
    assert [(entry["image"], entry["class"]) for entry in found] == [(str(dark), "dark"), (str(light), "light")]
    # s = (0 - 0.5) / 0.25 = -2, so the logits are 2 and -2
    assert found[0]["prob"] == pytest.approx(1 / (1 + np.exp(-4)), abs=1e-5)
    assert [entry["class"] for entry in found[0]["top"]] == ["dark", "light"]


def test_a_bad_image_is_told_and_the_others_are_predicted(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    light = grey(tmp_path / "b.png", 255)
    images = [str(tmp_path / "text.jpg"), str(tmp_path / "nowhere.png"), str(tmp_path), str(light)]
    assert run(["predict", str(bundle), *images]) == 2
    shown = capsys.readouterr()
    assert shown.out.split()[:2] == [str(light), "light"]
    assert shown.out.count("\n") == 1
    assert [image for image in images[:3] if image in shown.err] == images[:3]
    assert "3 of 4 images could not be read." in shown.err


def test_eval_scores_the_test_part_by_class_name(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    # In another order than the model's, with the class names as folders; one of four is dark under the name of light.
    tones = {"test/light": (200, 250, 10, 240), "test/dark": (5, 20), "train/light": (0, 0), "train/dark": (255, 255)}
    for folder, values in tones.items():
        for i, tone in enumerate(values):
            grey(tmp_path / "set" / folder / f"{i}.png", tone)
    for model in (bundle, bundle / "model.onnx"):
        assert run(["eval", str(model), "--data", str(tmp_path / "set"), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["part"], document["images"]) == ("test", 6)
        assert document["accuracy"] == pytest.approx(5 / 6)
        assert document["per_class"] == [
            {"class": "dark", "images": 2, "accuracy": 1.0},
            {"class": "light", "images": 4, "accuracy": 0.75},
        ]
        # Wilson's interval of 5 in 6
        assert document["interval"] == pytest.approx([0.4365, 0.9699], abs=1e-3)


def test_eval_names_a_class_the_model_does_not_know(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    for name in ("dark", "lihgt"):
        for i in range(2):
            grey(tmp_path / "set" / name / f"{i}.png", 10 * i)
    assert run(["eval", str(bundle), "--data", str(tmp_path / "set")]) == 2
    assert "has the class 'lihgt', which the model does not know; it knows dark, light. Did you mean 'light'?" in (
        capsys.readouterr().err
    )


def test_an_altered_or_homeless_model_is_refused(bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    image = str(grey(tmp_path / "a.png", 0))
    (tmp_path / "alone.onnx").write_bytes((bundle / "model.onnx").read_bytes())
    assert run(["predict", str(tmp_path / "alone.onnx"), image]) == 2
    assert "has no manifest.json beside it" in capsys.readouterr().err
    (bundle / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes()[:-1] + b"x")
    assert run(["predict", str(bundle), image]) == 2
    assert "It was altered" in capsys.readouterr().err
