"""Engines that run, are refused, are scored and timed, on the fake TensorRT and the fake driver."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest

from kdedge_device import trt_bundle
from kdedge_device.bench import bench, open_subject
from kdedge_device.clock import Effort
from kdedge_device.evaluate import check, evaluate
from kdedge_device.failures import CorruptFailure, DeviceFailure, Failure, RuntimeFailure, VersionFailure
from kdedge_device.manifest import Bundle
from kdedge_device.runners import OrtRunner
from kdedge_device.trt import load_tensorrt
from kdedge_device.trt_runner import TrtRunner

from .conftest import linear_model, write_manifest
from .fake_tensorrt import World, make, pack, unpack
from .trt_world import BATCH, NEW, OLD, built, complete, machine

NOT_BUILT = "it needs TensorRT and an engine, which `python run.pyz build` makes"


@pytest.fixture
def library(fake_cuda: Path) -> str:
    return str(fake_cuda / "libcuda.so.1")


@pytest.mark.parametrize(
    ("change", "failure", "words"),
    [
        ({"version": "8.6.0"}, VersionFailure, "expecting library version 10.3.0 got 8.6.0"),
        ({"capability": "7.2"}, DeviceFailure, "incompatible device, expecting compute 8.7 got compute 7.2"),
        (None, CorruptFailure, "Magic tag does not match"),
    ],
)
def test_what_tensorrt_refuses_is_classified(
    change: dict[str, str] | None,
    failure: type[Failure],
    words: str,
    trt_bundle_folder: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A side file may be right, and the engine still one that this TensorRT does not take."""
    here = machine("10.3.0", world)
    path = built(trt_bundle_folder, here)["engine"]
    header, model = unpack(Path(path).read_bytes())
    header.pop("model")
    content = pack({**header, **change}, model) if change else b"garbage"
    monkeypatch.setattr("kdedge_device.trt_runner.read_engine", lambda path, here, expected: (content, {}))
    with pytest.raises(failure, match=f"{words}.*Build the engine again"), TrtRunner(path, here):
        pass


