"""No process that is started takes a module from the current folder, which anybody may have filled."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kdedge_device
import kdedge_export
from kdedge.errors import DeviceError, ExportError
from kdedge_device.bench_rounds import Job, one_round
from kdedge_device.children import child, python
from kdedge_device.cuda_probe import probe
from kdedge_device.failures import Failure
from kdedge_device.manifest import Bundle
from kdedge_device.packages import look_for
from kdedge_device.sampler import Sampler
from kdedge_device.set_clocks import locked
from kdedge_export.judging.latency import measure_alone
from kdedge_export.pyz import build_pyz
from kdedge_export.trt.engines import _build

from . import boards

NAMES = {*sys.stdlib_module_names, "kdedge_device", "numpy", "PIL", "onnxruntime", "tensorrt", "sitecustomize"}


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder has a module of every name that could be asked for. Whichever is imported leaves a file."""
    folder, found = tmp_path / "cwd", tmp_path / "found"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(found)!r}, 'a').write({name!r} + ' ')\n")
    monkeypatch.chdir(folder)
    return found


def test_the_trap_works(poisoned: Path) -> None:
    subprocess.run([sys.executable, "-c", "import json"], check=True)
    assert poisoned.read_text() == "json "


def _sampled(root: Path) -> None:
    sampler = Sampler(str(root))
    assert sampler.start()
    assert sampler.stop() is not None


def _held(root: Path) -> None:
    boards.program(root, "/usr/bin/jetson_clocks", "exit 0\n")
    said: list[str] = []
    with locked(str(root), said.append, user=lambda: 0):
        assert said[0].startswith("Clocks are held")


def _measured(root: Path) -> None:
    with pytest.raises(Failure, match=r"absent\.onnx does not exist"):
        one_round(Job("fp32", ["/absent.onnx"]))


def _judged(root: Path) -> None:
    with pytest.raises(DeviceError, match=r"absent\.onnx does not exist"):
        measure_alone(Path("/absent.onnx"), 1)


def _built(root: Path) -> None:
    with pytest.raises((DeviceError, ExportError), match=r"/absent|CUDA|TensorRT"):
        _build(Path("/absent"), "fp16")


@pytest.mark.parametrize(
    "start",
    [
        lambda root: probe("absent.so"),
        lambda root: look_for({"json": "json", "numpy": "numpy", "pillow": "PIL"}),
        _sampled,
        _held,
        _measured,
        _judged,
        _built,
    ],
    ids=["probe", "look_for", "sampler", "keeper of clocks", "round", "judge", "build"],
)
def test_nothing_is_taken_from_the_current_folder(
    start: Callable[[Path], object], poisoned: Path, tmp_path: Path
) -> None:
    start(boards.orin_nano(tmp_path / "board"))
    assert not poisoned.exists(), poisoned.read_text()


def test_nor_by_what_run_pyz_starts(poisoned: Path, bundle: Path) -> None:
    build_pyz(bundle / "run.pyz")
    command = [sys.executable, str(bundle / "run.pyz"), "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not poisoned.exists(), poisoned.read_text()
    assert json.loads(done.stdout)["runtimes"]["numpy"] is not None
    assert Bundle(bundle).artifacts


def test_pythonpath_and_arguments_are_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text("import sys\nprint(sys.argv[1:])\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(python("import theirs", "a b", "--c"), capture_output=True, text=True, check=True)
    assert done.stdout == "['a b', '--c']\n"


def test_the_packages_own_folder_is_not_searched_for_other_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(kdedge_device.__file__).parent
    (tmp_path / "kdedge_device").symlink_to(package)
    (tmp_path / "argparse.py").write_text("raise SystemExit('taken')")
    monkeypatch.setattr("kdedge_device.children.__file__", str(tmp_path / "kdedge_device" / "children.py"))
    done = subprocess.run(child("__main__", "--help"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_python_is_started_in_one_place() -> None:
    """Of the parts that run on a board or for one: whoever starts Python by hand forgets the current folder."""
    starters = {
        source.name
        for package in (kdedge_device, kdedge_export)
        for source in Path(str(package.__file__)).parent.rglob("*.py")
        if re.search(r"\[\s*sys\.executable", source.read_text(encoding="utf-8"))
    }
    assert starters == {"children.py"}
