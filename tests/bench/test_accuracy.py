"""Accuracy in a record: by value beside a count made by hand, once for the same bytes and images, of no other file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kdedge_bench.accuracy import accuracy_of, exams_of
from kdedge_device.manifest import sha256_file
from kdedge_device.preprocess import Preprocess

PREPROCESS = Preprocess(4, 4, 1, "squash", (0.5,), (0.25,))
Pixels = npt.NDArray[np.uint8]


def network(path: Path, weights: npt.NDArray[np.float32]) -> None:
    """Logits [N, 3] of [N, 1, 4, 4]."""
    from onnx import TensorProto, helper, numpy_helper, save

    nodes = [helper.make_node("Flatten", ["input"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])]
    graph = helper.make_graph(
        nodes, "tiny", [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])], [numpy_helper.from_array(weights, "w")],
    )  # fmt: skip
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@dataclass(frozen=True)
class Made:
    """A bundle in a folder, its images, and how many of them its FP32 file gets right, counted with numpy."""

    bundle: Path
    images: Pixels
    labels: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]

    def right(self, images: Pixels, labels: npt.NDArray[np.int64]) -> int:
        values = (images.reshape(len(images), -1) / 255 - 0.5) / 0.25
        return int(((values @ self.weights).argmax(1) == labels).sum())

    def record(self, **changes: Any) -> dict[str, Any]:
        artifact = {"name": "fp32", "sha256": sha256_file(str(self.bundle / "model.onnx")), "precision": "fp32"}
        artifact |= {"runtime": "onnxruntime", "version": "1.0"} | changes
        return {"artifact": artifact, "machine": {"name": "pc", "architecture": "x86_64"}}


def bundle(folder: Path, *, carried: bool = True) -> Made:
    from kdedge_export.bundle import write_manifest

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (70, 4, 4, 1)).astype(np.uint8)  # more than one batch
    labels = rng.integers(0, 3, 70)
    weights = rng.normal(size=(16, 3)).astype(np.float32)
    folder.mkdir(parents=True)
    network(folder / "model.onnx", weights)
    if carried:
        np.savez(folder / "eval.npz", images=images, labels=labels)
    write_manifest(folder, {"fp32": {"golden_tolerance": 0.1}}, PREPROCESS, ("a", "b", "c"), "fp32", {}, {})
    return Made(folder, images, labels, weights)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDEDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every time that a file is scored."""
    from kdedge_bench import accuracy

    calls: list[str] = []
    whole = accuracy._scored

    def watched(record: Any, exam: Any, say: Any) -> Any:
        calls.append(exam.split)
        return whole(record, exam, say)

    monkeypatch.setattr(accuracy, "_scored", watched)
    return calls


def test_on_the_images_that_a_bundle_carries(tmp_path: Path, counted: list[str]) -> None:
    made = bundle(tmp_path / "net")
    right = made.right(made.images, made.labels)
    assert 0 < right < 70
    for _ in range(2):
        found = accuracy_of(made.record(), made.bundle, lambda _: None)
        assert found == {
            "value": right / 70,
            "correct": right,
            "images": 70,
            "split": "eval",
            "sha256": sha256_file(str(made.bundle / "eval.npz")),
        }
    assert counted == ["eval"], "the second time it is known"
    assert len(list((tmp_path / "cache" / "scored").iterdir())) == 1
    of_file = accuracy_of(made.record(), made.bundle / "model.onnx", lambda _: None)
    assert of_file == found
    accuracy_of(made.record(version="2.0"), made.bundle, lambda _: None)
    assert len(counted) == 2, "another runtime may give other classes"


def test_a_file_that_changed_is_not_what_was_measured(tmp_path: Path, counted: list[str]) -> None:
    made = bundle(tmp_path / "net")
    record = made.record()
    first = accuracy_of(record, made.bundle, lambda _: None)
    said: list[str] = []
    assert accuracy_of(made.record(sha256="f" * 64), made.bundle, said.append) is None
    assert "no file of" in said[0]
    assert "f" * 12 in said[0]
    network(made.bundle / "model.onnx", -made.weights)
    (made.bundle / "manifest.json").unlink()
    from kdedge_export.bundle import write_manifest

    write_manifest(made.bundle, {"fp32": {"golden_tolerance": 0.1}}, PREPROCESS, ("a", "b", "c"), "fp32", {}, {})
    again = accuracy_of(made.record(), made.bundle, lambda _: None)
    assert first is not None
    assert again is not None
    assert again["correct"] != first["correct"]
    assert again["sha256"] == first["sha256"]
    assert len(counted) == 3


