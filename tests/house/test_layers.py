"""Knowledge points one way, and no module stands outside the contract."""

import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
DEVICE = """
import importlib, pkgutil, sys
before = set(sys.modules)
import kdedge_device
for module in pkgutil.iter_modules(kdedge_device.__path__):
    if module.name != "__main__":
        importlib.import_module("kdedge_device." + module.name)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""


def test_import_contracts_hold() -> None:
    done = subprocess.run([sys.executable, "-c", LINT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_module_of_kdedge_has_its_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = {module.strip() for layer in layers for module in layer.replace(":", "|").split("|")}
    present = {f"kdedge.{module.name}" for module in pkgutil.iter_modules([str(ROOT / "kdedge")])}
    assert present - named == {"kdedge.__main__"}
    assert {name for name in named if name.startswith("kdedge.")} <= present


def test_the_device_imports_numpy_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", DEVICE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"kdedge_device", "numpy"}
