"""Engines from build to logits, on the fake of every TensorRT version and the fake driver."""

import ast
import ctypes
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kdedge_device
from kdedge_device import trt_bundle
from kdedge_device.bench import bench, open_subject
from kdedge_device.clock import Effort
from kdedge_device.evaluate import check, evaluate
from kdedge_device.failures import (
    CorruptFailure,
    DeviceFailure,
    Failure,
    RuntimeFailure,
    VersionFailure,
)
from kdedge_device.manifest import Bundle
from kdedge_device.runners import OrtRunner
from kdedge_device.trt import Here, flag_bits, load_tensorrt
from kdedge_device.trt_build import BuildOptions, build_engine
from kdedge_device.trt_bundle import build_for_bundle
from kdedge_device.trt_cache import read_engine
from kdedge_device.trt_runner import TrtRunner

from .conftest import linear_model, write_manifest
from .fake_tensorrt import TABLE, VERSIONS, World, make, pack, unpack
from .trt_world import LIBRARY, NEW, OLD, complete, machine, quantized_model

NOT_BUILT = "it needs TensorRT and an engine, which `python run.pyz build` makes"
BATCH = np.random.default_rng(0).normal(size=(5, 1, 4, 4)).astype(np.float32)


@pytest.fixture
def world(fake_cuda: Path) -> Iterator[World]:
    library = ctypes.CDLL(str(fake_cuda / LIBRARY))
    library.fake_host.restype = ctypes.c_void_p
    yield World(cuda=library)
    assert library.fake_live() == 0, "something was not freed"


@pytest.fixture
def library(fake_cuda: Path) -> str:
    return str(fake_cuda / LIBRARY)


@pytest.fixture
def trt_bundle_folder(bundle: Path) -> Path:
    return complete(bundle)


def built(folder: Path, here: Here, precision: str = "int8", **how: object) -> dict:  # type: ignore[type-arg]
    options = BuildOptions(precision, **{"batch": (1, 1, 1), **how})  # type: ignore[arg-type]
    return build_for_bundle(Bundle(folder), options, here=here, timing_folder=str(folder.parent / "timing"))


# ---------------------------------------------------------------- every version


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["int8", "fp16", "fp32"])
def test_an_engine_answers_as_its_onnx_file(
    version: str, precision: str, trt_bundle_folder: Path, world: World
) -> None:
    here = machine(version, world)
    found = built(trt_bundle_folder, here, precision, batch=(1, 2, 3))
    strong = version.startswith("11")
    weak_source = {"int8": "trt", "fp16": "fp16", "fp32": "fp32"}
    assert found["artifact"] == ("trt-fp16" if strong and precision == "int8" else weak_source[precision])
    report = found["side"]["report"]
    assert report["flags"] == ([] if strong else {"int8": ["INT8", "FP16"], "fp16": ["FP16"], "fp32": []}[precision])
    assert (report["strongly_typed"], report["memory_bytes"]) == (strong, 4096)
    assert report["layers"]["int8"] == (1 if precision == "int8" else 0)
    assert report["layers"]["reformats"] == 1
    assert report["warnings"] == ["Using default tactics."]
    with TrtRunner(found["engine"], here) as runner:
        logits = runner.run(BATCH)
        assert runner.input_shape == ["batch", 1, 4, 4]
        assert (runner.version, runner.takes_pixels) == (version, False)
    with OrtRunner(Bundle(trt_bundle_folder).model_path(found["artifact"])) as oracle:
        np.testing.assert_array_equal(logits, oracle.run(BATCH))


def test_every_attribute_is_in_each_version_or_asked_for(trt_bundle_folder: Path, world: World) -> None:
    """Recorded on the fakes: what our code asks TensorRT for. What a version lacks must stand in a hasattr or getattr
    with a default, which the source shows; and no name of TensorRT's in our source stays unasked in these runs."""
    used, asked = names_in_source()
    touched: set[str] = set()
    lacked: set[str] = set()
    for version in VERSIONS:
        world.touched.clear()
        here = machine(version, world)
        for precision in ("int8", "fp16", "fp32"):
            engine = built(trt_bundle_folder, here, precision, batch=(1, 2, 3))["engine"]
            with TrtRunner(engine, here) as runner:
                runner.run(BATCH)
        with pytest.raises(Failure, match=r"cannot read"):
            build_engine(str(trt_bundle_folder / "golden.npz"), BuildOptions(), here)
        touched |= {name for _, name in world.touched}
        lacked |= {name for cls, name in world.touched if not there(cls, name, VERSIONS.index(version))}
    assert lacked == {"platform_has_fast_int8", "device_memory_size_v2"}
    assert lacked <= asked, "used although a version lacks it"
    names = {name for each in TABLE["classes"].values() for name in each.get("names", {})}
    unshown = (used & names) - touched - OURS
    assert sorted(unshown) == [], "no run has shown that TensorRT has these"


