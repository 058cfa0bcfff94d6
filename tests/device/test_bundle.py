"""A bundle is read, checked and refused with the right sentence."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdedge_device.bench import bench, open_subject
from kdedge_device.check import check
from kdedge_device.clock import Effort
from kdedge_device.evaluate import evaluate, images_a_call, predict
from kdedge_device.failures import BudgetFailure, CorruptFailure, Failure, VersionFailure
from kdedge_device.manifest import Bundle
from kdedge_device.runners import OrtRunner

from .conftest import PREPROCESS, linear_model, write_manifest

SHORT = Effort(0.0, 5, 0.0)


def test_runner_by_value(bundle: Path) -> None:
    batch = np.random.default_rng(0).normal(size=(3, 1, 4, 4)).astype(np.float32)
    runner = OrtRunner(bundle / "model.onnx", threads=2)
    with pytest.raises(Failure, match="not open"):
        runner.run(batch)
    with runner:
        found = runner.run(batch)
        assert runner.input_shape == ["batch", 1, 4, 4]
        with pytest.raises(Failure, match=r"refused an input of shape \(3, 1, 5, 4\)"):
            runner.run(np.zeros((3, 1, 5, 4), np.float32))
    means = batch.mean((1, 2, 3))
    np.testing.assert_allclose(found, np.stack([-means, means], 1), atol=1e-6)
    with pytest.raises(Failure, match="not open"):
        runner.run(batch)
    with pytest.raises(Failure, match="0 threads"):
        OrtRunner(bundle / "model.onnx", threads=0)


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "new.onnx").write_bytes(linear_model(ir_version=99))
    with pytest.raises(CorruptFailure, match=r"cannot load .*text\.onnx"), OrtRunner(tmp_path / "text.onnx"):
        pass
    with pytest.raises(VersionFailure, match=r"too old for .*new\.onnx"), OrtRunner(tmp_path / "new.onnx"):
        pass
    with pytest.raises(Failure, match="does not exist"), OrtRunner(tmp_path / "absent.onnx"):
        pass


def test_verify_names_every_altered_file(bundle: Path) -> None:
    assert Bundle(bundle).verify() == ["golden.npz", "model.onnx"]
    content = bytearray((bundle / "model.onnx").read_bytes())
    content[-1] ^= 1
    (bundle / "model.onnx").write_bytes(content)
    (bundle / "golden.npz").unlink()
    with pytest.raises(CorruptFailure, match=r"golden\.npz is missing .*model\.onnx has sha256"):
        Bundle(bundle).verify()
    with pytest.raises(CorruptFailure, match="altered"):
        Bundle(bundle).model_path()
    (bundle / "model.onnx").write_bytes(content[:-1])
    with pytest.raises(CorruptFailure, match="cut short"):
        Bundle(bundle).model_path()


def test_manifests_that_are_refused(bundle: Path) -> None:
    write_manifest(bundle, schema=2)
    with pytest.raises(VersionFailure, match="schema 2; this program reads up to 1"):
        Bundle(bundle)
    write_manifest(bundle, classes=None)
    with pytest.raises(CorruptFailure, match=r"'classes' is null; a list of different texts"):
        Bundle(bundle)
    write_manifest(bundle, artifacts={"fp32": {"file": "../model.onnx", "sha256": "", "bytes": 0}})
    with pytest.raises(CorruptFailure, match="plain file name"):
        Bundle(bundle)
    (bundle / "manifest.json").write_text("{")
    with pytest.raises(CorruptFailure, match="cannot be read as JSON"):
        Bundle(bundle)
    (bundle / "manifest.json").unlink()
    with pytest.raises(Failure, match="does not exist"):
        Bundle(bundle)


def test_check_compares_golden_logits(bundle: Path) -> None:
    found = check(Bundle(bundle))
    assert found["golden"]["fp32"]["max_abs_difference"] <= 1e-6
    assert found["golden"]["fp32"]["same_class"] == 1.0
    with np.load(bundle / "golden.npz") as arrays:
        images, logits = arrays["images"], arrays["logits__fp32"]
    np.savez(bundle / "golden.npz", images=images, logits__fp32=logits + 0.01)
    write_manifest(bundle)
    with pytest.raises(BudgetFailure, match=r"fp32 differs by 0\.01, tolerated are 1e-05"):
        check(Bundle(bundle))


def save(path: Path, value: int, size: int = 9) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), value).save(path)


def test_predict(bundle: Path, tmp_path: Path) -> None:
    save(tmp_path / "white.png", 255)
    (tmp_path / "text.jpg").write_text("hello")
    found = predict(Bundle(bundle), [str(tmp_path / "white.png"), str(tmp_path / "text.jpg")])
    assert found[0]["class"] == "bright"
    assert found[0]["probability"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert [name for name, _ in found[0]["top"]] == ["bright", "dark"]
    assert "no image format" in found[1]["error"]


def test_evaluate_folder_and_arrays(bundle: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for i, value in enumerate((0, 10, 250)):
        save(data / "dark" / f"{i}.png", value)
    save(data / "bright" / "a" / "0.png", 255)
    (data / "bright" / "notes.txt").write_text("hello")
    found = evaluate(Bundle(bundle), str(data))
    assert (found["accuracy"], found["images"], found["correct"]) == (0.75, 4, 3)
    assert found["per_class"] == {"dark": [2, 3], "bright": [1, 1]}
    assert [Path(each["path"]).name for each in found["unreadable"]] == ["notes.txt"]
    images = np.stack([np.full((6, 6), value, np.uint8) for value in range(0, 250, 5)])
    np.savez(tmp_path / "eval.npz", images=images, labels=np.arange(50) >= 26)
    assert evaluate(Bundle(bundle), str(tmp_path / "eval.npz"))["accuracy"] == 1.0


def test_large_images_are_computed_a_few_at_a_time(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 images of 4096 x 4096 would be 6.4 GB of float32, more than a small board has."""
    found = {side: images_a_call(replace(PREPROCESS, height=side, width=side)) for side in (4, 224, 1024, 4096, 8192)}
    assert found == {4: 32, 224: 32, 1024: 32, 4096: 2, 8192: 1}
    counts, run = list[int](), OrtRunner.run
    monkeypatch.setattr(OrtRunner, "run", lambda self, batch: counts.append(len(batch)) or run(self, batch))
    monkeypatch.setattr("kdedge_device.evaluate._BATCH_BYTES", 3 * 4 * 4 * 4)
    np.savez(tmp_path / "eval.npz", images=np.zeros((7, 4, 4), np.uint8), labels=np.zeros(7, np.int64))
    assert evaluate(Bundle(bundle), str(tmp_path / "eval.npz"))["images"] == 7
    assert counts == [3, 3, 1]


