"""run.pyz under every Python of this machine: 3.8 and newer run it, older ones say in a sentence what is missing.

What needs numpy and a runtime in each of them is `make interpreters`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdedge_export.pyz import build_pyz

from .interpreters import SUPPORTED, found

COMPILE = "import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); [compile(z.read(n), n, 'exec') for n in z.namelist()]"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zipapp") / "run.pyz"
    build_pyz(path)
    return path


@pytest.fixture(scope="module")
def interpreters() -> dict[str, str]:
    return {"{}.{}".format(*sys.version_info[:2]): sys.executable} | found()


def run(python: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [python, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def test_supported_ones(pyz: Path, interpreters: dict[str, str]) -> None:
    """Every file is Python of that version, and `info` answers with neither numpy nor a runtime nor a bundle."""
    for version in SUPPORTED:
        if version not in interpreters:
            continue
        done = run(interpreters[version], "-W", "error", "-c", COMPILE, pyz)
        assert done.returncode == 0, f"{version}: {done.stderr}"
        done = run(interpreters[version], "-W", "error", pyz, "info", "--json", "--bundle", pyz.parent)
        document = json.loads(done.stdout)
        assert (done.returncode, document["exit_code"], document["manifest"]) == (2, 2, None), version
        assert document["python"].startswith(version + ".")
        assert set(document["can"]) == {"check", "build", "bench", "eval", "predict"}
        if document["runtimes"]["numpy"] is None:
            assert "pip install numpy" in document["can"]["bench"]
            done = run(interpreters[version], pyz, "check", "--json")
            assert (done.returncode, json.loads(done.stdout)["class"]) == (6, "RuntimeFailure"), version


def test_older_ones(pyz: Path, interpreters: dict[str, str]) -> None:
    """Where there are any; that the sentence itself is right is tested by version numbers (too_old)."""
    for version, python in interpreters.items():
        if tuple(map(int, version.split("."))) >= (3, 8):
            continue
        done = run(python, pyz, "info", "--json")
        document = json.loads(done.stdout)
        assert (done.returncode, document["class"], document["exit_code"]) == (3, "VersionFailure", 3), version
        assert document["error"].startswith(f"Python {version} was started, and 3.8 or newer is needed.")
        done = run(python, pyz, "check")
        assert (done.returncode, done.stdout) == (3, "")
        assert len(done.stderr.splitlines()) == 1, "a sentence, no traceback"
