"""`python -m kdedge_device build` as a user runs it, with a fake TensorRT and a fake driver on the process's paths."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kdedge_device
from kdedge.errors import BundleError, DeviceError, ExportError, KdedgeError, MissingPackage
from kdedge_export.trt.engines import build_here, engine_logits

from .trt_world import NEW, OLD, complete

ROOT = Path(kdedge_device.__file__).parents[1]
# What stands for the installed package: it makes the fake in the process that imports it.
PACKAGE = """
import ctypes, importlib.util, os, sys
if os.environ.get("FAKE_TENSORRT_CRASH"):
    os.abort()
spec = importlib.util.spec_from_file_location("fake_tensorrt", {source!r})
fake = importlib.util.module_from_spec(spec)
sys.modules["fake_tensorrt"] = fake
spec.loader.exec_module(fake)
cuda = ctypes.CDLL("libcuda.so.1")
cuda.fake_host.restype = ctypes.c_void_p
world = fake.World(cuda=cuda, capability=os.environ.get("FAKE_CUDA_CAPABILITY", "8.7"))
trt = sys.modules["tensorrt"] = fake.make(os.environ["FAKE_TENSORRT"], world)
if os.environ.get("FAKE_TENSORRT_BUILD_KILLED"):
    trt.Builder.build_serialized_network = lambda *_: os.kill(os.getpid(), 9)
"""


@pytest.fixture
def board(tmp_path: Path, fake_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a machine with a GPU and TensorRT 10.3.0; the folder is where its cache goes."""
    (tmp_path / "site").mkdir()
    source = str(Path(__file__).with_name("fake_tensorrt.py"))
    (tmp_path / "site" / "tensorrt.py").write_text(PACKAGE.format(source=source))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path / "site")]))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake_cuda))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_TENSORRT", "10.3.0")
    return tmp_path


def build(*arguments: object) -> tuple[int, dict]:  # type: ignore[type-arg]
    command = [sys.executable, "-m", "kdedge_device", "build", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout)


def test_build_keep_and_build_again(bundle: Path, board: Path) -> None:
    complete(bundle)
    code, first = build(bundle)
    assert (code, first["reused"], first["artifact"]) == (0, False, "trt")
    assert Path(first["engine"]).parent == bundle
    assert list((board / "cache" / "kdedge" / "tensorrt").iterdir()), "the timing cache is the user's own"
    assert build(bundle, "--rebuild")[1]["why"] == "asked for"
    code, other = build(bundle, "--artifact", "fp16", "--batch", 4, "--engines", board / "engines")
    assert (code, Path(other["engine"]).parent) == (0, board / "engines")
    assert other["side"]["report"]["batch"] == [4, 4, 4]
    done = subprocess.run(
        [sys.executable, "-m", "kdedge_device", "build", bundle], capture_output=True, text=True, check=True
    )
    assert "(kept)\nlayers: 1 int8, " in done.stdout


