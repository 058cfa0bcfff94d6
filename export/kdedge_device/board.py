"""Which board this is and what is installed on it: Jetson Xavier to Thor with JetPack 5 to 7.2, Raspberry Pi, x86.

What counts is what is on the disk, never a table: a JetPack's TensorRT and CUDA can be exchanged, and are. The one
table here turns L4T releases into the names that people know, where the package that carries the name is missing.
Python 3.8, standard library.
"""

import platform
import re
import sys
from typing import Dict, List, NamedTuple, Optional, Tuple

from kdedge_device.failures import VersionFailure
from kdedge_device.sysfs import paths, read

__all__ = ["Board", "identify", "jetpack_of_l4t", "refuse_unsupported"]

# The chip's name in the device tree says more than the model, which makers of carrier boards choose freely.
_CHIPS = {
    "nvidia,tegra264": "thor",
    "nvidia,tegra234": "orin",
    "nvidia,tegra194": "xavier",
    "nvidia,tegra186": "tx2",
    "nvidia,tegra210": "nano",
}
_MODELS = {"thor": "thor", "orin": "orin", "xavier": "xavier", "raspberry pi": "raspberry-pi"}
_ONLY_JETPACK_4 = ("tx2", "nano")
_JETPACKS = {
    "35.2": "5.1",
    "35.3": "5.1.1",
    "35.4": "5.1.2",
    "35.5": "5.1.3",
    "35.6.0": "5.1.4",
    "36.3": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.5": "6.2.2",
    "38.2": "7.0",
    "38.4": "7.1",
    "39.2": "7.2",
}
_MAJORS = {"32": "4", "34": "5", "35": "5", "36": "6", "38": "7", "39": "7"}
_LIBRARIES = ("/usr/lib/aarch64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/usr/local/tensorrt/lib", "/usr/lib")


class Board(NamedTuple):
    """Every field is None where it is unknown or not installed.

    `family`: thor, orin, xavier, tx2, nano (the first Jetson Nano), jetson (a newer one), raspberry-pi, x86, arm.
    `jetpack` is only the major number where no more is known.
    """

    model: Optional[str]
    family: Optional[str]
    architecture: str
    l4t: Optional[str]
    jetpack: Optional[str]
    jetpack_from: Optional[str]  # "the package nvidia-jetpack", or "L4T"
    cuda: Optional[str]
    tensorrt: Optional[str]  # the library on the disk
    tensorrt_python: Optional[str]  # what this Python could import
    python: str
    kernel: str
    system: Optional[str]


def identify(root: str = "/") -> Board:
    """Reads a few small files; nothing is started or imported. Never fails."""
    compatible = (read(root, "/proc/device-tree/compatible") or "").split("\0")
    model = read(root, "/proc/device-tree/model") or read(root, "/sys/devices/virtual/dmi/id/product_name")
    architecture = platform.machine()
    packages = _packages(root)
    l4t = _l4t(read(root, "/etc/nv_tegra_release"), packages)
    jetpack, jetpack_from = _jetpack(l4t, packages)
    return Board(
        model=model,
        family=_family(compatible, model, l4t, architecture),
        architecture=architecture,
        l4t=l4t,
        jetpack=jetpack,
        jetpack_from=jetpack_from,
        cuda=_cuda(root),
        tensorrt=_tensorrt(root),
        tensorrt_python=_importable("tensorrt") if root == "/" else None,
        python=platform.python_version(),
        kernel=platform.release(),
        system=_system(root),
    )


def refuse_unsupported(board: Board) -> None:
    """VersionFailure, in one sentence, on a Jetson with JetPack 4, and under a Python before 3.8."""
    if (board.jetpack or "").split(".")[0] == "4":
        way = (
            "and this board's last one is JetPack 4, so a newer board is needed"
            if board.family in _ONLY_JETPACK_4
            else "so flash this board with JetPack 5"
        )
        raise VersionFailure(
            f"{board.model or 'This Jetson'} runs L4T {board.l4t}, which is JetPack 4 (Python 3.6, TensorRT 8.2); "
            f"JetPack 5 or newer is needed, {way}."
        )
    if sys.version_info < (3, 8):
        raise VersionFailure(f"Python {board.python} was started, and 3.8 or newer is needed.")


