"""What a machine that is lent for minutes leaves behind: its working folder as files of a size that travels.

The folder becomes one gzipped tar, cut into parts (`cat state.[0-9]* | tar xz` opens it too), and state.json names
every part and every file with its hash. Nothing is trusted on the way back: a part or a file with another hash is
refused.
"""

import io
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdedge.errors import RunError
from kdedge.runs import SCHEMA, read_json, sha256_file, write_json

__all__ = ["INDEX", "LIMIT_BYTES", "pack", "unpack", "worth_keeping"]

INDEX = "state.json"
LIMIT_BYTES = 14_000_000
"""Of a part. A file that comes back from the machine may have 16 MiB; what is asked of us is below 15 MB."""

_TELLING = {"manifest.json", "metrics.jsonl", "recipe.yaml", "result.json"}  # of a finished run


def pack(work: Path, files: Iterable[Path], out: Path, limit_bytes: int = LIMIT_BYTES) -> int:
    """Write `files`, which lie under `work`, to `out` as state.json and its parts; the bytes of all parts.

    state.json is written last: a machine that is taken away in between leaves a state that is refused, never a wrong
    one.
    """
    chosen, content = sorted(files), io.BytesIO()
    # Level 1: weights shrink at no level. All of it is in memory once: what may come back is 64 MiB.
    with tarfile.open(mode="w:gz", fileobj=content, compresslevel=1) as archive:
        for path in chosen:
            archive.add(path, path.relative_to(work).as_posix())
    packed = content.getvalue()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("state.[0-9]*"):
        old.unlink()
    parts = [out / f"state.{i:02d}" for i in range(-(-len(packed) // limit_bytes))]
    for i, path in enumerate(parts):
        path.write_bytes(packed[i * limit_bytes : (i + 1) * limit_bytes])
    index = {
        "schema": SCHEMA,
        "parts": [_described(path, path.name) for path in parts],
        "files": [_described(path, path.relative_to(work).as_posix()) for path in chosen],
    }
    write_json(out / INDEX, index)
    return len(packed)


def _described(path: Path, name: str) -> dict[str, Any]:
    return {"name": name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def unpack(folder: Path, work: Path) -> None:
    """Put the state in `folder` back under `work`, in place of what is there; RunError where a hash is another."""
    index = read_json(folder / INDEX)
    if index.get("schema") != SCHEMA:
        raise RunError(f"{folder / INDEX} has schema {index.get('schema')}; {SCHEMA} was expected.")
    _check(folder, index["parts"])
    begun = work.with_name(f"{work.name}.begun")
    shutil.rmtree(begun, ignore_errors=True)
    packed = b"".join((folder / part["name"]).read_bytes() for part in index["parts"])
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(begun, filter="data")
    _check(begun, index["files"])
    shutil.rmtree(work, ignore_errors=True)
    begun.rename(work)


def _check(folder: Path, described: Iterable[dict[str, Any]]) -> None:
    for wanted in described:
        path = folder / wanted["name"]
        if not path.is_file():
            raise RunError(f"{path} is missing. Copy the state that the last call left again, all of its parts.")
        if (found := sha256_file(path)) != wanted["sha256"]:
            raise RunError(
                f"{path} has sha256 {found[:12]}, {wanted['sha256'][:12]} was expected. Copy the state that the last "
                "call left again, all of its parts."
            )


def worth_keeping(work: Path, weights: Iterable[Path] = ()) -> list[Path]:
    """The files under `work` that a later machine needs.

    Of a finished run (a folder in work/runs) what it says of itself, and those `weights` that others will read; of one
    that is under way all but what is made again, and of its checkpoints the newest of each stage alone.
    """
    wanted, kept = set(weights), []
    for path in work.rglob("*"):
        if not path.is_file() or path.name.startswith(".") or path.name == "features.npy":
            continue
        run = _run_of(path, work)
        if run is None or path in wanted:
            kept.append(path)
        elif _finished(run):
            kept += [path] if path.name in _TELLING else []
        elif path.parent.name != "checkpoint" or path == _newest(path):
            kept.append(path)
    return kept


def _run_of(path: Path, work: Path) -> Path | None:
    names = path.relative_to(work).parts
    return work / names[0] / names[1] if names[0] == "runs" and len(names) > 2 else None


def _finished(run: Path) -> bool:
    manifest = run / "manifest.json"
    return manifest.is_file() and read_json(manifest).get("status") == "finished"


def _newest(path: Path) -> Path:
    """The newest checkpoint of the stage that `path` is of: stage.STEP.safetensors."""
    same_stage = path.parent.glob(f"{path.name.partition('.')[0]}.*.safetensors")
    return max(same_stage, key=lambda each: int(each.name.split(".")[1]))