# Attributes of our own objects and of the standard library that TensorRT happens to have somewhere, too.
OURS = {"name", "value", "shape", "flags", "log", "errors", "dtype", "device", "version", "type", "size", "engine"}
OURS |= {"allocate", "nbytes", "kind", "itemsize", "logger", "update", "write", "precision", "read", "append", "format"}


def names_in_source() -> tuple[set[str], set[str]]:
    """(every attribute name, the names in hasattr and getattr) of the modules that talk to TensorRT."""
    used: set[str] = set()
    asked: set[str] = set()
    files = sorted(Path(kdedge_device.__file__).parent.glob("trt*.py"))
    assert len(files) >= 8
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("hasattr", "getattr")
            ):
                asked |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    return used, asked


def there(cls: str, name: str, column: int) -> bool:
    """Whether a version has it, in the class or a base of it."""
    table = TABLE["classes"][cls]
    kinds = table.get("names", {}).get(name, "-" * len(VERSIONS))
    return kinds[column] != "-" or any(there(base, name, column) for base in table.get("bases", {}))


def test_the_fake_lacks_what_the_real_one_lacks(world: World) -> None:
    old, new = make(OLD, world), make(NEW, world)
    assert hasattr(old.ICudaEngine, "num_bindings")
    assert not hasattr(new.ICudaEngine, "num_bindings")
    assert not hasattr(new.BuilderFlag, "INT8")
    assert not hasattr(new, "IInt8EntropyCalibrator2")
    assert hasattr(old, "IInt8EntropyCalibrator2")
    with pytest.raises(AttributeError):
        new.NetworkDefinitionCreationFlag.EXPLICIT_BATCH  # noqa: B018
    with pytest.raises(NotImplementedError, match=r"no behaviour for Builder\.reset"):
        new.Builder.reset()
    config = new.Builder(new.ILogger()).create_builder_config()
    with pytest.raises(AttributeError, match=r"int8_calibrator"):
        config.int8_calibrator = None
    assert TABLE["versions"] == VERSIONS
    assert len(VERSIONS) == 8


def test_flags_are_made_from_names_because_their_numbers_moved(world: World) -> None:
    """STRONGLY_TYPED is bit 1 up to 10.16 and bit 0 in 11, where EXPLICIT_BATCH is gone."""
    names = ("EXPLICIT_BATCH", "STRONGLY_TYPED")
    bits = {v: flag_bits(make(v, world).NetworkDefinitionCreationFlag, *names) for v in VERSIONS}
    assert bits == dict(zip(VERSIONS, [1, 1, 3, 3, 3, 3, 1, 1], strict=True))


# ---------------------------------------------------------------- what goes wrong while building


def test_builds_that_fail_say_why(trt_bundle_folder: Path, world: World) -> None:
    here = machine("10.3.0", world)
    model = str(trt_bundle_folder / "model.trt.onnx")
    world.build_error = "10: Could not find any implementation for node {ForeignNode[head]}."
    with pytest.raises(Failure, match=r"Could not find any implementation .* --workspace-mib") as told:
        build_engine(model, BuildOptions(), here)
    assert told.value.exit_code == 2
    world.build_error = "Error Code 2: OutOfMemory (no further information)"
    with pytest.raises(Failure, match=r"Close other programs"):
        build_engine(model, BuildOptions(), here)
    world.build_error = "Something nobody has seen before"
    with pytest.raises(Failure, match=r"could not build .*: Something nobody has seen before"):
        build_engine(model, BuildOptions(), here)
    world.build_error, world.no_driver = "", True
    with pytest.raises(RuntimeFailure, match=r"CUDA initialization failure with error: 35\. Install or update"):
        build_engine(model, BuildOptions(), here)
    world.no_driver, world.fast_int8 = False, False
    with pytest.raises(DeviceFailure, match=r"Fake Orin \(compute capability 8.7\) has no INT8 kernels"):
        build_engine(model, BuildOptions(), here)
    assert build_engine(str(trt_bundle_folder / "model.fp16.onnx"), BuildOptions("fp16"), here)[1]["bytes"] > 0


def test_models_that_cannot_be_read(trt_bundle_folder: Path, tmp_path: Path, world: World) -> None:
    old = machine(OLD, world)
    with pytest.raises(Failure, match=r"cannot be read"):
        build_engine(str(tmp_path / "absent.onnx"), BuildOptions(), old)
    (tmp_path / "text.onnx").write_text("hello, this is no protobuf")
    with pytest.raises(Failure, match=r"Failed to parse the ONNX model"):
        build_engine(str(tmp_path / "text.onnx"), BuildOptions("fp32"), old)
    with pytest.raises(VersionFailure, match=r"TensorRT 8\.5\.3\.1 cannot read .*unsupported opset 20"):
        build_engine(str(trt_bundle_folder / "model.trt-fp16.onnx"), BuildOptions(), old)