def jetpack_of_l4t(l4t: str) -> Optional[str]:
    """The JetPack that an L4T release such as "36.4.3" belongs to; its major number where the release is unknown."""
    major, *rest = l4t.split(".")
    minor, patch = (rest + ["0", "0"])[:2]
    named = _JETPACKS.get(f"{major}.{minor}.{patch}") or _JETPACKS.get(f"{major}.{minor}")
    if named is None and (major, minor) == ("36", "4") and int(patch) > 4:
        named = _JETPACKS["36.4.4"]  # 36.4.7 is a security release of JetPack 6.2.1
    return named or _MAJORS.get(major)


def _family(compatible: List[str], model: Optional[str], l4t: Optional[str], architecture: str) -> Optional[str]:
    for name in compatible:
        if name in _CHIPS:
            return _CHIPS[name]
        if name.startswith("raspberrypi,"):
            return "raspberry-pi"
    for part, family in _MODELS.items():
        if part in (model or "").lower():
            return family
    if l4t is not None or any(name.startswith("nvidia,tegra") for name in compatible):
        return "jetson"
    return {"x86_64": "x86", "AMD64": "x86", "i686": "x86", "aarch64": "arm", "armv7l": "arm"}.get(architecture)


def _l4t(release: Optional[str], packages: Dict[str, str]) -> Optional[str]:
    """Of the release file, else of the package, which containers have more often than the file."""
    found = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", release or "")
    if found:
        return f"{found.group(1)}.{found.group(2).strip('.')}"
    found = re.match(r"(\d+\.\d+(?:\.\d+)?)-", packages.get("nvidia-l4t-core", ""))
    return found.group(1) if found else None


def _jetpack(l4t: Optional[str], packages: Dict[str, str]) -> Tuple[Optional[str], Optional[str]]:
    installed = re.match(r"[\d.]+", packages.get("nvidia-jetpack", ""))
    if installed:
        return installed.group(0), "the package nvidia-jetpack"
    named = None if l4t is None else jetpack_of_l4t(l4t)
    return named, None if named is None else "L4T"


def _packages(root: str) -> Dict[str, str]:
    """Versions of NVIDIA's installed Debian packages, by name."""
    found = {}
    for block in (read(root, "/var/lib/dpkg/status") or "").split("\n\n"):
        if block.startswith("Package: nvidia-") and "\nStatus: install ok installed" in block:
            version = re.search(r"^Version: (\S+)", block, re.MULTILINE)
            if version:
                found[block.split("\n", 1)[0][len("Package: ") :]] = version.group(1)
    return found


def _cuda(root: str) -> Optional[str]:
    """Of the toolkit under /usr/local/cuda, or of the runtime library where only that is installed."""
    newer = re.search(
        r'"cuda"\s*:\s*\{[^}]*"version"\s*:\s*"([\d.]+)"', read(root, "/usr/local/cuda/version.json") or ""
    )
    older = re.search(r"CUDA Version ([\d.]+)", read(root, "/usr/local/cuda/version.txt") or "")
    if newer or older:
        return (newer or older).group(1)  # type: ignore[union-attr]  # one of them is there
    folders = ["/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*/lib", *_LIBRARIES]
    return _newest(root, [f"{folder}/libcudart.so.*" for folder in folders])


def _tensorrt(root: str) -> Optional[str]:
    return _newest(root, [f"{folder}/libnvinfer.so.*" for folder in _LIBRARIES])


def _newest(root: str, patterns: List[str]) -> Optional[str]:
    """The highest version at the end of library names; of libx.so.8 -> libx.so.8.5.2, the longer."""
    versions = []
    for pattern in patterns:
        for path in paths(root, pattern):
            found = re.search(r"\.so\.([\d.]+)$", path)
            if found:
                versions.append(tuple(int(part) for part in found.group(1).split(".") if part))
    return ".".join(str(part) for part in max(versions)) if versions else None


def _importable(name: str) -> Optional[str]:
    """From the package's metadata: TensorRT 11 ends the process when it is imported without a driver."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _system(root: str) -> Optional[str]:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', read(root, "/etc/os-release") or "", re.MULTILINE)
    return found.group(1) if found else None
