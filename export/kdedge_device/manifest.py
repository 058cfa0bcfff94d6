"""The bundle: a folder with manifest.json and the files it names, each with its size and sha256.

Whoever brought the folder here is not trusted: what the manifest says is checked before it is used (manifest_rules),
files are opened only where they are plain ones, and hashed before anything reads them.
"""

import hashlib
import os
from typing import Any, BinaryIO, Dict, List, Optional, Union

from kdedge_device.failures import CorruptFailure, Failure, RuntimeFailure, VersionFailure
from kdedge_device.manifest_rules import problem_of
from kdedge_device.onnx_outside import refuse_outside
from kdedge_device.plain_files import open_plain
from kdedge_device.strict_json import read_json

__all__ = ["SCHEMA", "Bundle", "engines_in", "read_manifest", "sha256_file"]

SCHEMA = 1


def sha256_file(path: str) -> str:
    with open(path, "rb") as file:
        return _sha256(file)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


class Bundle:
    """A bundle folder whose manifest has been read and understood. A file is hashed whenever its path is asked for."""

    def __init__(self, path: Union[str, "os.PathLike[str]"]) -> None:
        self.path = os.fspath(path)
        self.document = read_manifest(self.path)
        self.preprocess = _preprocess(self.path, self.document["preprocess"])
        self.classes: List[str] = self.document["classes"]
        self.shipped: str = self.document["shipped"]
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
        """Path of an artifact's model, its hash checked first: what runs is what was measured.

        CorruptFailure also where the model would read other files: those are not hashed, and may lie anywhere.
        """
        entry = self.artifacts[self.artifact(name)]
        path = self._verified(entry["file"], entry)
        refuse_outside(path)
        return path

    def file(self, name: str) -> str:
        """Path of another file that the manifest names, its hash checked first. Failure where it names none such."""
        if name not in self.document["files"]:
            raise Failure(f"The bundle {self.path} has no {name}; it has {', '.join(sorted(self.document['files']))}.")
        return self._verified(name, self.document["files"][name])

    def golden(self) -> "Dict[str, Any]":
        """The arrays of golden.npz: images uint8 [n, H, W, C], and logits__<artifact> float32 [n, K]."""
        from kdedge_device.golden import read_golden

        path = self.file("golden.npz")
        return read_golden(path, self.preprocess, len(self.classes), ["logits__" + name for name in self.artifacts])

    def verify(self) -> List[str]:
        """Names of the files that were checked. CorruptFailure names every file that is missing or altered."""
        entries = {entry["file"]: entry for entry in self.artifacts.values()}
        entries.update(self.document["files"])
        problems = []
        for file, entry in sorted(entries.items()):
            try:
                self._verified(file, entry)
            except CorruptFailure as error:
                problems.append(str(error))
        if problems:
            raise CorruptFailure(" ".join(problems))
        return sorted(entries)

    def engines(self) -> Dict[str, str]:
        """State of every engine that the manifest names: "unaltered", "built again since", or "not here".

        One built again has a side file of its own, which whoever loads it compares (trt_cache).
        """
        states = {}
        for file, entry in sorted(self.document.get("engines", {}).items()):
            path = os.path.join(self.path, file)
            if not os.path.lexists(path):
                states[file] = "not here"
                continue
            with open_plain(path) as content:
                states[file] = "unaltered" if _sha256(content) == entry["sha256"] else "built again since"
        return states

    def _verified(self, file: str, entry: Dict[str, Any]) -> str:
        path = os.path.join(self.path, file)
        with open_plain(path) as content:
            size = os.fstat(content.fileno()).st_size
            if size != entry["bytes"]:
                raise CorruptFailure(
                    "{} has {} bytes; the manifest says {}. It was cut short or altered; copy the bundle again.".format(
                        path, size, entry["bytes"]
                    )
                )
            found = _sha256(content)
        if found != entry["sha256"]:
            raise CorruptFailure(
                "{} has sha256 {}...; the manifest says {}.... It was altered; copy the bundle again.".format(
                    path, found[:12], entry["sha256"][:12]
                )
            )
        return path


def engines_in(folder: str) -> List[str]:
    """Paths of the engines in a folder, for whatever machine, in order; none where it cannot be read."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [os.path.join(folder, name) for name in names if name.endswith(".engine")]


def read_manifest(folder: str) -> Dict[str, Any]:
    """manifest.json of a bundle folder, every field of a known type and range; needs the standard library only.

    Failure where there is none, VersionFailure for a newer schema, CorruptFailure for anything that cannot be used.
    """
    path = os.path.join(folder, "manifest.json")
    if not os.path.lexists(path):
        raise Failure(f"{path} does not exist. A bundle folder, as written by kdedge export, was expected.")
    document = read_json(path)
    schema = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise CorruptFailure(f"{path} has no whole number 'schema'; it was not written by kdedge export.")
    if schema > SCHEMA:
        raise VersionFailure(
            f"{path} has schema {schema}; this program reads up to {SCHEMA}. Use the run.pyz of that bundle."
        )
    problem = problem_of(document)
    if problem:
        raise CorruptFailure(f"{path} cannot be used: {problem}. Copy the bundle again, or export it again.")
    return dict(document)


def _preprocess(folder: str, document: Dict[str, Any]) -> Any:
    try:
        from kdedge_device.preprocess import Preprocess
    except ImportError as error:
        raise RuntimeFailure(f"numpy cannot be loaded ({error}). Install it with: pip install numpy") from None
    try:
        return Preprocess.from_json(document)
    except Failure as error:
        raise CorruptFailure(f"The manifest of {folder} cannot be used: {error}") from None