def test_batches(tmp_path: Path, world: World) -> None:
    here = machine("10.13.3.9", world)
    (tmp_path / "static.onnx").write_bytes(quantized_model(17, batch=2))
    with pytest.raises(Failure, match=r"takes batches of 2 only; .* Use --batch 2"):
        build_engine(str(tmp_path / "static.onnx"), BuildOptions(), here)
    assert build_engine(str(tmp_path / "static.onnx"), BuildOptions(batch=(2, 2, 2)), here)[1]["batch"] == [2, 2, 2]
    for wrong in ((0, 1, 1), (1, 3, 2), (2, 1, 1)):
        with pytest.raises(Failure, match=r"smallest, best, largest"):
            build_engine("unread", BuildOptions(batch=wrong), here)
    with pytest.raises(Failure, match=r"precision is 'int4'; one of int8, fp16, fp32"):
        build_engine("unread", BuildOptions("int4"), here)
    with pytest.raises(Failure, match=r"workspace is 0 MiB"):
        build_engine("unread", BuildOptions(workspace_mib=0), here)


def test_the_timing_cache_is_kept_by_version_gpu_and_cuda(
    trt_bundle_folder: Path, tmp_path: Path, world: World
) -> None:
    here, folder = machine("10.3.0", world), str(tmp_path / "cache")
    model = str(trt_bundle_folder / "model.trt.onnx")
    (tmp_path / "cache").mkdir()
    states = [build_engine(model, BuildOptions(), here, folder)[1]["timing_cache"] for _ in range(2)]
    assert states == ["new", "used"]
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name == "timing-trt10.3.0-fake-orin-sm8.7-cuda12.6.cache"
    assert file.read_bytes() == b"timed;timed;"
    world.refuse_timing = True
    assert build_engine(model, BuildOptions(), here, folder)[1]["timing_cache"] == "refused"
    assert file.read_bytes() == b"timed;", "a new one was begun"
    (tmp_path / "file").write_text("")
    state = build_engine(model, BuildOptions(), here, str(tmp_path / "file" / "cache"))[1]["timing_cache"]
    assert state == "new, not saved: Not a directory", "a cache never stops a build"
    assert build_engine(model, BuildOptions(), here)[1]["timing_cache"] == "off"


# ---------------------------------------------------------------- the cache of engines


def test_an_engine_is_kept_while_everything_fits(trt_bundle_folder: Path, world: World) -> None:
    here = machine("10.3.0", world)
    first = built(trt_bundle_folder, here)
    assert (first["reused"], first["why"]) == (False, "there was none")
    assert Path(first["engine"]).parent == trt_bundle_folder
    side = json.loads(Path(first["engine"] + ".json").read_text())
    assert side["fingerprint"]["gpu"] == "Fake Orin"
    assert side["fingerprint"]["tensorrt"] == "10.3.0"
    assert side["fingerprint"]["onnx_sha256"] == Bundle(trt_bundle_folder).artifacts["trt"]["sha256"]
    assert "driver" in side["fingerprint"]
    again = built(trt_bundle_folder, here)
    assert (again["engine"], again["reused"]) == (first["engine"], True)
    others = [built(trt_bundle_folder, here, "fp16"), built(trt_bundle_folder, here, workspace_mib=64)]
    others += [built(trt_bundle_folder, machine("10.7.0", world)), built(trt_bundle_folder, here, batch=(1, 1, 2))]
    assert len({each["engine"] for each in (first, *others)}) == 5
    assert not list(trt_bundle_folder.glob("*.part"))
    options = BuildOptions()
    forced = build_for_bundle(Bundle(trt_bundle_folder), options, rebuild=True, here=here, timing_folder="")
    assert (forced["reused"], forced["why"]) == (False, "asked for")


def test_an_altered_engine_is_refused_and_built_again(trt_bundle_folder: Path, world: World) -> None:
    here = machine("10.3.0", world)
    path = Path(built(trt_bundle_folder, here)["engine"])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFailure, match=r"It was altered\. Build it again"), TrtRunner(path, here):
        pass
    path.write_bytes(content[:-1])
    with pytest.raises(CorruptFailure, match=r"its side file says"), TrtRunner(path, here):
        pass
    again = built(trt_bundle_folder, here)
    assert not again["reused"]
    assert "its side file says" in again["why"]
    assert built(trt_bundle_folder, here)["reused"]


def never(*arguments: object) -> None:
    raise AssertionError("TensorRT was given an engine that does not belong here")


def refusing(here: Here) -> Here:
    here.trt.Runtime.deserialize_cuda_engine = never
    return here


