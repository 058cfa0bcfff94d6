"""Building engines, on the fake of every TensorRT version: what is asked of it, what it answers, what goes wrong."""

import ast
from pathlib import Path

import numpy as np
import pytest

import kdedge_device
from kdedge_device.failures import DeviceFailure, Failure, RuntimeFailure, VersionFailure
from kdedge_device.manifest import Bundle
from kdedge_device.runners import OrtRunner
from kdedge_device.trt import flag_bits
from kdedge_device.trt_build import BuildOptions, build_engine
from kdedge_device.trt_runner import TrtRunner

from .fake_tensorrt import TABLE, VERSIONS, World, make
from .trt_world import BATCH, NEW, OLD, built, machine, quantized_model


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


def test_what_was_timed_in_one_power_mode_is_not_used_in_another(
    trt_bundle_folder: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, model = machine("10.3.0", world), str(trt_bundle_folder / "model.trt.onnx")
    told = []
    for name in ("MAXN_SUPER", "15W", "MAXN_SUPER"):
        monkeypatch.setattr("kdedge_device.trt_build.power_mode", lambda name=name: {"id": 0, "name": name})
        report = build_engine(model, BuildOptions(), here, str(tmp_path / "cache"))[1]
        told.append((report["power_mode"], report["timing_cache"]))
    assert told == [("MAXN_SUPER", "new"), ("15W", "new"), ("MAXN_SUPER", "used")]
    assert any(file.name.endswith("cuda12.6-15w.cache") for file in (tmp_path / "cache").iterdir())


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
