"""`kdedge doctor` tells what works and why the rest does not, whatever is broken on a machine."""

import json
import tomllib
from pathlib import Path

import click
import pytest

from kdedge import cli as command_line
from kdedge import cli_doctor
from kdedge.cli_doctor import Finding
from kdedge.cli_probes import OTHERS, PROBES

ROOT = Path(__file__).resolve().parents[1]
Capture = pytest.CaptureFixture[str]


def test_this_machine(capsys: Capture) -> None:
    assert command_line.run(["doctor", "--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert all(findings[name]["works"] for name in ("python", "packages", "torch", "torchvision", "onnxruntime"))
    assert "CPUExecutionProvider" in findings["onnxruntime"]["detail"]
    assert "JetPack" in findings["board"]["detail"]
    assert "power mode" in findings["board"]["detail"]
    assert all(finding["detail"] for finding in findings.values() if not finding["works"])
    assert findings["kdedge train-recipe"]["works"]
    gpu = findings["kdedge train-recipe --device cuda"]
    assert gpu["works"] == findings["cuda"]["works"]
    assert gpu["works"] or gpu["detail"] == f"for want of cuda: {findings['cuda']['detail']}"


def test_what_is_broken_breaks_nothing_else(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch ends Python, as a wheel for another processor does; others exit, print, or have a broken part."""
    (tmp_path / "torch.py").write_text("import os; print('[true, 1]', flush=True); os.abort()")
    (tmp_path / "timm.py").write_text("raise SystemExit('timm wants a torch')")
    (tmp_path / "openvino.py").write_text("print('a library talks'); __version__ = '9'")
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda" / "__init__.py").touch()
    (tmp_path / "pycuda" / "driver.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert command_line.run(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    told = {line[:14].strip(): line[15:] for line in lines[: len(PROBES)]}
    assert list(told) == [probe.name for probe in PROBES]
    crashed = "does not  it ends Python with SIGABRT; install it anew, in a build for this processor and driver (for "
    assert all(told[name].startswith(crashed) for name in ("torch", "torchvision", "cuda"))
    assert told["onnxruntime"].startswith("works ")
    assert told["timm"].startswith("does not  SystemExit: timm wants a torch")
    assert told["openvino"] == "works     9"
    assert told["pycuda"].startswith("does not  ImportError: libcuda.so.1: cannot open")
    assert any(line.startswith("kdedge compare") and line.endswith("works") for line in lines)
    assert lines[-1] == "kdedge cannot run here: torch, torchvision."


def test_a_driver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_doctor, "LIMIT_S", 0.0)
    found = cli_doctor._findings()
    assert [each.name for each in found] == [probe.name for probe in PROBES]
    assert {each.detail for each in found} == {"it did not answer within 0 seconds; restart the machine"}


def test_a_command_says_why_and_what_to_do() -> None:
    cuda = Finding("cuda", False, False, "no driver; install one", "training on a GPU")
    found = cli_doctor._command("kdedge x", ("cuda", "disk"), [cuda])
    assert (found.works, found.detail) == (False, "for want of cuda: no driver; install one")
    assert cli_doctor._command("kdedge x", ("disk",), [cuda]).works


def test_every_command_and_every_package_is_looked_at() -> None:
    words = {word.strip(",") for text, _ in cli_doctor._COMMANDS for word in text.split()}
    assert set(command_line.cli.list_commands(click.Context(command_line.cli))) - words == {"doctor"}
    needed = {name for _, needs in cli_doctor._COMMANDS for name in needs}
    named = {probe.name for probe in PROBES}
    assert needed <= named
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {each.partition(">=")[0] for each in project["dependencies"]} == {*OTHERS.values()} | {
        "torch", "torchvision", "onnx", "onnxruntime",
    }  # fmt: skip
