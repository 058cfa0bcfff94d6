"""A bundle from a stranger: refused with a reason and the right exit code; nothing executed, or written outside."""

import json
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kdedge_device import __main__ as program
from kdedge_device import info
from kdedge_device.cuda_probe import Probe
from kdedge_device.failures import CorruptFailure
from kdedge_device.manifest import Bundle
from kdedge_device.packages import PACKAGES, Found
from kdedge_device.plain_files import open_plain

from .conftest import entry, linear_model, write_manifest

ARTIFACT = {"precision": "fp32", "golden_tolerance": 1e-5}
COMMANDS = (["info"], ["check"], ["eval"], ["predict", "image.npy"], ["bench", "--seconds", "0", "--runs", "1"])


@pytest.fixture
def outside(bundle: Path) -> Path:
    """The folder around the bundle, with a file that no bundle may touch or read."""
    (bundle.parent / "secret.onnx").write_bytes(linear_model())
    np.save(bundle.parent / "image.npy", np.zeros((4, 4), np.uint8))
    return bundle.parent


def tree(folder: Path) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes() if path.is_file() and not path.is_symlink() else str(path.lstat().st_mode)
    return found


@pytest.fixture
def refuse(
    bundle: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs commands on the bundle, all unless named; each has to end with `code`, and to leave the disk as it was."""

    def run(code: int, *names: str) -> str:
        monkeypatch.chdir(outside)
        monkeypatch.setattr(info, "look_for", lambda: dict.fromkeys(PACKAGES, Found("1", "")))  # five processes
        monkeypatch.setattr(info, "probe", lambda: Probe((), "none"))
        before, sentence = tree(outside), ""
        for command in COMMANDS:
            if names and command[0] not in names:
                continue
            found = program.main([*command, "--bundle", str(bundle), "--json"])
            document = json.loads(capsys.readouterr().out)
            assert (found, document["exit_code"], document["schema"]) == (code, code, 1), (command, document)
            sentence = document["error"]
        assert tree(outside) == before, "something was written"
        return sentence

    return run


Refuse = Callable[..., str]


def named(bundle: Path, file: str) -> None:
    """A manifest whose one artifact is `file`, with the hash that the secret outside has."""
    artifact = {"file": file, **entry(bundle.parent / "secret.onnx"), **ARTIFACT}
    write_manifest(bundle, artifacts={"fp32": artifact})


def test_the_bundle_itself_is_taken(bundle: Path, outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is refused below is refused for the one thing that is wrong with it."""
    image = outside / "image.npy"
    for command in (["info"], ["check"], ["predict", str(image)]):
        assert program.main([*command, "--bundle", str(bundle), "--json"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    ["../secret.onnx", "sub/../../secret.onnx", "..", ".", "", "a/b", "a\\b", "C:\\x", "a\0b", "~", "-rf", "\x1b[2J"],
)
def test_names_that_lead_elsewhere(bundle: Path, refuse: Refuse, name: str) -> None:
    named(bundle, name)
    assert "a plain file name" in refuse(5)
    write_manifest(bundle, files={name: entry(bundle / "golden.npz"), "golden.npz": entry(bundle / "golden.npz")})
    assert "a plain file name" in refuse(5, "check")
    write_manifest(bundle, engines={name: entry(bundle / "golden.npz")})
    assert "a plain file name" in refuse(5, "check")


def test_an_absolute_path(bundle: Path, outside: Path, refuse: Refuse) -> None:
    named(bundle, str(outside / "secret.onnx"))
    assert "a plain file name" in refuse(5)


def test_an_altered_byte(bundle: Path, refuse: Refuse) -> None:
    for file, commands in (("model.onnx", ("check", "bench", "predict")), ("golden.npz", ("check",))):
        content = (bundle / file).read_bytes()
        (bundle / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert "was altered" in refuse(5, *commands)
        (bundle / file).write_bytes(content)


def test_links_are_not_followed(bundle: Path, outside: Path, refuse: Refuse) -> None:
    """Also where the hash of what they lead to is right: another program would be told what lies there."""
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to(outside / "secret.onnx")
    assert "is a link; a plain file was expected" in refuse(5, "check", "bench", "predict")
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to(outside)
    assert "is a link" in refuse(5, "check", "predict")
    (bundle / "manifest.json").rename(outside / "manifest.json")
    (bundle / "manifest.json").symlink_to(outside / "manifest.json")
    assert "manifest.json is a link" in refuse(5)
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").symlink_to(outside / "nothing")
    assert "manifest.json is a link" in refuse(5)


def test_a_bundle_reached_by_a_link_is_taken(bundle: Path, outside: Path) -> None:
    (outside / "shortcut").symlink_to(bundle)
    assert Bundle(outside / "shortcut").model_path() == str(outside / "shortcut" / "model.onnx")


def test_pipes_sockets_folders_and_devices(bundle: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe without a writer would be waited for until somebody pulls the plug."""
    for file, commands in (("model.onnx", ("check", "predict")), ("manifest.json", ())):
        content = (bundle / file).read_bytes()
        (bundle / file).unlink()
        os.mkfifo(bundle / file)
        assert f"{file} is a pipe" in refuse(5, *commands)
        (bundle / file).unlink()
        (bundle / file).mkdir()
        assert f"{file} is a folder" in refuse(5, *commands)
        (bundle / file).rmdir()
        (bundle / file).write_bytes(content)
    monkeypatch.chdir(bundle)  # the path of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        with pytest.raises(CorruptFailure, match="is a socket"):
            open_plain("socket")
    with pytest.raises(CorruptFailure, match="/dev/zero is a device"):
        open_plain("/dev/zero")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"schema": 1, "schema": 1}', "the key 'schema' stands there twice"),
        (b'{"schema": NaN}', "NaN is no JSON number"),
        (b'{"schema": -Infinity}', "-Infinity is no JSON number"),
        (b'{"schema": 1e999}', "too large"),
        (b'{"schema": 1' + b"0" * 5000 + b"}", "a number of 5001 digits"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"schema": 1, "x": ' + b"[" * 40 + b"]" * 40 + b"}", "more than 32 levels deep"),
        (b'{"schema": "\xff"}', "can't decode byte 0xff"),
        (b"\xff\xfe{\x00}\x00", "can't decode"),
        (b"", "cannot be read as JSON"),
        (b"[1]", "no whole number 'schema'"),
        (b'{"schema": true}', "no whole number 'schema'"),
        (b'{"schema": 0}', "no whole number 'schema'"),
        (b'{"schema": 1.0}', "no whole number 'schema'"),
        (b'{"schema": 1}', "'artifacts' is missing"),
    ],
)
def test_manifests_that_are_no_json_or_two(bundle: Path, refuse: Refuse, text: bytes, why: str) -> None:
    (bundle / "manifest.json").write_bytes(text)
    assert why in refuse(5)


def test_a_newer_schema_and_a_manifest_without_end(bundle: Path, refuse: Refuse) -> None:
    write_manifest(bundle, schema=2)
    assert "schema 2; this program reads up to 1. Use the run.pyz of that bundle" in refuse(3)
    os.truncate(bundle / "manifest.json", 1 << 40)  # with holes: the disk has none of it
    path = bundle / "manifest.json"
    with pytest.raises(CorruptFailure, match="more than 16 MiB"):
        Bundle(bundle)
    path.unlink()


def test_sizes_nobody_has(bundle: Path, refuse: Refuse) -> None:
    big = {**entry(bundle / "golden.npz"), "bytes": 1 << 60}
    write_manifest(bundle, files={"golden.npz": big})
    assert "'files.golden.npz.bytes' is 1152921504606846976; a whole number from 0" in refuse(5)
    write_manifest(bundle, files={"golden.npz": {**big, "bytes": 1 << 32}})
    assert "the manifest says 4294967296" in refuse(5, "check")
    write_manifest(
        bundle, preprocess={**json.loads((bundle / "manifest.json").read_text())["preprocess"], "width": 1 << 20}
    )
    assert "'preprocess.width' is 1048576; a whole number of pixels from 1 to 4096" in refuse(5)


def test_names_that_are_one_on_some_disks(bundle: Path, refuse: Refuse) -> None:
    golden = entry(bundle / "golden.npz")
    for names in (("Golden.npz", "golden.npz"), ("MODEL.onnx",), ("model.onnx",), ("Manifest.json",)):
        write_manifest(bundle, files=dict.fromkeys(names, golden))
        assert "twice, or with letters of another case" in refuse(5)


class Trap:
    """What unpickling it would do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_pickles_are_not_loaded(bundle: Path, refuse: Refuse) -> None:
    """As an array of objects, as a member that is a pickle, and as a whole file that is one."""
    with np.load(bundle / "golden.npz") as arrays:
        images, logits = arrays["images"], arrays["logits__fp32"]
    np.savez(bundle / "golden.npz", images=np.array([Trap()]), logits__fp32=logits)
    write_manifest(bundle)
    assert "Python objects" in refuse(5, "check")
    np.savez(bundle / "golden.npz", images=images, logits__fp32=logits, extra=np.array([Trap()]))
    write_manifest(bundle)
    assert Bundle(bundle).golden().keys() == {"images", "logits__fp32"}, "what nobody asks for is not even read"
    with zipfile.ZipFile(bundle / "golden.npz", "w") as archive:
        archive.writestr("images.npy", pickle.dumps(Trap()))
    write_manifest(bundle)
    assert "no .npy array" in refuse(5, "check")
    (bundle / "golden.npz").write_bytes(pickle.dumps(Trap()))
    write_manifest(bundle)
    assert "no whole .npz file" in refuse(5, "check")


def test_arrays_that_claim_to_be_large(bundle: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999, 4, 4, 1), }"
    with zipfile.ZipFile(bundle / "golden.npz", "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 9)
    write_manifest(bundle)
    assert "should hold 159999984 bytes" in refuse(5, "check")
    images = np.zeros((1 << 20, 4, 4, 1), np.uint8)
    np.savez_compressed(bundle / "golden.npz", images=images, logits__fp32=np.zeros((1, 2), np.float32))
    assert (bundle / "golden.npz").stat().st_size < 40_000
    write_manifest(bundle)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1 << 12, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert "it takes 16 MiB; half of this machine's memory, 8 MiB" in refuse(5, "check")


def external(name: str, location: str) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2, 1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def hidden(place: str, location: str) -> bytes:
    """The linear model with a tensor that lies in another file: its weight, or one of a node, branch or function."""
    model = onnx.load_from_string(linear_model())
    graph = model.graph
    if place == "initializer":
        graph.initializer[0].CopyFrom(external("weight", location))
    constant = helper.make_node("Constant", [], ["c"])
    constant.attribute.append(helper.make_attribute("value", external("c", location)))
    if place == "attribute":
        graph.node.append(constant)
    if place == "branch":
        branch = helper.make_graph([constant], "b", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, None)])
        graph.node.append(helper.make_node("If", ["condition"], ["d"], then_branch=branch, else_branch=branch))
    if place == "function":
        model.functions.append(helper.make_function("own", "f", [], ["c"], [constant], [helper.make_opsetid("", 17)]))
    if place == "sparse":
        graph.sparse_initializer.append(
            onnx.SparseTensorProto(values=external("v", location), indices=external("i", location), dims=[2])
        )
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("location", ["../secret.onnx", "/etc/hostname", "weights.bin"])
@pytest.mark.parametrize("place", ["initializer", "attribute", "branch", "function", "sparse"])
def test_models_that_read_other_files(bundle: Path, refuse: Refuse, place: str, location: str) -> None:
    (bundle / "weights.bin").write_bytes(b"\0" * 8)
    (bundle / "model.onnx").write_bytes(hidden(place, location))
    write_manifest(bundle)
    assert "keeps tensors in other files" in refuse(5, "check", "bench", "predict")


def test_models_that_are_none(bundle: Path, refuse: Refuse) -> None:
    for content in (b"", b"hello", linear_model()[:-3], b"\x0b" + linear_model(), b"\xff" * 11):
        (bundle / "model.onnx").write_bytes(content)
        write_manifest(bundle)
        assert "is no ONNX file" in refuse(5, "check", "predict")


def test_a_model_of_other_classes_than_the_manifest_names(bundle: Path, refuse: Refuse) -> None:
    write_manifest(bundle, classes=["one"])
    assert "[1, 2], [1, 1]" in refuse(5, "predict").replace("of shape ", "").replace("; ", ", ")
    assert "golden.npz has logits__fp32" in refuse(5, "check")


def test_what_is_printed_cannot_move_the_cursor(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(bundle, classes=["\x1b[2J\x1b]0;owned\x07dark", "\ud800bright"])
    assert program.main(["info", "--bundle", str(bundle)]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert r"\x1b[2J" in told
    assert r"\ud800bright" in told


def test_a_link_in_the_way_of_the_answer(bundle: Path, outside: Path) -> None:
    """The file beside --out is made anew: a link of its name, put there by the bundle, is not written through."""
    planted = bundle / f"answer.json.{os.getpid()}.part"
    planted.symlink_to(outside / "secret.onnx")
    before = (outside / "secret.onnx").read_bytes()
    assert program.main(["info", "--bundle", str(bundle), "--out", str(bundle / "answer.json")]) == 2
    assert (outside / "secret.onnx").read_bytes() == before
