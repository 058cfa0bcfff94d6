"""Only what this user built here is run: everything else that a bundle holds, its bringer can have made up."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from kdedge_device import own_key as keys
from kdedge_device.failures import CorruptFailure, Failure
from kdedge_device.manifest import Bundle
from kdedge_device.own_key import is_own, own_key, signature
from kdedge_device.trt_build import BuildOptions
from kdedge_device.trt_bundle import build_for_bundle, find_engine, open_precision
from kdedge_device.trt_cache import engine_name, fingerprint, read_engine, side_path

from .fake_tensorrt import World
from .trt_world import built, machine

KEY = bytes(range(32))


def forge(folder: Path, world: World, options: BuildOptions, **more: object) -> Path:
    """An engine of a stranger, who knows what board it is for: all that goes into the side file is public."""
    content = b"native code of a stranger"
    mark = fingerprint(machine("10.3.0", world), str(Bundle(folder).artifacts["trt"]["sha256"]), options._asdict())
    side = {
        "schema": 1,
        "fingerprint": mark,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "onnx_file": "model.trt.onnx",
        "report": {},
    }
    side = {**json.loads(json.dumps(side)), **more}
    path = folder / engine_name(mark)
    path.write_bytes(content)
    Path(side_path(str(path))).write_text(json.dumps(side))
    return path


@pytest.mark.parametrize("signed", [None, "0" * 64, 7, "\ud800", "by a key of his own"])
def test_a_strangers_engine_is_not_run(signed: object, trt_bundle_folder: Path, world: World) -> None:
    here, bundle, options = machine("10.3.0", world), Bundle(trt_bundle_folder), BuildOptions()
    path = forge(trt_bundle_folder, world, options, **({} if signed is None else {"signature": signed}))
    if signed == "by a key of his own":
        side = json.loads(Path(f"{path}.json").read_text())
        Path(f"{path}.json").write_text(json.dumps({**side, "signature": signature(KEY, side)}))
    with pytest.raises(CorruptFailure, match=r"was not built here by you.*--rebuild"):
        read_engine(str(path), here)
    with pytest.raises(CorruptFailure, match=r"was not built here by you"), open_precision(bundle, "int8", here):
        pass
    again = built(trt_bundle_folder, here)
    assert not again["reused"]
    assert "was not built here by you" in again["why"]
    assert path.read_bytes() != b"native code of a stranger"
    assert read_engine(str(path), here)[1] == again["side"]


def test_nor_is_it_found_under_another_name(trt_bundle_folder: Path, world: World) -> None:
    here, bundle = machine("10.3.0", world), Bundle(trt_bundle_folder)
    forge(trt_bundle_folder, world, BuildOptions(workspace_mib=64))
    assert find_engine(bundle, BuildOptions(), here) is None
    own = built(trt_bundle_folder, here, workspace_mib=128)["engine"]
    found = find_engine(bundle, BuildOptions(), here)
    assert found is not None
    assert found[0] == own


def test_an_engine_of_another_user_is_not_run(
    trt_bundle_folder: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine("10.3.0", world)
    path = built(trt_bundle_folder, here)["engine"]
    assert read_engine(path, here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another's"))
    with pytest.raises(CorruptFailure, match=r"was not built here by you"):
        read_engine(path, here)


def test_the_key_is_made_once_for_this_user_alone(trt_bundle_folder: Path, world: World, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "kdedge" / "engine.key"
    assert not is_own({"signature": "0" * 64})
    assert not file.exists(), "only who builds needs one"
    built(trt_bundle_folder, machine("10.3.0", world))
    key = file.read_bytes()
    assert len(key) == 32
    assert file.stat().st_mode & 0o777 == 0o600
    assert own_key() == own_key() == key
    for path in trt_bundle_folder.iterdir():
        assert key not in path.read_bytes()
        assert key.hex().encode() not in path.read_bytes(), path.name


def test_a_key_that_others_know_is_none(tmp_path: Path) -> None:
    first = own_key()
    document = {"a": 1, "signature": signature(first, {"a": 1})}
    file = tmp_path / "cache" / "kdedge" / "engine.key"
    assert is_own(document)
    file.chmod(0o644)
    assert not is_own(document)
    second = own_key()
    assert second != first
    file.write_bytes(second[:7])  # the power was lost
    third = own_key()
    assert len(third) == 32
    (tmp_path / "planted").write_bytes(KEY)
    (tmp_path / "planted").chmod(0o600)
    file.unlink()
    file.symlink_to(tmp_path / "planted")
    assert not is_own({"a": 1, "signature": signature(KEY, {"a": 1})})
    assert own_key() != KEY
    assert (tmp_path / "planted").read_bytes() == KEY


def test_where_no_key_can_be_kept_nothing_is_built(
    trt_bundle_folder: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(Failure, match=r"Cannot keep .*engine\.key, .*XDG_CACHE_HOME=FOLDER"):
        build_for_bundle(
            Bundle(trt_bundle_folder), BuildOptions(), here=machine("10.3.0", world), timing_folder="", rebuild=True
        )
    assert not list(trt_bundle_folder.glob("*.engine"))


def test_root_by_sudo_takes_and_makes_engines_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run.pyz build`, then `sudo run.pyz bench --set-clocks`; and the other way round."""
    caller = os.getuid()  # his files have to be his own
    mine = own_key()
    home = tmp_path / "home"
    key = home / ".cache" / "kdedge" / "engine.key"
    key.parent.mkdir(parents=True)
    key.write_bytes(KEY)
    key.chmod(0o600)
    monkeypatch.setattr(keys.os, "geteuid", lambda: 0)
    monkeypatch.setattr(keys.pwd, "getpwuid", lambda user: {caller: type("User", (), {"pw_dir": str(home)})}[user])
    assert own_key() == mine
    monkeypatch.setenv("SUDO_UID", str(caller))
    assert own_key() == KEY, "what root builds for him is his afterwards"
    for each in (KEY, mine) if caller == 0 else (KEY,):
        assert is_own({"a": 1, "signature": signature(each, {"a": 1})})
    for unknown in (str(caller + 1), "", "-1", "x"):
        monkeypatch.setenv("SUDO_UID", unknown)
        assert not is_own({"a": 1, "signature": signature(KEY, {"a": 1})})
    monkeypatch.setenv("SUDO_UID", str(caller))
    monkeypatch.setattr(keys.os, "geteuid", lambda: 12345)
    assert not is_own({"a": 1, "signature": signature(KEY, {"a": 1})}), "SUDO_UID is only sudo's word to root"


def test_a_relative_cache_folder_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", "/home/me")
    assert keys.cache_folder() == "/home/me/.cache/kdedge", "never in the current folder, which may be a bundle"
