"""`run.pyz info` answers whatever is missing, broken or too old, and its reasons say what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kdedge_device
from kdedge_device import __main__ as program
from kdedge_device import board, info, watch
from kdedge_device.cuda_driver import Gpu
from kdedge_device.cuda_probe import Probe
from kdedge_device.packages import Found, look_for
from kdedge_device.trt import Here
from kdedge_device.trt_cache import fingerprint, write_engine

from . import boards
from .conftest import write_manifest

ROOT = Path(kdedge_device.__file__).parents[1]
HERE = {name: Found("1.0", "") for name in ("numpy", "pillow", "onnxruntime", "tensorrt")}
NO_GPU = Probe((), "No CUDA driver can be loaded.")


def told(monkeypatch: pytest.MonkeyPatch, path: object = None, **changes: Found) -> dict[str, Any]:
    """The document of a machine that has all packages but for `changes`, and no GPU."""
    monkeypatch.setattr(info, "look_for", lambda: {**HERE, **changes})
    monkeypatch.setattr(info, "probe", lambda: NO_GPU)
    document, text, _ = info.info(None if path is None else str(path))
    assert json.loads(json.dumps(document, allow_nan=False)) == json.loads(json.dumps(document))
    assert "can run:" in text
    return document


def test_what_a_whole_machine_can(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = told(monkeypatch, bundle)
    assert document["can"] == {
        "check": None,
        "build": "No CUDA driver can be loaded.",
        "bench": None,
        "eval": None,
        "predict": None,
    }
    assert document["runtimes"]["cuda_driver"] is None
    assert document["manifest"]["shipped"] == "fp32"
    assert set(document["board"]) == set(board.Board._fields)


def test_reasons_name_everything_that_is_missing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Found(None, "it is not installed")
    can = told(monkeypatch, bundle, numpy=absent, onnxruntime=absent, tensorrt=absent)["can"]
    assert can["bench"].endswith("Install: pip install numpy onnxruntime")
    assert can["check"].endswith("Install: pip install numpy"), "hashes need no runtime"
    assert can["build"].endswith("sudo apt install nvidia-jetpack")
    can = told(monkeypatch, bundle, onnxruntime=absent)["can"]
    assert (can["check"], can["bench"]) == (None, "No CUDA driver can be loaded."), "TensorRT needs one"
    illegal = Found(None, "importing it crashed (SIGILL)")
    can = told(monkeypatch, bundle, onnxruntime=illegal, tensorrt=absent)["can"]
    assert can["bench"].endswith("Install: pip install 'onnxruntime<1.21'")


def test_engines_are_looked_for_where_onnx_runtime_is_not(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jetson as export/JETSON.md sets it up: before `build` it can run nothing, and after it all."""
    orin = Gpu("Orin", "8.7", 8 << 30, "12.6", "540.4.0", True)
    absent, gpu = Found(None, "it is not installed"), Probe((orin,), "")

    def can() -> dict[str, str | None]:
        monkeypatch.setattr(info, "look_for", lambda: {**HERE, "onnxruntime": absent, "tensorrt": Found("10.3.0", "")})
        monkeypatch.setattr(info, "probe", lambda: gpu)
        found: dict[str, str | None] = info.info(str(bundle))[0]["can"]
        return found

    before = can()
    assert (before["check"], before["build"]) == (None, None)
    for command in ("bench", "eval", "predict"):
        assert str(before[command]).endswith("no engine for this machine yet. Build one with: python run.pyz build")
    for version, ready in (("8.5.2", False), ("10.3.0", True)):
        mark = fingerprint(Here(None, version, orin), "0" * 64, {"precision": "int8"})
        write_engine(str(bundle / f"{version}.engine"), b"native code", mark, "model.onnx", {})
        assert all((can()[command] is None) is ready for command in ("bench", "eval", "predict"))


def test_bundles_that_are_absent_or_bad(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = told(monkeypatch)
    assert (document["bundle"], document["manifest"], "error" in document) == (None, None, False)
    assert document["can"]["bench"] is None, "of a file"
    assert "--bundle FOLDER" in document["can"]["predict"]
    document = told(monkeypatch, tmp_path)
    assert document["exit_code"] == 2
    assert document["can"]["check"] == document["error"]
    write_manifest(bundle, schema=9)
    assert program.main(["info", "--bundle", str(bundle)]) == 3
    assert "schema 9" in capsys.readouterr().out, "with all the rest"


def test_a_jetson_of_jetpack_4_can_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = board.identify()._replace(model="Jetson Nano", family="nano", l4t="32.7.1", jetpack="4.6")
    monkeypatch.setattr(board, "identify", lambda: old)
    assert all("JetPack 5 or newer is needed" in why for why in told(monkeypatch, bundle)["can"].values())
    assert program.main(["check", "--bundle", str(bundle)]) == 3


@pytest.mark.parametrize("name", sorted(boards.ALL))
def test_the_state_of_every_board(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(boards.ALL[name](tmp_path))
    monkeypatch.setattr(info, "snapshot", lambda: watch.snapshot(root))
    state = told(monkeypatch)["state"]
    assert state["power_mode"] == watch.snapshot(root)["power_mode"]
    text = info.info(None)[1]
    if state["power_mode"]:
        assert "power mode {name} ({id})".format(**state["power_mode"]) in text
    if state["temperatures_c"]:
        assert f"{max(state['temperatures_c'].values()):.0f} degrees" in text


def test_packages_are_imported_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is fine, one is another machine's, one cannot be imported, one crashes as it ends, one is not there."""
    contents = {
        "fine": "print('hello')\n__version__ = '1.2'",
        "illegal": "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
        "broken": "raise ImportError('libnothing.so.1: cannot open shared object file')",
        "late": "import atexit, os; __version__ = '3'; atexit.register(os.abort)",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = look_for({name: name for name in (*contents, "nowhere_to_be_found")})
    assert found["fine"] == Found("1.2", "")
    assert found["illegal"] == Found(None, "importing it crashed (SIGILL)")
    assert found["broken"].reason.startswith("it cannot be imported (ImportError: libnothing.so.1")
    assert found["late"] == Found("3", ""), "some runtimes crash when the process ends"
    assert found["nowhere_to_be_found"] == Found(None, "it is not installed")
    assert look_for({"slow": "fine"}, timeout_seconds=0.0)["slow"].reason == "importing it did not end in 0 seconds"


def test_without_numpy_everything_else_is_told_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\")")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for command, code in ((["check"], 6), (["eval"], 6), (["bench", "x.onnx"], 6), (["info"], 0)):
        done = subprocess.run(
            [sys.executable, "-m", "kdedge_device", *command, "--json"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        document = json.loads(done.stdout)
        assert done.returncode == code, done.stderr
        assert "pip install numpy" in (document["error"] if code else document["can"]["check"])
