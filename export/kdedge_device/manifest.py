"""The bundle: a folder with manifest.json and the files it names, each with its size and sha256."""

import hashlib
import json
import os
from typing import Any, Dict, List, Optional, Union

from kdedge_device.failures import CorruptFailure, Failure, VersionFailure
from kdedge_device.preprocess import Preprocess

__all__ = ["SCHEMA", "Bundle", "sha256_file"]

SCHEMA = 1
_KEYS = {"artifacts": dict, "files": dict, "input": dict, "preprocess": dict, "classes": list, "shipped": str}


def sha256_file(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


class Bundle:
    """A bundle folder whose manifest has been read and understood. The files themselves are hashed by `verify`."""

    def __init__(self, path: Union[str, "os.PathLike[str]"]) -> None:
        self.path = os.fspath(path)
        self.document = _read_manifest(os.path.join(self.path, "manifest.json"))
        self.preprocess = Preprocess.from_json(self.document["preprocess"])
        self.classes = [str(name) for name in self.document["classes"]]
        self.shipped = str(self.document["shipped"])
        self.artifacts: Dict[str, Dict[str, Any]] = self.document["artifacts"]

    def artifact(self, name: Optional[str] = None) -> str:
        """The name of an artifact, checked; the shipped one where None is given."""
        chosen = self.shipped if name is None else name
        if chosen not in self.artifacts:
            raise Failure(
                "The bundle {} has no artifact '{}'; it has {}.".format(
                    self.path, chosen, ", ".join(sorted(self.artifacts))
                )
            )
        return chosen

    def model_path(self, name: Optional[str] = None) -> str:
        """Path of an artifact's model, its hash checked first: what runs is what was measured."""
        entry = self.artifacts[self.artifact(name)]
        self._verify_file(entry["file"], entry)
        return os.path.join(self.path, entry["file"])

    def golden(self) -> "Dict[str, Any]":
        """The arrays of golden.npz: images uint8 [n, H, W, C], and logits__<artifact> float32 [n, K]."""
        import numpy as np

        if "golden.npz" not in self.document["files"]:
            raise Failure(f"The bundle {self.path} has no golden.npz to compare with.")
        self._verify_file("golden.npz", self.document["files"]["golden.npz"])
        with np.load(os.path.join(self.path, "golden.npz"), allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}

    def verify(self) -> List[str]:
        """Names of the files that were checked. CorruptFailure names every file that is missing or altered."""
        entries = {entry["file"]: entry for entry in self.artifacts.values()}
        entries.update(self.document["files"])
        problems = []
        for file, entry in sorted(entries.items()):
            try:
                self._verify_file(file, entry)
            except CorruptFailure as error:
                problems.append(str(error))
        if problems:
            raise CorruptFailure(" ".join(problems))
        return sorted(entries)

    def _verify_file(self, file: str, entry: Dict[str, Any]) -> None:
        if os.path.basename(file) != file:
            raise CorruptFailure(
                f"The manifest of {self.path} names the file {file!r}; a plain file name was expected."
            )
        path = os.path.join(self.path, file)
        if not os.path.isfile(path):
            raise CorruptFailure(f"{path} is missing from the bundle. Copy the whole folder again.")
        size = os.path.getsize(path)
        if size != entry["bytes"]:
            raise CorruptFailure(
                "{} has {} bytes; the manifest says {}. It was cut short or altered; copy the bundle again.".format(
                    path, size, entry["bytes"]
                )
            )
        found = sha256_file(path)
        if found != entry["sha256"]:
            raise CorruptFailure(
                "{} has sha256 {}...; the manifest says {}.... It was altered; copy the bundle again.".format(
                    path, found[:12], str(entry["sha256"])[:12]
                )
            )


def _read_manifest(path: str) -> Dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except FileNotFoundError:
        raise Failure(f"{path} does not exist. A bundle folder, as written by kdedge export, was expected.") from None
    except (OSError, ValueError) as error:
        raise CorruptFailure(f"{path} cannot be read as JSON ({error}). Copy the bundle again.") from None
    if not isinstance(document, dict) or not isinstance(document.get("schema"), int):
        raise CorruptFailure(f"{path} has no whole number 'schema'; it was not written by kdedge export.")
    if document["schema"] > SCHEMA:
        raise VersionFailure(
            "{} has schema {}; this program reads up to {}. Use the run.pyz of that bundle.".format(
                path, document["schema"], SCHEMA
            )
        )
    for key, kind in _KEYS.items():
        if not isinstance(document.get(key), kind):
            raise CorruptFailure(f"{path} has no {kind.__name__} '{key}'; it is incomplete.")
    for name, entry in list(document["artifacts"].items()) + list(document["files"].items()):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("sha256"), str)
            or not isinstance(entry.get("bytes"), int)
        ):
            raise CorruptFailure(f"{path} gives no sha256 and bytes for '{name}'; it is incomplete.")
    return document
