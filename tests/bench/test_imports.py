"""Importing the room is cheap, and its templates are where the wheel takes them from."""

import subprocess
import sys
from importlib import resources


def test_nothing_heavy_is_imported() -> None:
    heavy = "torch matplotlib jinja2 rich PIL onnxruntime onnx sklearn scipy pydantic"
    code = f"import sys, kdedge_bench; print(*sorted(set('{heavy}'.split()) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_templates_lie_in_the_package() -> None:
    folder = resources.files("kdedge_bench") / "templates"
    assert sorted(file.name for file in folder.iterdir()) == ["report.css", "report.html.j2", "study.html.j2"]
