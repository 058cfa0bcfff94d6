"""Engines that run, are refused, are scored and timed, on the fake TensorRT and the fake driver."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from kdedge_device import trt_bundle
from kdedge_device.bench import bench, measure, open_subject
from kdedge_device.bench_offline import offline
from kdedge_device.check import check
from kdedge_device.clock import Effort
from kdedge_device.evaluate import evaluate
from kdedge_device.failures import BudgetFailure, CorruptFailure, DeviceFailure, Failure, RuntimeFailure, VersionFailure
from kdedge_device.manifest import Bundle
from kdedge_device.runners import OrtRunner
from kdedge_device.trt import load_tensorrt
from kdedge_device.trt_build import BuildOptions
from kdedge_device.trt_launch import Access
from kdedge_device.trt_runner import TrtRunner

from . import boards
from .conftest import linear_model, write_manifest
from .fake_cuda_modules import TABLE, make_pycuda
from .fake_tensorrt import VERSIONS, World, make, pack, unpack
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
    for module in ("check", "trt_bundle"):
        monkeypatch.setattr(f"kdedge_device.{module}.load_tensorrt", lambda: here)
    found = Bundle(trt_bundle_folder)
    assert check(found)["not_run"] == dict.fromkeys(("trt", "trt-fp16"), NOT_BUILT), "TensorRT is not even loaded"
    engine = Path(built(trt_bundle_folder, here)["engine"]).name
    document = check(found)
    assert (document["golden"][engine]["artifact"], document["golden"][engine]["same_class"]) == ("trt", 1.0)
    assert document["not_run"] == {
        "trt-fp16": "The artifact 'trt-fp16' is not for TensorRT 10.3.0, which takes model.trt.onnx."
    }
    images = np.stack([np.full((4, 4), value, np.uint8) for value in range(0, 250, 5)])
    np.savez(trt_bundle_folder / "eval.npz", images=images, labels=np.arange(50) >= 26)
    assert evaluate(found, str(trt_bundle_folder / "eval.npz"), "trt")["accuracy"] == 1.0
    monkeypatch.setattr("kdedge_device.check.load_tensorrt", lambda: machine("10.7.0", world))
    monkeypatch.setattr("kdedge_device.trt_bundle.load_tensorrt", lambda: machine("10.7.0", world))
    assert "There is no engine of 'trt' for this machine" in check(found)["not_run"]["trt"]
    with pytest.raises(RuntimeFailure, match=r"build --artifact int8"):
        evaluate(found, str(trt_bundle_folder / "eval.npz"), "trt")


def test_an_altered_engine_fails_the_check(
    trt_bundle_folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine("10.3.0", world)
    monkeypatch.setattr("kdedge_device.check.load_tensorrt", lambda: here)
    path = Path(built(trt_bundle_folder, here)["engine"])
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CorruptFailure, match=r"its side file says"):
        check(Bundle(trt_bundle_folder))


def golden(folder: Path, **shifts: float) -> None:
    """The golden logits of those artifacts moved, `shifts` in shares of their span."""
    with np.load(folder / "golden.npz") as arrays:
        moved = dict(arrays)
    for name, share in shifts.items():
        moved[f"logits__{name}"] = moved[f"logits__{name}"] + share * np.ptp(moved[f"logits__{name}"])
    np.savez(folder / "golden.npz", **moved)
    artifacts = Bundle(folder).artifacts
    write_manifest(folder, artifacts={name: {**each, "golden_tolerance": 1e-5} for name, each in artifacts.items()})


def test_engines_of_every_precision_are_compared(
    trt_bundle_folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that a gate ships too: each by its own golden logits, with room for TF32 and FP16, but not for more."""
    here = machine(NEW, world)
    monkeypatch.setattr("kdedge_device.check.load_tensorrt", lambda: here)
    monkeypatch.setattr("kdedge_device.trt_bundle.load_tensorrt", lambda: here)
    files = {Path(built(trt_bundle_folder, here, each)["engine"]).name: each for each in ("fp32", "fp16", "int8")}
    eight = Path(built(trt_bundle_folder, here, "fp16", batch=(8, 8, 8), workspace_mib=64)["engine"]).name
    golden(trt_bundle_folder, fp32=0.02, fp16=-0.02)
    monkeypatch.setattr("kdedge_device.check.why_not_onnxruntime", lambda bundle, name: "not installed")
    found = check(Bundle(trt_bundle_folder))
    told = {name: each["artifact"] for name, each in found["golden"].items()}
    assert told == {name: "trt-fp16" if each == "int8" else each for name, each in files.items()} | {eight: "fp16"}
    assert all(each["runtime"] == "tensorrt" for each in found["golden"].values())
    assert set(found["not_run"]) == {"trt"}
    golden(trt_bundle_folder, fp16=-0.02)
    with pytest.raises(
        BudgetFailure, match=r"give other logits than at export: .*fp16.*differs by .*; .*fp16"
    ) as error:
        check(Bundle(trt_bundle_folder))
    assert eight in str(error.value)
    assert not any(name in str(error.value) for name, each in files.items() if each != "fp16")