def test_bench_measures_the_engines_side_by_side_and_builds_what_is_missing(bundle: Path, board: Path) -> None:
    """Each build and each measurement is a process of its own."""
    complete(bundle, leave_out=("fp16",))
    words = ["--artifact", "all", "--build", "--rounds", 1, "--seconds", 0, "--runs", 5, "--warm-up", 0]
    command = [sys.executable, "-m", "kdedge_device", "bench", bundle, *words, "--engines", board / "e", "--json"]
    environment = {**os.environ, "FAKE_TENSORRT": NEW, "FAKE_CUDA_INTEGRATED": "1"}
    done = subprocess.run([str(each) for each in command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    told = [(each["artifact"]["name"], each["artifact"]["precision"]) for each in found["records"]]
    assert told == [("fp32", "fp32"), ("trt-fp16", "int8")]
    assert {each["artifact"]["runtime"] for each in found["records"]} == {"tensorrt"}
    for record in found["records"]:
        conditions = record["conditions"]
        assert (conditions["buffers"], conditions["cuda_graph"]) == ("zero-copy", True), "the defaults of bench"
        assert record["latency_ms"]["with_copies"]["count"] == 5
    assert set(found["not_run"]) == {"fp16"}
    assert "kdedge export --fp16" in found["not_run"]["fp16"]
    assert len(list((board / "e").glob("*.engine"))) == 2


def bench_all(folder: Path, *more: object) -> tuple[int, dict]:  # type: ignore[type-arg]
    words = ["--artifact", "all", "--build", "--rounds", 1, "--seconds", 0, "--runs", 5, "--warm-up", 0, *more]
    command = [sys.executable, "-m", "kdedge_device", "bench", str(folder), *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout)


def test_bench_keeps_an_engine_that_fits_and_never_takes_the_cpu_for_one(
    bundle: Path, board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after "build --workspace-mib 256" on a small board, where a build with more is killed."""
    complete(bundle)
    assert build(bundle, "--artifact", "fp32", "--workspace-mib", 256)[0] == 0
    (kept,) = bundle.glob("*.engine")
    monkeypatch.setenv("FAKE_TENSORRT_BUILD_KILLED", "1")
    code, found = bench_all(bundle)
    assert (code, [each["artifact"]["file"] for each in found["records"]]) == (0, [kept.name])
    assert set(found["failed"]) == {"fp16", "trt"}
    assert "There is no INT8 engine: its build ended with code -9" in found["failed"]["trt"]
    kept.unlink()
    code, found = bench_all(bundle)
    assert (code, found["records"], set(found["failed"])) == (1, [], {"fp32", "fp16", "trt"})
    monkeypatch.delenv("FAKE_TENSORRT_BUILD_KILLED")
    code, found = bench_all(bundle, "--batch", 2, "--workspace-mib", 64)
    assert (code, len(found["records"]), found["failed"]) == (0, 3, {})
    options = [json.loads(side.read_text())["fingerprint"]["options"] for side in bundle.glob("*.engine.json")]
    assert sorted(each["precision"] for each in options if each["batch"] == [2, 2, 2]) == ["fp16", "fp32", "int8"]
    assert {each["workspace_mib"] for each in options if each["batch"] == [2, 2, 2]} == {64}


def test_exit_codes(bundle: Path, board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(bundle, leave_out=("trt-fp16",))
    code, document = build(bundle, "--artifact", "int3")
    assert (code, document["class"]) == (2, "Failure")
    assert build(bundle, "--batch", 0)[0] == 2
    monkeypatch.setenv("FAKE_TENSORRT", NEW)
    code, document = build(bundle)
    assert (code, "kdedge export --int8" in document["error"]) == (2, True)
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "0")
    code, document = build(bundle)
    assert (code, document["class"]) == (6, "RuntimeFailure")
    assert "finds no GPU" in document["error"]
    monkeypatch.delenv("FAKE_CUDA_DEVICES")
    monkeypatch.setenv("FAKE_TENSORRT", OLD)
    (bundle / "model.trt.onnx").write_bytes(b"altered")
    assert build(bundle)[0] == 5
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code, document = build(bundle)
    assert (code, "pip install 'kdedge[tensorrt]'" in document["error"]) == (6, True)


def test_a_driver_that_crashes_is_told_before_tensorrt_is_imported(
    bundle: Path, board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT 11 would end the process."""
    complete(bundle)
    monkeypatch.setenv("FAKE_CUDA_CRASH", "1")
    monkeypatch.setenv("FAKE_TENSORRT_CRASH", "1")
    code, document = build(bundle)
    assert (code, "crashed (SIGABRT)" in document["error"]) == (6, True)


def test_export_builds_in_a_process_of_its_own(bundle: Path, board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(bundle)
    monkeypatch.syspath_prepend(board / "site")
    found = build_here(bundle)
    assert set(found) == {"int8", "fp16"}
    assert Path(found["int8"]["engine"]).is_file()
    assert found["int8"]["side"]["report"]["layers"]["int8"] == 1
    with np.load(bundle / "golden.npz") as golden:
        np.save(board / "images.npy", golden["images"])
        expected = golden["logits__trt"]
    np.testing.assert_allclose(engine_logits(bundle, "int8", board / "images.npy"), expected, atol=0.01)
    with pytest.raises(DeviceError, match=r"There is no engine of 'fp32' for this machine"):
        engine_logits(bundle, "fp32", board / "images.npy")
    assert "tensorrt" not in sys.modules, "a crash of TensorRT would end the export"
    monkeypatch.setenv("FAKE_TENSORRT_CRASH", "1")
    with pytest.raises(DeviceError, match=r"ended with SIGABRT while it built"):
        build_here(bundle)
    with pytest.raises(DeviceError, match=r"ended with SIGABRT while it ran the INT8 engine"):
        engine_logits(bundle, "int8", board / "images.npy")
    monkeypatch.delenv("FAKE_TENSORRT_CRASH")
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "0")
    with pytest.raises(DeviceError, match=r"TensorRT needs a GPU\. The CUDA driver finds no GPU"):
        build_here(bundle)


def test_export_names_what_is_missing(bundle: Path, board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"tensorrt is not installed; .* pip install 'kdedge\[tensorrt\]'"):
        build_here(bundle)
    monkeypatch.undo()
    assert issubclass(ExportError, KdedgeError)
    assert issubclass(BundleError, KdedgeError)


def test_export_tells_an_altered_bundle(bundle: Path, board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(bundle)
    monkeypatch.syspath_prepend(board / "site")
    (bundle / "model.trt.onnx").write_bytes(b"altered")
    with pytest.raises(BundleError, match=r"model\.trt\.onnx has 7 bytes"):
        build_here(bundle)
    complete(bundle, leave_out=("trt",))
    with pytest.raises(ExportError, match=r"has no model\.trt\.onnx"):
        build_here(bundle, precisions=("int8",))
