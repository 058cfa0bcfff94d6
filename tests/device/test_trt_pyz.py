"""The commands of run.pyz on a bundle's engines, with the fake TensorRT of every version; foreign engines stay shut."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdedge_device.manifest import Bundle
from kdedge_device.trt_cache import side_path
from kdedge_export.bundle import name_engines
from kdedge_export.pyz import build_pyz

from .conftest import entry
from .fake_tensorrt import VERSIONS
from .trt_world import NEW, OLD

# Several commands in one process, which is what takes the time. Each prints its exit code and its document.
DRIVER = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])
sys.argv[0] = sys.argv[1]
from kdedge_device.__main__ import main
for command in json.loads(sys.argv[2]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([*command, "--json"])
    print(json.dumps([code, json.loads(out.getvalue())]))
"""
# What stands for the installed package. Where an engine is deserialized is noted in a file.
PACKAGE = """
import ctypes, importlib.util, os, sys
spec = importlib.util.spec_from_file_location("fake_tensorrt", {source!r})
fake = importlib.util.module_from_spec(spec)
sys.modules["fake_tensorrt"] = fake
spec.loader.exec_module(fake)
library = ctypes.CDLL("libcuda.so.1")
library.fake_host.restype = ctypes.c_void_p
world = fake.World(cuda=library)
module = fake.make(os.environ["FAKE_TENSORRT"], world)
load = module.Runtime.deserialize_cuda_engine
def noted(self, content):
    with open({log!r}, "a") as file:
        file.write("deserialized\\n")
    return load(self, content)
module.Runtime.deserialize_cuda_engine = noted
sys.modules["tensorrt"] = module
"""

Run = Callable[..., list[tuple[int, dict[str, Any]]]]


@pytest.fixture
def run(trt_bundle_folder: Path, fake_cuda: Path, tmp_path: Path) -> Run:
    """run(version, command, ...) -> [(exit code, document), ...], on a board of that TensorRT."""
    bundle, site = trt_bundle_folder, tmp_path / "site"
    build_pyz(bundle / "run.pyz")
    site.mkdir()
    source, log = str(Path(__file__).with_name("fake_tensorrt.py")), str(tmp_path / "log")
    (site / "tensorrt.py").write_text(PACKAGE.format(source=source, log=log))
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "LD_LIBRARY_PATH": str(fake_cuda),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def commands(version: str, *given: Sequence[object], **changes: str) -> list[tuple[int, dict[str, Any]]]:
        arguments = json.dumps([[str(each) for each in command] for command in given])
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(bundle / "run.pyz"), arguments],
            env={**environment, "FAKE_TENSORRT": version, **changes},
            capture_output=True,
            text=True,
            check=False,
        )
        answers = [(code, document) for code, document in map(json.loads, done.stdout.splitlines())]
        assert len(answers) == len(given), (done.returncode, done.stderr)
        return answers

    return commands


def deserialized(tmp_path: Path) -> int:
    """Times that TensorRT was given an engine."""
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.parametrize("version", VERSIONS)
def test_every_command_on_every_version(version: str, run: Run, trt_bundle_folder: Path, tmp_path: Path) -> None:
    images = np.stack([np.full((4, 4, 1), value, np.uint8) for value in (0, 255)])
    np.savez(tmp_path / "eval.npz", images=images, labels=np.array([0, 1]))
    artifact = "trt" if int(version.split(".")[0]) < 11 else "trt-fp16"
    named = ["--artifact", artifact]
    before, built, checked, scored, answered, fp32, _, half, best = run(
        version,
        ["check"],
        ["build"],
        ["check"],
        ["eval", "--data", tmp_path / "eval.npz", *named],
        ["predict", tmp_path / "eval.npz", *named],
        ["predict", tmp_path / "eval.npz", "--artifact", "fp32", "--runtime", "tensorrt"],
        ["build", "--artifact", "fp16"],
        ["eval", "--data", tmp_path / "eval.npz", "--artifact", "fp16", "--runtime", "tensorrt"],
        ["eval", "--data", tmp_path / "eval.npz", "--runtime", "tensorrt"],
    )
    assert before[0] == 0
    assert artifact in before[1]["not_run"], "ONNX Runtime proves the rest where nothing was built yet"
    assert (built[0], built[1]["artifact"], built[1]["reused"]) == (0, artifact, False)
    assert checked[0] == 0
    compared = checked[1]["golden"][Path(built[1]["engine"]).name]
    assert (compared["artifact"], compared["runtime"]) == (artifact, "tensorrt")
    assert compared["max_abs_difference"] <= compared["tolerance"]
    assert artifact not in checked[1]["not_run"]
    assert (scored[0], scored[1]["accuracy"], scored[1]["runtime"]) == (0, 1.0, "tensorrt")
    assert scored[1]["version"] == version
    assert [each["class"] for each in answered[1]["predictions"]] == ["dark", "bright"]
    assert (fp32[0], fp32[1]["class"]) == (6, "RuntimeFailure"), "of FP32 there is no engine"
    assert "run.pyz build --artifact fp32" in fp32[1]["error"]
    assert (half[1]["artifact"], half[1]["runtime"], half[1]["accuracy"]) == ("fp16", "tensorrt", 1.0)
    assert best[1]["artifact"] == "int8", "the first of int8, fp16 and fp32 that is here"


HIDE = """
import builtins, importlib.util, sys
real_find, real_import = importlib.util.find_spec, builtins.__import__

def find(name, *rest):
    return None if name == "onnxruntime" else real_find(name, *rest)

def load(name, *rest, **named):
    if name == "onnxruntime" and sys._getframe(1).f_globals["__name__"] == "kdedge_device.runners":
        raise ImportError("No module named 'onnxruntime'")
    return real_import(name, *rest, **named)

importlib.util.find_spec, builtins.__import__ = find, load
"""


