"""Checkpoints: tensors in safetensors, the rest as JSON in its header; nothing is unpickled.

A checkpoint is one file, written under a temporary name, synced and renamed; the last two are kept. Beside the header
stands a hash of it and of the tensors, so that a truncated or altered file is noticed and the one before it is used.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from kdedge.errors import RunError
from kdedge.runs import write_bytes

__all__ = ["Checkpoint", "Checkpoints", "read_tensors", "tensors_hash", "tensors_to_bytes"]

_KEEP = 2


def tensors_hash(tensors: Mapping[str, Tensor], header: str = "") -> str:
    """sha256 over the header's text, and names, types, shapes and bytes in the order of the names."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # Not a copy: hashing a buffer lets other threads run.
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensors_to_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """A safetensors file with `header` as JSON under the metadata key "kdedge"."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(dict(header), allow_nan=False)
    content: bytes = save(plain, metadata={"kdedge": text, "sha256": tensors_hash(plain, text)})
    return content


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file written by `tensors_to_bytes`; RunError where it is damaged or of another maker."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise RunError(f"{path} does not exist.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as safetensors: {error}.") from error
    if "kdedge" not in metadata:
        raise RunError(f"{path} has no kdedge header; it was not written by kdedge.")
    if metadata.get("sha256") != tensors_hash(tensors, metadata["kdedge"]):
        raise RunError(f"{path} is damaged: its header and tensors do not have the hash that stands beside them.")
    header: dict[str, Any] = json.loads(metadata["kdedge"])
    return tensors, header


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` finished steps of a stage."""

    step: int
    tensors: dict[str, Tensor]
    header: dict[str, Any]


@final
class Checkpoints:
    """The checkpoints of one stage: `folder`/`stage`.`step`.safetensors.

    Of many processes that train together one writes; the others have `writes` false and only read.
    """

    def __init__(self, folder: Path, stage: str, *, writes: bool = True) -> None:
        self.folder, self.stage, self.writes = folder, stage, writes
        self._damaged: set[Path] = set()  # of the files that `load` saw

    def _files(self) -> list[tuple[int, Path]]:
        """(step, file) of each, oldest first. The step in the name is a number, so that 1000 comes after 999."""
        files = self.folder.glob(f"{self.stage}.*.safetensors") if self.folder.is_dir() else []
        steps = ((path.name.split(".")[1], path) for path in files)
        return sorted((int(step), path) for step, path in steps if step.isdecimal())

    def save(self, step: int, tensors: Mapping[str, Tensor], **header: Any) -> None:
        """Write the state after `step` steps, then remove all but the last two; RunError where it cannot be written."""
        if not self.writes:
            return
        newest = self.folder / f"{self.stage}.{step}.safetensors"
        write_bytes(newest, tensors_to_bytes(tensors, header | {"step": step}))
        # Damaged ones count for nothing, and neither do later ones: the run came back from before them.
        self._damaged.discard(newest)
        sound = [path for at, path in self._files() if at <= step and path not in self._damaged][-_KEEP:]
        for _, path in self._files():
            if path not in sound:
                path.unlink(missing_ok=True)

    def load(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest sound checkpoint, if any, and a sentence about each damaged one that was passed over."""
        notes = []
        for step, path in reversed(self._files()):
            try:
                tensors, header = read_tensors(path)
                if header.get("step") != step:
                    raise RunError(f"{path} holds the state after step {header.get('step')}, not {step}.")
            except RunError as error:
                self._damaged.add(path)
                notes.append(f"{error} It is passed over.")
                continue
            return Checkpoint(step, tensors, header), notes
        if notes:
            notes.append(f"No sound checkpoint of stage {self.stage} is left; it begins anew.")
        return None, notes

    def clear(self) -> None:
        """Remove the checkpoints of a finished stage."""
        if not self.writes:
            return
        for _, path in self._files():
            path.unlink(missing_ok=True)