def test_engines_are_timed_with_and_without_copies(
    trt_bundle_folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine(NEW, world)
    for module in ("bench_subject", "trt_bundle", "trt_runner"):
        monkeypatch.setattr(f"kdedge_device.{module}.load_tensorrt", lambda: here)
    with pytest.raises(RuntimeFailure, match=r"There is no engine of 'trt-fp16' for this machine"):
        open_subject(str(trt_bundle_folder), "trt-fp16")
    path = built(trt_bundle_folder, here)["engine"]
    effort = Effort(0.0, 5, 0.0)
    for subject in (open_subject(str(trt_bundle_folder), "trt-fp16"), open_subject(path)):
        found = bench(subject, effort, "custom")
        assert (found["artifact"]["runtime"], found["artifact"]["version"]) == ("tensorrt", NEW)
        assert (found["artifact"]["precision"], found["artifact"]["file"]) == ("int8", Path(path).name)
        assert found["artifact"]["onnx_sha256"] == Bundle(trt_bundle_folder).artifacts["trt-fp16"]["sha256"]
        assert [found["latency_ms"][part]["count"] for part in ("compute", "with_copies", "end_to_end")] == [5, 5, 5]
        conditions = found["conditions"]
        assert (conditions["threads"], conditions["cuda"], conditions["buffers"]) == (None, "ctypes", "pinned")
        assert (conditions["cuda_graph"], conditions["cuda_graph_why_not"]) == (False, None)
        assert conditions["timed_by"]["compute"] == "CUDA events"
        assert (conditions["headline"], found["machine"]["gpu"]) == ("with_copies", "Fake Orin")
        assert found["throughput_ips"] == pytest.approx(1e3 / found["latency_ms"]["with_copies"]["mean"])
    with pytest.raises(Failure, match=r"refused an input of shape \(2, 1, 4, 4\)"):
        bench(open_subject(path), effort, "custom", batch=2)
    with pytest.raises(Failure, match=r"There is no engine 'int3'; --artifact takes one of trt, trt-fp16, int8, fp16"):
        open_subject(str(trt_bundle_folder), "int3", tensorrt=True)
    assert open_subject(str(trt_bundle_folder), tensorrt=True).name == "trt-fp16"
    assert open_subject(str(trt_bundle_folder)).name == "fp32", "the shipped one"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert open_subject(str(trt_bundle_folder)).model_path == path, "where there is no ONNX Runtime for that"
    monkeypatch.undo()
    for module in ("bench_subject", "trt_bundle", "trt_runner"):
        monkeypatch.setattr(f"kdedge_device.{module}.load_tensorrt", lambda: here)
    big = built(trt_bundle_folder, here, "fp16", batch=(8, 8, 8))["engine"]
    with pytest.raises(Failure, match=r"computes 8 images a call, also for 1\. Measure it with --batch 8"):
        bench(open_subject(big), effort, "custom")
    found = offline(open_subject(big), effort, "custom", access=Access(buffers="zero-copy", graph=True))
    assert (found["conditions"]["batch"], found["conditions"]["offline"]["samples"]) == (8, 8)
    assert (found["conditions"]["cuda_graph"], found["conditions"]["buffers"]) == (True, "zero-copy")
    assert set(found["latency_ms"].values()) == {None}
    assert found["throughput_ips"] == 8 / found["conditions"]["offline"]["seconds"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("version", VERSIONS)
def test_graphs_and_zero_copy_give_the_same_logits(version: str, trt_bundle_folder: Path, world: World) -> None:
    here = machine(version, world)
    path = built(trt_bundle_folder, here, batch=(1, 2, 4))["engine"]
    with TrtRunner(path, here) as plain:
        expected = [plain.run(BATCH[:count]) for count in (1, 3, 5)]
        assert plain.conditions()["cuda_graph"] is False
    with TrtRunner(path, here, access=Access(buffers="zero-copy", graph=True)) as runner:
        for _ in range(2):  # captured first, then launched
            for count, logits in zip((1, 3, 5), expected, strict=True):
                np.testing.assert_array_equal(runner.run(BATCH[:count]), logits)
        assert runner.compute_ns() >= 0
        assert (runner.conditions()["cuda_graph"], runner.conditions()["buffers"]) == (True, "zero-copy")


def test_a_graph_that_cannot_be_captured_is_done_without(
    trt_bundle_folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine(NEW, world)
    path = built(trt_bundle_folder, here)["engine"]
    with TrtRunner(path, here) as plain:
        expected = plain.run(BATCH)
    for call in ("cuStreamBeginCapture_v2:900", "cuStreamEndCapture:901", "cuGraphInstantiateWithFlags:1"):
        monkeypatch.setenv("FAKE_CUDA_FAIL", call)
        with TrtRunner(path, here, access=Access(graph=True)) as runner:
            if call.startswith("cuStreamEndCapture"):  # a driver that cannot even end a capture: nothing runs any more
                with pytest.raises(RuntimeFailure, match=r"CAPTURE_UNSUPPORTED"):
                    runner.run(BATCH)
                monkeypatch.delenv("FAKE_CUDA_FAIL")
                continue
            np.testing.assert_array_equal(runner.run(BATCH), expected)
            assert runner.conditions()["cuda_graph"] is False
            assert f"refused {call.split(':')[0]}" in runner.conditions()["cuda_graph_why_not"]
    monkeypatch.delenv("FAKE_CUDA_FAIL", raising=False)
    for name, module in make_pycuda(TABLE["pycuda"]["versions"][-1], world.cuda).items():
        monkeypatch.setitem(sys.modules, name, module)
    with TrtRunner(path, here, access=Access("pycuda", graph=True)) as runner:
        np.testing.assert_array_equal(runner.run(BATCH), expected)
        told = runner.conditions()
        assert (told["cuda"], told["cuda_graph"]) == ("pycuda", False)
        assert "pycuda has no CUDA graphs" in told["cuda_graph_why_not"]


def test_buffers_follow_the_memory_of_the_machine(
    trt_bundle_folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine(NEW, world)
    path = built(trt_bundle_folder, here)["engine"]
    for integrated, buffers in (("0", "pinned"), ("1", "zero-copy")):
        monkeypatch.setenv("FAKE_CUDA_INTEGRATED", integrated)
        with TrtRunner(path, here, access=Access(buffers="auto")) as runner:
            assert runner.run(BATCH).shape == (5, 2)
            assert runner.conditions()["buffers"] == buffers


def test_the_engine_that_fits_best_is_taken(trt_bundle_folder: Path, tmp_path: Path, world: World) -> None:
    here, found = machine("10.3.0", world), Bundle(trt_bundle_folder)

    def best(batch: int, folder: str | None = None) -> str | None:
        fits = trt_bundle.find_engine(found, BuildOptions("int8", (batch,) * 3), here, folder)
        return None if fits is None else Path(fits[0]).name

    assert best(1) is None
    (trt_bundle_folder / "of-unknown-origin.engine").write_bytes(b"x")
    whole = Path(built(trt_bundle_folder, here, batch=(1, 4, 8))["engine"])
    assert (best(1), best(2), best(9)) == (whole.name,) * 3
    four = Path(built(trt_bundle_folder, here, batch=(4, 4, 4), workspace_mib=64)["engine"])
    assert (best(1), best(4)) == (whole.name, four.name)
    exact = Path(built(trt_bundle_folder, here)["engine"])
    assert (best(1), best(2)) == (exact.name, whole.name)
    built(trt_bundle_folder, machine("10.7.0", world), batch=(2, 2, 2))
    assert best(2) == whole.name, "one for another TensorRT is left where it lies"
    elsewhere = trt_bundle.build_for_bundle(
        found, BuildOptions("int8", (2, 2, 2)), str(tmp_path), here=here, timing_folder=""
    )
    assert best(2, str(tmp_path)) == Path(elsewhere["engine"]).name
    with trt_bundle.open_engine(found, "trt", here, batch=4) as runner:
        assert runner.run(BATCH).shape == (5, 2)


def test_an_engine_of_another_model_is_refused_also_without_that_model(trt_bundle_folder: Path, world: World) -> None:
    """The manifest tells which model it has to be of; a file beside the engine need not be there."""
    here = machine("10.3.0", world)
    path = Path(built(trt_bundle_folder, here)["engine"])
    side = json.loads(Path(f"{path}.json").read_text())
    side["fingerprint"]["onnx_sha256"], side["onnx_file"] = "0" * 64, "gone.onnx"
    Path(f"{path}.json").write_text(json.dumps(side))
    runner = trt_bundle.open_engine(Bundle(trt_bundle_folder), "trt", here)
    with pytest.raises(VersionFailure, match=r"built from another model or with other options"), runner:
        pass
    renamed = path.rename(path.with_name("other.engine"))
    Path(f"{path}.json").rename(f"{renamed}.json")
    with pytest.raises(RuntimeFailure, match=r"no engine of 'trt' for this machine\. Those that are here were built"):
        trt_bundle.open_engine(Bundle(trt_bundle_folder), "trt", here)


def test_a_record_tells_the_state_of_the_board(
    trt_bundle_folder: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the watch tells of a board is in the record; what energy is by value, is shown where it is computed."""
    here = machine("10.3.0", world)
    monkeypatch.setattr("kdedge_device.trt_runner.load_tensorrt", lambda: here)
    monkeypatch.setattr("kdedge_device.bench._SHORTEST_FOR_ENERGY_S", 0.1)
    subject = open_subject(built(trt_bundle_folder, here)["engine"])
    board = str(boards.orin_nano(tmp_path / "root"))
    found = measure(subject, Effort(0.1, 5, 0.0), "custom", root=board, idle_s=0.05).record
    conditions = found["conditions"]
    assert conditions["power_mode"] == {"id": 2, "name": "MAXN_SUPER"}
    assert conditions["clocks_mhz"]["after"]["gpu"]["cur"] == 1020
    assert conditions["board"]["jetpack"] == "6.2"
    assert found["energy_source"]["source"].startswith("power rails")
    assert found["flags"]["throttled"] is False
    assert found["flags"]["unstable"] is not found["stability"]["stable"]
    short = bench(subject, Effort(0.0, 5, 0.0), "custom", root=board)
    assert (short["energy_mj_per_inference"], short["energy_source"]) == (None, None), "too short to read a rail"
    json.dumps(found, allow_nan=False)