def test_a_board_without_onnx_runtime_takes_its_engines(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", np.full((4, 4), 255, np.uint8))
    np.savez(tmp_path / "data.npz", images=np.full((1, 4, 4), 255, np.uint8), labels=np.array([1]))
    # The fake TensorRT itself runs on ONNX Runtime: only run.pyz is not to find it.
    (tmp_path / "site" / "sitecustomize.py").write_text(HIDE)
    before, (built, _), after = run(NEW, ["check"], ["build"], ["check"])
    assert (before[0], before[1]["golden"]) == (0, {}), "as export/JETSON.md goes: check, build, check"
    assert "pip install onnxruntime" in before[1]["not_run"]["fp32"]
    assert built == 0
    assert (after[0], [each["artifact"] for each in after[1]["golden"].values()]) == (0, ["trt-fp16"])
    assert set(after[1]["not_run"]) == {"fp16", "fp32", "trt"}
    (answered, scored) = run(NEW, ["predict", tmp_path / "image.npy"], ["eval", "--data", tmp_path / "data.npz"])
    assert (answered[0], answered[1]["predictions"][0]["class"]) == (0, "bright")
    assert (scored[0], scored[1]["artifact"], scored[1]["runtime"]) == (0, "int8", "tensorrt")


def test_an_engine_from_elsewhere_is_never_deserialized(run: Run, trt_bundle_folder: Path, tmp_path: Path) -> None:
    """Of another GPU, TensorRT or driver, under the name that this machine looks for; altered; and without papers."""
    ((_, built),) = run(OLD, ["build"])
    engine = Path(built["engine"])
    papers = json.loads(Path(side_path(str(engine))).read_text())
    image = tmp_path / "image.npy"
    np.save(image, np.zeros((4, 4), np.uint8))
    mark = papers["fingerprint"]
    cases: list[tuple[str | None, int]] = [
        (json.dumps({**papers, "fingerprint": {**mark, "gpu": "Another GPU"}}), 4),
        (json.dumps({**papers, "fingerprint": {**mark, "tensorrt": "8.6.0"}}), 3),
        (json.dumps({**papers, "fingerprint": {**mark, "driver": "1.0"}}), 3),
        (json.dumps({**papers, "fingerprint": {**mark, "onnx_sha256": "0" * 64}}), 3),
        (json.dumps({**papers, "fingerprint": {}}), 4),
        (json.dumps({**papers, "schema": 2}), 3),
        (json.dumps({**papers, "sha256": "0" * 64}), 5),
        (json.dumps({**papers, "signature": "0" * 64}), 5),
        (json.dumps({**papers, "report": {"seconds": 1.0}}), 5),
        *((text, 5) for text in ("[" * 100_000, "{", "[]", '{"schema": NaN}', '{"schema": 1, "schema": 1}')),
        (None, 5),
    ]
    copies = []
    for number, (text, _) in enumerate(cases):
        copies.append(tmp_path / f"copy{number}")
        shutil.copytree(trt_bundle_folder, copies[-1])
        side = copies[-1] / Path(side_path(engine.name))
        if text is None:
            side.unlink()
        else:
            side.write_text(text)
    altered = tmp_path / "altered"
    shutil.copytree(trt_bundle_folder, altered)
    (altered / engine.name).write_bytes(engine.read_bytes()[:-1] + b"?")
    before = deserialized(tmp_path)
    wanted = [code for _, code in cases] + [5]
    commands = [["predict", image, "--artifact", "trt", "--bundle", copy] for copy in (*copies, altered)]
    answers = run(OLD, *commands)
    assert [code for code, _ in answers] == wanted
    assert all(document["error"] for _, document in answers)
    checks = run(OLD, *(["check", "--bundle", copy] for copy in copies[:2]))
    assert [code for code, _ in checks] == [0, 0], "the rest of the bundle is as it was"
    assert all("trt" in document["not_run"] for _, document in checks)
    assert deserialized(tmp_path) == before, "TensorRT was given none of them"
    assert run(OLD, ["predict", image, "--artifact", "trt"])[0][0] == 0
    assert deserialized(tmp_path) > before


def test_the_manifest_names_the_engines_of_an_export(run: Run, trt_bundle_folder: Path, tmp_path: Path) -> None:
    bundle = trt_bundle_folder
    ((_, built),) = run(NEW, ["build"])
    name_engines(bundle)
    engine = Path(built["engine"])
    named = Bundle(bundle).document["engines"][engine.name]
    assert {key: named[key] for key in ("sha256", "bytes")} == entry(engine)
    assert (named["tensorrt"], named["precision"], named["gpu"]) == (NEW, "int8", built["side"]["fingerprint"]["gpu"])
    ((code, document),) = run(NEW, ["check"])
    assert (code, document["engines"]) == (0, {engine.name: "unaltered"})
    shutil.copytree(bundle, tmp_path / "copy", ignore=shutil.ignore_patterns("*.engine"))
    answers = run(NEW, ["check", "--bundle", tmp_path / "copy"], ["info", "--bundle", tmp_path / "copy"])
    assert [code for code, _ in answers] == [0, 0]
    assert answers[0][1]["engines"] == {engine.name: "not here"}
    assert answers[1][1]["can"]["build"] is None
    engine.write_bytes(b"FAKEPLAN of another build")
    states = Bundle(bundle).engines()
    assert states == {engine.name: "built again since"}