@pytest.mark.parametrize(
    ("key", "value", "failure", "words"),
    [
        ("gpu", "Fake Xavier", DeviceFailure, "built for GPU Fake Xavier; this machine has Fake Orin"),
        ("capability", "7.2", DeviceFailure, "compute capability 7.2; this machine has 8.7"),
        ("tensorrt", "8.5.2.2", VersionFailure, "TensorRT 8.5.2.2; this machine has 10.3.0"),
        ("driver", "535.1", VersionFailure, "driver 535.1; this machine has None"),
        ("cuda", "11.4", VersionFailure, "CUDA 11.4; this machine has 12.6"),
        ("onnx_sha256", "0" * 64, VersionFailure, "built from another model.trt.onnx than lies beside it"),
    ],
)
def test_an_engine_from_elsewhere_never_reaches_tensorrt(
    key: str, value: str, failure: type[Failure], words: str, trt_bundle_folder: Path, world: World
) -> None:
    here = machine("10.3.0", world)
    path = Path(built(trt_bundle_folder, here)["engine"])
    side = json.loads(Path(f"{path}.json").read_text())
    side["fingerprint"][key] = value
    Path(f"{path}.json").write_text(json.dumps(side))
    with pytest.raises(failure, match=words), TrtRunner(path, refusing(here)):
        pass


@pytest.mark.parametrize(
    ("text", "failure", "words"),
    [
        (None, CorruptFailure, "one of unknown origin is not loaded"),
        ("{", CorruptFailure, "cannot be read as JSON"),
        ("[]", CorruptFailure, "no whole number 'schema'"),
        ('{"schema": 2}', VersionFailure, "has schema 2; this program reads up to 1"),
        ('{"schema": 1, "sha256": "", "bytes": 3, "onnx_file": ""}', CorruptFailure, "has no dict 'fingerprint'"),
        (
            '{"schema": 1, "fingerprint": {}, "sha256": "", "bytes": 3, "onnx_file": "", "report": {}}',
            DeviceFailure,
            "GPU None",
        ),
    ],
)
def test_side_files_that_are_none(
    text: str | None, failure: type[Failure], words: str, tmp_path: Path, world: World
) -> None:
    (tmp_path / "a.engine").write_bytes(b"abc")
    if text is not None:
        (tmp_path / "a.engine.json").write_text(text)
    here = refusing(machine("10.3.0", world))
    with pytest.raises(failure, match=words), TrtRunner(tmp_path / "a.engine", here):
        pass
    with pytest.raises(Failure, match=r"does not exist"), TrtRunner(tmp_path / "b.engine", here):
        pass


def test_no_side_file_ends_in_a_traceback(trt_bundle_folder: Path, world: World) -> None:
    """Every value of a good one replaced by every kind of JSON: read, or refused with a sentence."""
    here = machine("10.3.0", world)
    path = built(trt_bundle_folder, here)["engine"]
    good = json.loads(Path(f"{path}.json").read_text())
    places = [(key,) for key in good] + [("fingerprint", key) for key in good["fingerprint"]]
    read, told = 0, []
    for place in places:
        for value in (None, True, 0, -1, 1e99, "", "x", [], {}, {"precision": 3}):
            side = json.loads(json.dumps(good))
            inner = side if len(place) == 1 else side[place[0]]
            inner[place[-1]] = value
            Path(f"{path}.json").write_text(json.dumps(side))
            try:
                read_engine(path, here)
                read += 1
            except Failure as error:
                told.append(str(error))
    assert all(text.endswith("--rebuild") for text in told)
    assert read >= 10, "what does not matter for loading (the report, the options) may be anything of its kind"


def test_a_side_file_cannot_name_files_outside(trt_bundle_folder: Path, world: World) -> None:
    here = machine("10.3.0", world)
    path = Path(built(trt_bundle_folder, here)["engine"])
    side = json.loads(Path(f"{path}.json").read_text())
    (trt_bundle_folder.parent / "outside.onnx").write_text("another file")
    side["onnx_file"] = "../outside.onnx"
    Path(f"{path}.json").write_text(json.dumps(side))
    with TrtRunner(path, here) as runner:  # not compared with: no file of that name lies beside the engine
        assert runner.side["onnx_file"] == "../outside.onnx"


def test_a_folder_that_cannot_be_written(trt_bundle_folder: Path, tmp_path: Path, world: World) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match=r"Cannot make the folder .* --engines"):
        build_for_bundle(
            Bundle(trt_bundle_folder),
            BuildOptions(),
            str(tmp_path / "file" / "engines"),
            here=machine(NEW, world),
            timing_folder="",
        )


# ---------------------------------------------------------------- TensorRT's own refusals


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
    monkeypatch.setattr("kdedge_device.trt_runner.read_engine", lambda path, here: (content, {}))
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


# ---------------------------------------------------------------- loading TensorRT


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


# ---------------------------------------------------------------- engines as artifacts of a bundle


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