def test_other_images_are_another_exam(tmp_path: Path, counted: list[str]) -> None:
    made = bundle(tmp_path / "net")
    accuracy_of(made.record(), made.bundle, lambda _: None)
    np.savez(made.bundle / "eval.npz", images=made.images[:40], labels=made.labels[:40])
    (made.bundle / "manifest.json").unlink()
    from kdedge_export.bundle import write_manifest

    write_manifest(made.bundle, {"fp32": {"golden_tolerance": 0.1}}, PREPROCESS, ("a", "b", "c"), "fp32", {}, {})
    found = accuracy_of(made.record(), made.bundle, lambda _: None)
    assert found is not None
    assert (found["images"], found["correct"]) == (40, made.right(made.images[:40], made.labels[:40]))
    assert len(counted) == 2


class _Part:
    """The test split of a run: images of unknown class among them."""

    def __init__(self, images: Pixels, labels: npt.NDArray[np.int64]) -> None:
        self.images, self.labels = images, labels

    def chunks(self, preprocess: Preprocess, size: int) -> Any:
        for start in range(0, len(self.images), size):
            yield self.images[start : start + size]


def test_on_the_runs_own_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[str]) -> None:
    from kdedge.runs import write_json

    made = bundle(tmp_path / "run" / "bundle")
    labels = made.labels.copy()
    labels[::7] = -1
    write_json(tmp_path / "run" / "splits.json", {"splits": {"test": {"count": 70, "sha256": "5" * 64}}})
    opened = type("Images", (), {"test": _Part(made.images, labels)})
    monkeypatch.setattr("kdedge_export.images.open_run_images", lambda run: opened)
    monkeypatch.setattr("kdedge_bench.accuracy.CHUNK", 16)
    found = accuracy_of(made.record(), made.bundle, lambda _: None)
    known = labels >= 0
    right = made.right(made.images[known], labels[known])
    assert found == {"value": right / 60, "correct": right, "images": 60, "split": "test", "sha256": "5" * 64}
    accuracy_of(made.record(), made.bundle, lambda _: None)
    assert counted == ["test"], "the second time it is known"
    again = {"fingerprint": "f" * 64, "splits": {"test": {"count": 70, "sha256": "5" * 64}}}
    write_json(tmp_path / "run" / "splits.json", again)
    accuracy_of(made.record(), made.bundle, lambda _: None)
    assert counted == ["test"] * 2, "under the same names lie other pixels or labels"


def test_where_the_runs_images_are_gone_those_in_the_bundle_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[str]
) -> None:
    from kdedge.errors import DataError
    from kdedge.runs import write_json

    made = bundle(tmp_path / "run" / "bundle")
    write_json(tmp_path / "run" / "splits.json", {"splits": {"test": {"count": 70, "sha256": "5" * 64}}})

    def gone(run: Any) -> Any:
        raise DataError("The images are gone.")

    monkeypatch.setattr("kdedge_export.images.open_run_images", gone)
    said: list[str] = []
    found = accuracy_of(made.record(), made.bundle, said.append)
    assert found is not None
    assert (found["split"], found["correct"]) == ("eval", made.right(made.images, made.labels))
    assert "fp32 is not scored on the test images: The images are gone." in said
    (tmp_path / "run" / "splits.json").write_text("{")
    assert [exam.split for exam in exams_of(made.bundle)] == ["eval"], "a damaged file is no reason to measure nothing"


def test_what_nobody_labelled_has_no_accuracy(tmp_path: Path) -> None:
    made = bundle(tmp_path / "net", carried=False)
    assert exams_of(made.bundle) == []
    assert accuracy_of(made.record(), made.bundle, lambda _: None) is None
    network(tmp_path / "bare.onnx", made.weights)
    assert accuracy_of(made.record(), tmp_path / "bare.onnx", lambda _: None) is None
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("altered", [False, True])
def test_on_a_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, altered: bool) -> None:
    import contextlib
    import json

    from kdedge_bench import accuracy_there
    from kdedge_bench.measured import Names, Target
    from kdedge_bench.remote_place import Place

    made = bundle(tmp_path / "net")
    calls: list[list[str]] = []

    @contextlib.contextmanager
    def answered(place: Place, path: Path, arguments: list[str], **_: Any) -> Any:
        calls.append(arguments)
        sha256 = "f" * 64 if altered else made.record()["artifact"]["sha256"]
        yield {"correct": 31, "images": 70, "accuracy": 31 / 70, "sha256": sha256}

    monkeypatch.setattr(accuracy_there, "finished_on", answered)
    target, place, said = Target(made.bundle, None, tmp_path / "out"), Place.parse("ssh://me@orin"), list[str]()
    for _ in range(2):
        record = made.record()
        accuracy_there.score_there(place, target, [record], Names(), said.append)
    if altered:
        assert "scored another file than it measured" in said[0]
        assert not (tmp_path / "out").exists()
        return
    assert calls == [["eval", "--artifact", "fp32"]], "once"
    assert (record["accuracy"]["value"], record["accuracy"]["split"]) == (31 / 70, "eval")
    (path,) = (tmp_path / "out").glob("*.json")
    assert json.loads(path.read_text()) == record
