"""`python -m kdedge_device`: one JSON document, the exit codes of the contract, one process for each measurement."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kdedge_device
from kdedge_device import __main__ as program

from .conftest import linear_model, write_manifest

PACKAGE = Path(kdedge_device.__file__).parent


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:  # type: ignore[type-arg]
    code = program.main([str(each) for each in arguments] + ["--json"])
    return code, json.loads(capsys.readouterr().out)


def test_info_and_check(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = run(capsys, "info", "--bundle", bundle)
    assert (code, document["manifest"]["classes"]) == (0, ["dark", "bright"])
    code, document = run(capsys, "check", "--bundle", bundle)
    assert (code, document["files"]) == (0, ["golden.npz", "model.onnx"])
    assert program.main(["info", "--bundle", str(bundle)]) == 0
    assert "(shipped)" in capsys.readouterr().out


def test_exit_codes(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = run(capsys, "info", "--bundle", tmp_path)
    assert (code, document["class"], document["exit_code"]) == (2, "Failure", 2)
    write_manifest(bundle, schema=7)
    assert run(capsys, "info", "--bundle", bundle)[0] == 3
    write_manifest(bundle)
    (bundle / "model.onnx").write_bytes(b"altered")
    code, document = run(capsys, "check", "--bundle", bundle)
    assert (code, document["class"]) == (5, "CorruptFailure")
    (bundle / "model.onnx").write_bytes(linear_model())
    with np.load(bundle / "golden.npz") as arrays:
        np.savez(bundle / "golden.npz", images=arrays["images"], logits__fp32=arrays["logits__fp32"] + 1)
    write_manifest(bundle)
    assert run(capsys, "check", "--bundle", bundle)[0] == 1
    code, document = run(capsys, "fly")
    assert (code, document["schema"], document["class"]) == (2, 1, "Failure")
    assert "choose from" in document["error"]


@pytest.mark.parametrize("place", ["absent/x.json", ".", "/dev/null", "closed/x.json"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_done(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "_info", lambda options: pytest.fail("it was begun"))
    access = os.access
    monkeypatch.setattr(program.os, "access", lambda path, mode: "closed" not in str(path) and access(path, mode))
    (tmp_path / "closed").mkdir()
    code, document = run(capsys, "info", "--out", tmp_path / place)
    assert (code, document["class"]) == (2, "Failure")
    assert "Choose another place with --out" in document["error"]


def test_what_took_minutes_is_printed_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(program.os, "replace", full)
    assert program.main(["info", "--json", "--out", str(tmp_path / "x.json")]) == 2
    told = capsys.readouterr()
    document = json.loads(told.out)
    assert document["machine"]
    assert (document["class"], document["exit_code"]) == ("Failure", 2)
    assert "No space left on device" in document["error"]
    assert "No space left on device" in told.err
    assert not list(tmp_path.glob("x.json*"))


@pytest.mark.parametrize("errors", [False, True])
def test_a_reader_that_goes_away_is_no_failed_check(errors: bool) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    told = writing if errors else subprocess.PIPE
    command = [sys.executable, "-m", "kdedge_device", *(["fly"] if errors else ["info"])]
    done = subprocess.run(command, stdout=writing, stderr=told, cwd=PACKAGE.parent, check=False)
    os.close(writing)
    assert done.returncode == 128 + 13
    assert not done.stderr


def test_flags_are_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["info", "--js"]) == 2
    assert "Unrecognized arguments: --js" in capsys.readouterr().err
    assert program.main(["bench", "absent.onnx", "--eff", "quick"]) == 2
    assert "Unrecognized arguments: --eff" in capsys.readouterr().err


def test_without_a_runtime_the_code_is_6(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, document = run(capsys, "eval", "--data", bundle / "golden.npz", "--bundle", bundle)
    assert code == 6
    assert "pip install onnxruntime" in document["error"]
    code, document = run(capsys, "check", "--bundle", bundle)
    assert (code, document["golden"], document["files"]) == (0, {}, ["golden.npz", "model.onnx"]), "the files are whole"
    assert "pip install onnxruntime" in document["not_run"]["fp32"]
    assert program.main(["check", "--bundle", str(bundle)]) == 0
    assert "No answer was compared" in capsys.readouterr().out
    (bundle / "model.onnx").write_bytes(b"altered")
    assert run(capsys, "check", "--bundle", bundle)[0] == 5


def test_predict_and_eval(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / "bright").mkdir(parents=True)
    white = tmp_path / "data" / "bright" / "0.png"
    Image.new("L", (5, 5), 255).save(white)
    code, document = run(capsys, "predict", white, "--bundle", bundle)
    assert (code, document["predictions"][0]["class"]) == (0, "bright")
    code, document = run(capsys, "predict", white, tmp_path / "absent.png", "--bundle", bundle)
    assert code == 2
    assert document["predictions"][0]["class"] == "bright", "one bad image does not spoil the others"
    code, document = run(capsys, "eval", "--data", tmp_path / "data", "--bundle", bundle, "--out", tmp_path / "e.json")
    assert (code, document["accuracy"]) == (0, 1.0)
    assert json.loads((tmp_path / "e.json").read_text()) == document
    code, document = run(capsys, "eval", "--data", tmp_path / "data", "--bundle", bundle, "--out", tmp_path / "x" / "e")
    assert (code, "Cannot write" in document["error"]) == (2, True)


def test_bench_as_a_child_process_without_torch_or_onnx(bundle: Path) -> None:
    """What the host does for every measurement; the child may import nothing of the host side."""
    lines = "import sys; from kdedge_device.__main__ import main; code = main(sys.argv[1:]); "
    lines += "print(sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr); sys.exit(code)"
    arguments = ["bench", str(bundle / "model.onnx"), "--seconds", "0", "--runs", "20", "--json"]
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", lines, *arguments], capture_output=True, text=True, env=env, check=True
    )
    document = json.loads(done.stdout)
    assert document["latency_ms"]["compute"]["count"] == 20
    assert document["conditions"]["effort"] == "custom"
    loaded = set(ast.literal_eval(done.stderr.strip().splitlines()[-1]))
    assert not loaded & {
        "torch",
        "torchvision",
        "onnx",
        "click",
        "ruamel",
        "yaml",
        "pydantic",
        "scipy",
        "kdedge",
        "rich",
    }


def test_the_sources_are_python_3_8() -> None:
    sources = sorted(PACKAGE.glob("*.py"))
    assert len(sources) >= 10
    for path in sources:
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))


def test_annotations_evaluate_in_python_3_8() -> None:
    """Builtin generics (list[int], since 3.9) and unions with | (since 3.10) must not be evaluated at run time."""
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
                assert node.value.id not in ("list", "dict", "tuple", "set", "type"), f"{path.name}:{node.lineno}"
