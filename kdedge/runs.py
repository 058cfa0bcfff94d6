"""Run folders: their paths, their manifest, their lock, and which one is the latest finished."""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdedge.errors import RunError

__all__ = [
    "SCHEMA",
    "Run",
    "half_written",
    "latest_finished",
    "open_finished",
    "read_json",
    "sha256_bytes",
    "sha256_file",
    "sync_folder",
    "write_bytes",
    "write_json",
]

SCHEMA = 1

_HALF_WRITTEN = ".part"


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` under `path` so that a reader sees the old file or the new one, never a part.

    Temporary name, fsync, rename, fsync of the folder. A full disk or a read-only folder raises RunError and leaves the
    old file.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}{_HALF_WRITTEN}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:  # Ctrl-C between open and rename leaves nothing behind either
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """What was renamed in `folder` stays so: a power cut could else bring the old file back."""
    with contextlib.suppress(OSError):  # some file systems cannot; the file itself is synced
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(
        f"Cannot write {path}: {error.strerror or error}. What was there before is untouched. "
        "Free some space or choose a writable folder with --out; a stopped training goes on with --resume."
    )


def half_written(folder: Path) -> list[Path]:
    """What `write_bytes` was writing in `folder` when its process was killed, or is writing just now."""
    return sorted(folder.glob(f".*{_HALF_WRITTEN}"))


def write_json(path: Path, document: Any) -> None:
    """Atomic, indented, with a final newline. NaN is refused: it is not JSON."""
    write_bytes(path, (json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The document in `path`; RunError where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; a file written by kdedge was expected there.") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as JSON: {error}.") from error


def sha256_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Run:
    """One run folder. Paths are properties, so that a name is spelled once."""

    path: Path

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def splits_path(self) -> Path:
        return self.path / "splits.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def pretrained_path(self) -> Path:
        return self.path / "pretrained.safetensors"

    @property
    def teacher_path(self) -> Path:
        return self.path / "teacher.safetensors"

    @property
    def student_path(self) -> Path:
        return self.path / "student.safetensors"

    @property
    def baseline_path(self) -> Path:
        return self.path / "baseline.safetensors"

    @property
    def failure_path(self) -> Path:
        return self.path / "failure.json"

    @property
    def tensorboard_path(self) -> Path:
        return self.path / "tensorboard"

    @property
    def trusted_path(self) -> Path:
        return self.path / "trusted.npz"

    @property
    def checkpoint_path(self) -> Path:
        return self.path / "checkpoint"

    @property
    def predictions_path(self) -> Path:
        return self.path / "predictions.npz"

    @property
    def result_path(self) -> Path:
        return self.path / "result.json"

    @property
    def bundle_path(self) -> Path:
        return self.path / "bundle"

    @property
    def bench_path(self) -> Path:
        return self.path / "bench"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; RunError where the folder is no run, or one of a newer kdedge."""
        if not self.manifest_path.is_file():
            raise RunError(
                f"{self.path} is not a run folder: it has no manifest.json. "
                "Expected a folder made by kdedge train-recipe."
            )
        manifest = read_json(self.manifest_path)
        if not isinstance(manifest, dict) or not isinstance(manifest.get("schema"), int):
            raise RunError(
                f"{self.manifest_path} has no integer 'schema'; it was not written by kdedge, or was altered."
            )
        if manifest["schema"] > SCHEMA:
            raise RunError(
                f"{self.manifest_path} has schema {manifest['schema']}; this kdedge reads up to {SCHEMA}. "
                "Update kdedge."
            )
        return manifest

    def update_manifest(self, **changes: Any) -> None:
        manifest = self.read_manifest() if self.manifest_path.is_file() else {"schema": SCHEMA}
        write_json(self.manifest_path, manifest | changes)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a process trains in this folder; the system frees it when the process dies, however it dies.

        What killed processes left half-written is removed first.
        """
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w")
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(
                    f"Another kdedge is training in {self.path}. Wait for it, or choose another folder with --out."
                ) from None
            for path in (*half_written(self.path), *half_written(self.checkpoint_path)):
                path.unlink(missing_ok=True)
            yield


def _finished(path: Path) -> bool:
    try:
        return bool(Run(path).read_manifest().get("status") == "finished")
    except RunError:
        return False


def latest_finished(root: Path = Path("runs")) -> Run:
    """The finished run under `root` whose manifest was written last."""
    folders = [p for p in root.iterdir() if p.is_dir() and _finished(p)] if root.is_dir() else []
    if not folders:
        raise RunError(
            f"There is no finished run under {root.resolve()}. Name one, or make one with: "
            "kdedge train-recipe mobilenet"
        )
    return Run(max(folders, key=lambda p: Run(p).manifest_path.stat().st_mtime))


def open_finished(path: Path | None, root: Path = Path("runs")) -> Run:
    """The run in `path`, or the latest finished one; RunError where its training has not finished."""
    if path is None:
        return latest_finished(root)
    if not path.is_dir():
        raise RunError(f"The run folder {path} does not exist.")
    status = Run(path).read_manifest().get("status")
    if status != "finished":
        raise RunError(
            f"The run in {path} is {status}, not finished. Go on with it: kdedge train-recipe ... --out {path} --resume"
        )
    return Run(path)
