"""What travels to a board: the files of a bundle as its manifest names them, or a model file with a run.pyz of its own.

Engines stay here: they hold native code for this machine's GPU.
"""

import hashlib
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kdedge.errors import BundleError, DeviceError, RunError
from kdedge.runs import sha256_file
from kdedge_bench.remote_place import shown
from kdedge_device.failures import Failure
from kdedge_device.manifest import Bundle

__all__ = ["Parcel", "pack"]

PROGRAM = "run.pyz"


@dataclass(frozen=True)
class Parcel:
    """`name`: of its folder on the board, the same whenever the same target is sent from here. `files`: by name there.

    `model`: the file to name to run.pyz; None for a bundle, which it finds by itself.
    """

    name: str
    files: dict[str, Path]
    model: str | None = None

    def listing(self) -> dict[str, list[str | int]]:
        """{name: [sha256, bytes]}: what the board compares with what it has."""
        return {name: [sha256_file(path), path.stat().st_size] for name, path in self.files.items()}


def pack(target: Path, work: Path, extra: Mapping[str, Path] | None = None, known_as: Path | None = None) -> Parcel:
    """The parcel of a bundle folder or a model file, and with it `extra` files. `work`: an empty folder, used as long.

    It is named after `known_as`, or else after `target`.
    BundleError where the bundle is not what its manifest says, DeviceError for what no board can use.
    """
    model = None
    if target.is_dir():
        files = _of_bundle(target)
    else:
        model, files = "model.onnx", {"model.onnx": target, **_weights(target), PROGRAM: _program(work)}
    for name, path in (extra or {}).items():
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or name in files:
            raise DeviceError(f"A file cannot travel as {shown(name)!r}. Expected a plain name that the bundle lacks.")
        if not path.is_file():
            raise DeviceError(f"{path} does not exist; it was to travel to the board.")
        files[name] = path
    return Parcel(_name(known_as or target), files, model)


def _of_bundle(folder: Path) -> dict[str, Path]:
    try:
        names = [name for name in Bundle(folder).verify() if not name.endswith(".engine")]
    except Failure as error:
        raise BundleError(str(error)) from error
    if PROGRAM not in names:
        raise BundleError(f"{folder} has no {PROGRAM}, which a board starts. Make the bundle again: kdedge export")
    return {name: folder / name for name in (*names, "manifest.json")}


def _program(work: Path) -> Path:
    from kdedge_export.pyz import build_pyz  # with it comes torch: seconds that a bundle does not need

    build_pyz(work / PROGRAM)
    return work / PROGRAM


def _weights(model: Path) -> dict[str, Path]:
    """Files beside the model that hold its weights; large ones do."""
    if model.suffix == ".engine":
        raise DeviceError(
            f"The engine {model} was built for the GPU of this machine and fits no other. "
            "Name the bundle instead: the board builds its own engines."
        )
    import onnx

    from kdedge_export.float_form.onnx_file import tensors_of

    try:
        loaded = onnx.load(str(model), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError comes without type information
        raise RunError(f"{model} cannot be read as an ONNX file: {shown(str(error))}.") from error
    names = {
        entry.value for tensor in tensors_of(loaded.graph) for entry in tensor.external_data if entry.key == "location"
    }
    for name in sorted(names):
        path = model.parent / name
        if not re.fullmatch(r"\w[\w.-]*", name) or path.is_symlink() or not path.is_file() or name == PROGRAM:
            raise RunError(
                f"{model} keeps weights in {shown(name)!r}; a file beside it was expected. "
                "Save the model with its weights inside: onnx.save(onnx.load(MODEL), MODEL)"
            )
    return {name: model.parent / name for name in names}


def _name(target: Path) -> str:
    """A bundle is called as its run, and told from others of that name by where it lies."""
    path = target.resolve()
    said = path.parent.name if path.name == "bundle" else path.stem
    plain = re.sub(r"[^A-Za-z0-9]+", "-", said).strip("-")[:60] or "model"
    return f"{plain}-{hashlib.sha256(f'{platform.node()}:{path}'.encode()).hexdigest()[:12]}"
