"""Which engine is kept, and that none from elsewhere ever reaches TensorRT."""

import json
import os
from pathlib import Path

import pytest

from kdedge_device.failures import CorruptFailure, DeviceFailure, Failure, VersionFailure
from kdedge_device.manifest import Bundle
from kdedge_device.own_key import own_key, signature
from kdedge_device.trt import Here
from kdedge_device.trt_build import BuildOptions
from kdedge_device.trt_bundle import build_for_bundle, find_engine
from kdedge_device.trt_cache import read_engine, write_atomically
from kdedge_device.trt_runner import TrtRunner

from .fake_tensorrt import World
from .trt_world import NEW, built, machine, sign


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
    with pytest.raises(CorruptFailure, match=r"It was altered\. Build the engine again"), TrtRunner(path, here):
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
    path = str(Path(built(trt_bundle_folder, here)["engine"]).rename(trt_bundle_folder / "other.engine"))
    (side_file,) = trt_bundle_folder.glob("*.engine.json")
    side_file.rename(f"{path}.json")
    good = json.loads(Path(f"{path}.json").read_text())
    bundle, found = Bundle(trt_bundle_folder), []
    assert find_engine(bundle, BuildOptions(), here)
    places = [(key,) for key in good if key != "signature"] + [("fingerprint", key) for key in good["fingerprint"]]
    places += [("fingerprint", "options", key) for key in good["fingerprint"]["options"]]
    read, told = 0, []
    for place in places:
        for value in (None, True, 0, -1, 1e99, "", "x", [], {}, {"precision": 3}):
            side = json.loads(json.dumps(good))
            inner = side
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            Path(f"{path}.json").write_text(json.dumps({**side, "signature": signature(own_key(), side)}))
            found.append(find_engine(bundle, BuildOptions(), here) is not None)
            try:
                read_engine(path, here)
                read += 1
            except Failure as error:
                told.append(str(error))
    assert all(text.endswith("--rebuild") for text in told)
    assert any(found)
    assert not all(found), "what is of another machine, model or precision is not taken"
    assert read >= 10, "what does not matter for loading (the report, the options) may be anything of its kind"


def test_a_side_file_cannot_name_files_outside(trt_bundle_folder: Path, world: World) -> None:
    here = machine("10.3.0", world)
    path = Path(built(trt_bundle_folder, here)["engine"])
    (trt_bundle_folder.parent / "outside.onnx").write_text("another file")
    sign(path, onnx_file="../outside.onnx")
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


def test_links_are_neither_read_nor_written_through(trt_bundle_folder: Path, tmp_path: Path, world: World) -> None:
    here = machine("10.3.0", world)
    path = Path(built(trt_bundle_folder, here)["engine"])
    side = Path(f"{path}.json")
    for file in (path, side):
        moved = file.rename(tmp_path / file.name)
        file.symlink_to(moved)
        with pytest.raises(CorruptFailure, match=r"is a link; a plain file was expected"), TrtRunner(path, here):
            pass
        file.unlink()
        moved.rename(file)
    (tmp_path / "victim").write_text("kept")
    planted = tmp_path / f"new.{os.getpid()}.part"
    planted.symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_atomically(str(tmp_path / "new"), b"x")
    assert (tmp_path / "victim").read_text() == "kept"