def test_runs_that_fail(trt_bundle_folder: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine(NEW, world)
    path = built(trt_bundle_folder, here)["engine"]
    runner = TrtRunner(path, here)
    with pytest.raises(Failure, match=r"not open"):
        runner.run(BATCH)
    world.no_context = True
    with pytest.raises(Failure, match=r"cannot run .*OutOfMemory"), TrtRunner(path, here):
        pass
    world.no_context = False
    with runner:
        with pytest.raises(Failure, match=r"refused an input of shape \(1, 1, 4, 5\) and type float32"):
            runner.run(np.zeros((5, 1, 4, 5), np.float32))
        with pytest.raises(Failure, match=r"type uint8"):
            runner.run(np.zeros((5, 1, 4, 4), np.uint8))
        with pytest.raises(Failure, match=r"at least one image"):
            runner.run(BATCH[:0])
        world.fail_run = True
        with pytest.raises(Failure, match=r"refused to run: 3: .*not all shapes"):
            runner.run(BATCH)
        world.fail_run = False
        assert runner.run(BATCH).shape == (5, 2)
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuMemAlloc_v2:2")
    with pytest.raises(RuntimeFailure, match=r"OUT_OF_MEMORY"), TrtRunner(path, here):
        pass


@pytest.mark.parametrize("batch", [(1, 1, 1), (2, 2, 2), (2, 3, 4), (8, 8, 8)])
def test_any_number_of_images_goes_through_any_engine(
    batch: tuple[int, int, int], trt_bundle_folder: Path, world: World
) -> None:
    here = machine("10.16.1.11", world)
    path = built(trt_bundle_folder, here, batch=batch)["engine"]
    with OrtRunner(trt_bundle_folder / "model.trt.onnx") as oracle, TrtRunner(path, here) as runner:
        for count in (1, 2, 5):
            np.testing.assert_array_equal(runner.run(BATCH[:count]), oracle.run(BATCH[:count]))


def test_an_engine_of_a_fixed_batch(bundle: Path, world: World) -> None:
    here = machine(OLD, world)
    (bundle / "model.onnx").write_bytes(linear_model(batch=2))
    write_manifest(bundle)
    path = built(bundle, here, "fp32", batch=(2, 2, 2))["engine"]
    means = BATCH.mean((1, 2, 3))
    with TrtRunner(path, here) as runner:
        assert runner.input_shape == [2, 1, 4, 4]
        np.testing.assert_allclose(runner.run(BATCH), np.stack([-means, means], 1), atol=1e-6)


def test_loading(library: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    for kdedge, line in ((object(), r"pip install 'kdedge\[tensorrt\]'"), (None, "pip install tensorrt")):
        monkeypatch.setattr("importlib.util.find_spec", {"kdedge": kdedge}.get)
        with pytest.raises(RuntimeFailure, match=line):
            load_tensorrt(library)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorrt", make("10.3.0", world))
    here = load_tensorrt(library)
    assert (here.version, here.gpu.name, here.library, here.weakly_typed) == ("10.3.0", "Fake Orin", library, True)
    with pytest.raises(RuntimeFailure, match=r"TensorRT needs a GPU\. No CUDA driver can be loaded") as told:
        load_tensorrt(str(tmp_path / "absent.so"))
    assert told.value.exit_code == 6
    ancient = types.SimpleNamespace(__version__="8.2.1", ICudaEngine=object)
    monkeypatch.setitem(sys.modules, "tensorrt", ancient)
    with pytest.raises(VersionFailure, match=r"TensorRT is 8\.2\.1; 8\.5 or newer is needed"):
        load_tensorrt(library)


def test_a_broken_installation_is_told(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeFailure, match=r"cannot be loaded \(libnvinfer.so.10: cannot open"):
        load_tensorrt(library)


def test_the_right_file_for_the_version(trt_bundle_folder: Path, world: World) -> None:
    old, new = machine(OLD, world), machine(NEW, world)
    complete(trt_bundle_folder, leave_out=("fp16", "trt-fp16"))
    found = Bundle(trt_bundle_folder)
    assert trt_bundle.source_artifact(found, "fp16", old) == "fp32", "the FP16 flag makes it one"
    with pytest.raises(Failure, match=r"has no model\.fp16\.onnx, .* for TensorRT 11\.4\.0\.106 .* export --fp16"):
        trt_bundle.source_artifact(found, "fp16", new)
    with pytest.raises(Failure, match=r"has no model\.trt-fp16\.onnx, .*kdedge export --int8"):
        trt_bundle.source_artifact(found, "int8", new)


def test_engines_are_checked_and_scored(trt_bundle_folder: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine("10.3.0", world)
    monkeypatch.setattr("kdedge_device.trt_bundle.load_tensorrt", lambda: here)
    found = Bundle(trt_bundle_folder)
    assert check(found)["not_run"] == dict.fromkeys(("trt", "trt-fp16"), NOT_BUILT), "TensorRT is not even loaded"
    built(trt_bundle_folder, here)
    document = check(found)
    assert document["golden"]["trt"]["same_class"] == 1.0
    assert document["not_run"] == {
        "trt-fp16": "The artifact 'trt-fp16' is not for TensorRT 10.3.0, which takes model.trt.onnx."
    }
    images = np.stack([np.full((4, 4), value, np.uint8) for value in range(0, 250, 5)])
    np.savez(trt_bundle_folder / "eval.npz", images=images, labels=np.arange(50) >= 26)
    assert evaluate(found, str(trt_bundle_folder / "eval.npz"), "trt")["accuracy"] == 1.0
    monkeypatch.setattr("kdedge_device.trt_bundle.load_tensorrt", lambda: machine("10.7.0", world))
    assert "There is no engine of 'trt' for this machine" in check(found)["not_run"]["trt"]
    with pytest.raises(RuntimeFailure, match=r"build --artifact int8"):
        evaluate(found, str(trt_bundle_folder / "eval.npz"), "trt")


def test_an_altered_engine_fails_the_check(
    trt_bundle_folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine("10.3.0", world)
    monkeypatch.setattr("kdedge_device.trt_bundle.load_tensorrt", lambda: here)
    path = Path(built(trt_bundle_folder, here)["engine"])
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CorruptFailure, match=r"its side file says"):
        check(Bundle(trt_bundle_folder))


def test_engines_are_timed_with_and_without_copies(
    trt_bundle_folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine(NEW, world)
    for module in ("trt_bundle", "trt_runner"):
        monkeypatch.setattr(f"kdedge_device.{module}.load_tensorrt", lambda: here)
    with pytest.raises(RuntimeFailure, match=r"There is no engine of 'trt-fp16' for this machine"):
        open_subject(str(trt_bundle_folder), "trt-fp16")
    path = built(trt_bundle_folder, here)["engine"]
    effort = Effort(0.0, 5, 0.0)
    for subject in (open_subject(str(trt_bundle_folder), "trt-fp16"), open_subject(path)):
        found = bench(subject, effort, "custom")
        assert (found["artifact"]["runtime"], found["artifact"]["version"]) == ("tensorrt", NEW)
        assert (found["artifact"]["precision"], found["artifact"]["file"]) == ("int8", Path(path).name)
        assert [found["latency_ms"][part]["count"] for part in ("compute", "with_copies", "end_to_end")] == [5, 5, 5]
        assert found["conditions"]["threads"] is None
    with pytest.raises(Failure, match=r"refused an input of shape \(2, 1, 4, 4\)"):
        bench(open_subject(path), effort, "custom", batch=2)
