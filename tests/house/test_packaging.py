"""The wheel and the sdist hold what they should and nothing else, and work away from this folder."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import kdedge

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"kdedge", "kdedge_recipes", "kdedge_export", "kdedge_device", "kdedge_bench"}
RECIPES = [
    "efficientnet", "mnasnet", "mobilenet", "mobilenet-v3", "regnet", "resnet", "shufflenet", "simclr", "squeezenet",
    "tiny", "tiny-simclr",
]  # fmt: skip
SDIST = {
    "kdedge", "recipes", "export", "benchmarks", "tests", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
    "Makefile", "pyproject.toml", "requirements.lock", "PKG-INFO", ".gitignore",
}  # fmt: skip


def build(source: Path, kind: str, out: Path) -> Path:
    """Without isolation: hatchling is in the lock, and nothing is downloaded."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.iterdir()
    return path


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked folder."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(ROOT, "sdist", folder / "built")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (inside,) = (folder / "unpacked").iterdir()
    return inside


def test_the_wheel_holds_five_packages_and_nothing_else(wheel: Path) -> None:
    version = f"kdedge-{kdedge.__version__}"
    assert wheel.name == f"{version}-py3-none-any.whl"
    assert {name.partition("/")[0] for name in names(wheel)} == ROOMS | {f"{version}.dist-info"}
    assert {Path(name).suffix for name in names(wheel) if name.partition("/")[0] in ROOMS} <= {
        ".py", ".typed", ".yaml", ".j2", ".css", ".md",
    }  # fmt: skip
    assert {f"{room}/py.typed" for room in ROOMS} <= set(names(wheel))
    shipped = {name for name in names(wheel) if name.startswith("kdedge_recipes/") and name.endswith(".yaml")}
    assert shipped == {f"kdedge_recipes/{name}.yaml" for name in RECIPES}
    targets = {path.name for path in (ROOT / "export" / "kdedge_export" / "targets").glob("*.yaml")}
    assert len(targets) >= 8
    assert {f"kdedge_export/targets/{name}" for name in targets} <= set(names(wheel))
    suites = {path.name for path in (ROOT / "benchmarks" / "kdedge_bench" / "suites").glob("*.yaml")}
    assert len(suites) >= 2
    assert {f"kdedge_bench/suites/{name}" for name in suites} <= set(names(wheel))
    assert f"{version}.dist-info/licenses/LICENSE" in names(wheel)


def test_the_sdist_holds_what_is_listed_and_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    assert {path.name for path in sdist.iterdir()} <= SDIST
    assert {path.name for path in sdist.iterdir()} >= SDIST - {".gitignore"}
    assert {path.name for path in (sdist / "benchmarks").iterdir()} == {"kdedge_bench", "README.md"}
    again = build(sdist, "wheel", tmp_path / "again")
    assert sorted(names(again)) == sorted(names(wheel))


def test_the_sdist_names_no_machine(sdist: Path) -> None:
    here = str(ROOT).encode()
    assert [path for path in sdist.rglob("*") if path.is_file() and here in path.read_bytes()] == []


def test_an_installed_wheel_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "a clean place"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "-qq",
        "--no-index",
        "--no-deps",
        str(wheel),
    ]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    site = next((home / "lib").glob("python*/site-packages"))
    # The dependencies are borrowed; a .pth is read after the folder it lies in, so the wheel comes first.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    away = tmp_path / "away"
    away.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        done = subprocess.run(arguments, cwd=away, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    script = str(home / "bin" / "kdedge")
    assert run(script, "--help").startswith("Usage: kdedge ")
    assert run(script, "--version").split() == ["kdedge,", "version", kdedge.__version__]
    listed = json.loads(run(script, "recipes", "list", "--json"))
    assert [entry["name"] for entry in listed] == RECIPES
    run(script, "recipes", "copy", "tiny", "mine.yaml")
    assert "is a valid recipe" in run(script, "recipes", "validate", "mine.yaml")
    files = ", ".join(f"{room}.__file__" for room in sorted(ROOMS))
    where = run(str(python), "-c", f"import {', '.join(sorted(ROOMS))}; print({files}, sep='\\n')").splitlines()
    assert where == [str(site / room / "__init__.py") for room in sorted(ROOMS)]
