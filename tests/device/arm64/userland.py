"""An arm64 Debian userland in a folder, run by qemu-user: no root rights, no binfmt, no chroot, no container.

apt resolves and downloads the packages with state of its own, dpkg unpacks them, pip takes the aarch64 wheels.
"""

import re
import shutil
import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ..road import Wrong, say

__all__ = ["CPU", "NEEDED", "PACKAGES", "WHEELS", "Userland", "build"]

# qemu's default processor has SVE, with which numpy 2.3 multiplies matrices wrongly and says nothing; a Cortex-A76 is
# close to Orin's A78AE. ONNX Runtime from 1.28 on crashes under qemu 7.2 as it reads the topology of the caches.
CPU = "cortex-a76"
PACKAGES = ("python3.11", "libstdc++6", "libgomp1")  # of Debian 12
WHEELS = ("numpy==2.3.5", "onnxruntime==1.23.2", "pillow==12.0.0")
# What the fake TensorRT reads ONNX files with; a board needs none of it.
FAKE_WHEELS = ("onnx==1.19.1", "ml_dtypes==0.5.3", "protobuf==6.33.0", "typing_extensions==4.15.0")
NEEDED = {
    "qemu-aarch64-static": "qemu-user-static",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "apt-get": "apt",
    "dpkg": "dpkg",
}
SOURCES = ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")


class Userland:
    """`python` is a script that this machine can start, which starts the arm64 one: children of it start as well."""

    def __init__(self, folder: Path) -> None:
        self.root, self.site, self.fakes = folder / "root", folder / "site", folder / "fakes"
        self.python = self.root / "usr" / "bin" / "kdedge-python"


def build(folder: Path, python: str) -> Userland:
    """The userland in `folder`, made where it is not there yet; `python` runs pip. Wrong where a program is missing."""
    missing = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if missing:
        raise Wrong(f"{', '.join(missing)} is not installed. On Debian: sudo apt-get install {' '.join(missing)}")
    land, mark = Userland(folder), folder / "made.txt"
    made = "\n".join((CPU, *PACKAGES, *WHEELS, *FAKE_WHEELS, str(land.root)))
    if mark.is_file() and mark.read_text() == made:
        return land
    for each in (land.root, land.site, land.fakes, folder / "wheels", folder / "fake-wheels"):
        shutil.rmtree(each, ignore_errors=True)
    say("Downloading Debian packages for arm64")
    for package in _debian_packages(folder):
        _run(["dpkg", "-x", str(package), str(land.root)])
    say("Downloading wheels for aarch64")
    for wheels, names, target in ((WHEELS, "wheels", land.site), (FAKE_WHEELS, "fake-wheels", land.fakes)):
        _wheels(python, wheels, folder / names, target)
    _write_python(land)
    mark.write_text(made)
    return land


def _debian_packages(folder: Path) -> list[Path]:
    """With what they depend on. apt is told of another architecture and of a machine where nothing is installed."""
    sources = next((path for path in SOURCES if Path(path).is_file()), None)
    if sources is None:
        raise Wrong(f"None of {', '.join(SOURCES)} is there: the packages come from the sources of this Debian.")
    for each in ("state/lists/partial", "cache/archives/partial"):
        (folder / each).mkdir(parents=True, exist_ok=True)
    (folder / "status").write_text("")
    options = {
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "-",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "APT::Install-Recommends": "false",
        "Debug::NoLocking": "1",
    }
    apt = ["apt-get", "-qq", *(part for key, value in options.items() for part in ("-o", f"{key}={value}"))]
    _run([*apt, "update"])
    _run([*apt, "-y", "--download-only", "install", *PACKAGES])
    return sorted((folder / "cache" / "archives").glob("*.deb"))


def _wheels(python: str, names: Sequence[str], folder: Path, target: Path) -> None:
    """No dependencies: numpy and a runtime have to be enough. Unzipped, as pip installs for this machine only."""
    version = PACKAGES[0].removeprefix("python")
    options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", version]
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    pip = [python, "-m", "pip", "download", "-q", "--disable-pip-version-check", "-d", str(folder)]
    _run([*pip, *options, *platforms, *names])
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)


def _write_python(land: Userland) -> None:
    """A child process is started by the kernel, which cannot run arm64: sys.executable has to be this script."""
    program = land.root / "usr" / "bin" / PACKAGES[0]
    land.python.write_text(
        f'#!/bin/sh\nexec qemu-aarch64-static -cpu {CPU} -0 "$0" -L "{land.root}" "{program}" "$@"\n'
    )
    land.python.chmod(0o755)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        # Mirrors and indexes are named by this machine's own settings, which are nobody else's business.
        reason = re.sub(r"https?://\S+", "(address)", (done.stderr or done.stdout).strip())[-500:]
        raise Wrong(f"{command[0]} failed: {reason}")
