"""Whether two finished runs are the same: weights by hash, arrays by value, lines and numbers by all but time."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from kdedge.runs import Run, read_json, sha256_file

__all__ = ["differences", "litter", "summary_of"]

# What tells how long something took, or how much memory: the unit stands at the end of every such name.
_MEASURED = re.compile(r"(.*_)?(s|ms|mib|seconds|per_second)|.*_(wait|blocked)_fraction|measured")


def summary_of(run: Run) -> dict[str, Any]:
    """Everything of a finished run that must not depend on how often it was stopped."""
    manifest = run.read_manifest()
    weights = {path.name: sha256_file(path) for path in sorted(run.path.glob("*.safetensors"))}
    lines = [json.loads(line) for line in run.metrics_path.read_text(encoding="utf-8").splitlines()]
    return {
        "weights": weights,
        "trusted": _arrays(run.trusted_path),
        "predictions": _arrays(run.predictions_path),
        "splits": sha256_file(run.splits_path),
        "recipe": _may_change(run.recipe_path.read_text(encoding="utf-8")),
        "metrics": [_timeless(line) for line in lines if "loader_wait" not in line],  # a remark on this machine
        "result": _timeless(read_json(run.result_path)),
        "status": manifest["status"],
        "plans": {stage: noted["plan"] for stage, noted in manifest["engine_plan"].items()},
        "stages": sorted(manifest["stages"]),
    }


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """A sentence about each part that differs; none where the runs are the same."""
    said = []
    for part, right in expected.items():
        if (left := found[part]) == right:
            continue
        if isinstance(right, dict):
            keys = sorted(key for key in right.keys() | left.keys() if right.get(key) != left.get(key))
            said.append(f"{part}: {', '.join(keys)} differ.")
        elif isinstance(right, list):
            place = next((i for i, pair in enumerate(zip(right, left, strict=False)) if pair[0] != pair[1]), None)
            where = f"the lengths are {len(right)} and {len(left)}" if place is None else f"{right[place]} expected"
            said.append(f"{part}: {where}{'' if place is None else f', {left[place]} found, at line {place}'}.")
        else:
            said.append(f"{part}: {right} expected, {left} found.")
    return said


def litter(run: Run) -> list[str]:
    """Names that a finished run should not hold: temporary files, and checkpoints, which are removed at its end."""
    hidden = [path for path in run.path.rglob(".*") if path.name != ".lock"]
    return sorted(path.name for path in hidden + [p for p in (run.checkpoint_path,) if p.exists()])


def _may_change(recipe: str) -> str:
    """recipe.yaml without the one key that each start may set anew."""
    return "".join(line for line in recipe.splitlines(keepends=True) if "checkpoint_every_s" not in line)


def _arrays(path: Path) -> dict[str, str]:
    """sha256 of each array of an .npz, whose bytes carry the time of day."""
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    return {
        name: hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()
        for name, array in found.items()
    }


def _timeless(document: Any) -> Any:
    """Without what was measured with a clock, at any depth."""
    if isinstance(document, dict):
        return {key: _timeless(value) for key, value in document.items() if not _MEASURED.fullmatch(key)}
    return [_timeless(value) for value in document] if isinstance(document, list) else document