def test_evaluate_refusals(bundle: Path, tmp_path: Path) -> None:
    save(tmp_path / "data" / "brihgt" / "0.png", 255)
    with pytest.raises(Failure, match=r"\['brihgt'\]; only those"):
        evaluate(Bundle(bundle), str(tmp_path / "data"))
    with pytest.raises(Failure, match="does not exist"):
        evaluate(Bundle(bundle), str(tmp_path / "absent"))
    np.savez(tmp_path / "eval.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.array([0, 2]))
    with pytest.raises(Failure, match="from 0 to 1"):
        evaluate(Bundle(bundle), str(tmp_path / "eval.npz"))
    (tmp_path / "data" / "brihgt").rename(tmp_path / "data" / "bright")
    (tmp_path / "data" / "bright" / "0.png").write_text("")
    with pytest.raises(Failure, match=r"No image .* could be read"):
        evaluate(Bundle(bundle), str(tmp_path / "data"))


def test_bench_of_a_bundle_and_of_a_bare_model(bundle: Path, tmp_path: Path) -> None:
    found = bench(open_subject(str(bundle)), SHORT, "custom", threads=1)
    assert found["latency_ms"]["compute"]["count"] == 5
    assert found["latency_ms"]["end_to_end"]["count"] == 5
    assert found["latency_ms"]["with_copies"] is None
    assert found["artifact"]["precision"] == "fp32"
    assert found["artifact"]["sha256"] == Bundle(bundle).artifacts["fp32"]["sha256"]
    assert (found["conditions"]["threads"], found["conditions"]["batch"]) == (1, 1)
    assert found["conditions"]["inputs"] == "golden images"
    assert open_subject(str(bundle / "model.onnx")).preprocess == PREPROCESS, "a file finds the bundle around it"
    (tmp_path / "bare.onnx").write_bytes(linear_model())
    bare = bench(open_subject(str(tmp_path / "bare.onnx")), SHORT, "custom", threads=1, batch=3)
    assert bare["latency_ms"]["end_to_end"] is None
    assert bare["conditions"]["input_shape"] == [3, 1, 4, 4]
    assert bare["throughput_ips"] == pytest.approx(3e3 / bare["latency_ms"]["compute"]["mean"])
    with pytest.raises(Failure, match="A batch of 0"):
        bench(open_subject(str(bundle)), SHORT, "custom", batch=0)
    with pytest.raises(Failure, match="no artifact 'int8'; it has fp32"):
        open_subject(str(bundle), "int8")


def test_the_record_has_the_layout_of_the_contract(bundle: Path) -> None:
    found = bench(open_subject(str(bundle)), SHORT, "custom")
    assert set(found) >= {
        "schema",
        "machine",
        "conditions",
        "artifact",
        "latency_ms",
        "repeats",
        "throughput_ips",
        "energy_mj_per_inference",
        "energy_source",
        "flags",
        "accuracy",
        "started_at",
    }
    assert set(found["latency_ms"]["compute"]) == {"p50", "p90", "p99", "min", "max", "mean", "std", "count"}
    assert found["flags"]["throttled"] is None, "not measured here, so null"
    assert found["energy_mj_per_inference"] is None
    assert found["machine"]["cores"] >= 1
    assert {"file", "sha256", "precision", "runtime", "version"} <= set(found["artifact"])
