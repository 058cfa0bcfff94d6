"""The folder of a run: its name, whether it may be used as asked, and the manifest it begins with."""

import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdedge import __version__, recipe_io
from kdedge.data import Source, Splits
from kdedge.errors import RunError
from kdedge.recipe import Recipe
from kdedge.runs import Run, half_written, read_json, sha256_bytes, sha256_file
from kdedge.train.metrics import Display

__all__ = ["begin_manifest", "check_folder", "run_folder"]


def run_folder(recipe: Recipe, source: Source, splits: Splits) -> Path:
    """runs/<recipe>-<data>-<labels>-s<seed>, where no --out says otherwise."""
    labels = "all" if splits.labels is None else splits.labels
    return Path("runs") / f"{recipe.name}-{source.name}-{labels}-s{recipe.seed}"


def check_folder(run: Run, recipe: Recipe, device: torch.device, resume: bool) -> dict[str, Any] | None:
    """The result where the run is finished; RunError where the folder cannot be used as asked."""
    again = "Go on with it by --resume, or choose another folder with --out."
    if not run.manifest_path.is_file():
        if resume:
            raise RunError(f"There is nothing to resume: {run.path} holds no run. Leave --resume out to start one.")
        ours = {run.path / ".lock", *half_written(run.path)}  # of a run that was killed at its first write
        if run.path.exists() and (not run.path.is_dir() or any(p not in ours for p in run.path.iterdir())):
            raise RunError(f"{run.path} exists and is no run of kdedge. It was not touched; choose another --out.")
        return None
    manifest = run.read_manifest()
    if not resume:
        status = manifest.get("status")
        detail = "is finished" if status == "finished" else f"exists already (status: {status})"
        hint = "Choose another --seed or --out, or remove it." if status == "finished" else again
        raise RunError(f"The run in {run.path} {detail}. It was not touched. {hint}")
    differences = _differences(recipe_io.as_now(manifest.get("recipe", {}), recipe), recipe.model_dump(mode="json"))
    differences += _other_teacher(manifest, recipe)
    if differences:
        raise RunError(
            f"The run in {run.path} was started with another recipe: {'; '.join(differences)}. "
            "Resume it as it was started, or choose another --out."
        )
    if manifest.get("status") == "finished":
        result: dict[str, Any] = read_json(run.result_path)
        return result
    if manifest.get("device_type", device.type) != device.type:
        before = manifest["device_type"]
        raise RunError(
            f"The run in {run.path} was begun on {before}, and this would go on on {device.type}, with other "
            f"rounding. Resume it with --device {before}, or choose another --out."
        )
    return None


_MAY_CHANGE = {
    "data.resident_mib",
    "engine.checkpoint_every_s",
    "engine.device",  # the same type of device is asked for on its own
    "engine.keep_checkpoints",
    "engine.tensorboard",
}


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old, now new` for each value that differs. Where the run computes may change; what it computes may not."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        name, old, new = f"{prefix}{key}", before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{name}.")
        elif old != new and name not in _MAY_CHANGE and not (name == "teacher.ready" and old and new):
            found.append(f"{name} was {old!r}, now {new!r}")
    return found


def _other_teacher(manifest: dict[str, Any], recipe: Recipe) -> list[str]:
    """A ready teacher is the file's content: its folder may be moved, or be typed otherwise, and it may be gone."""
    before = (manifest.get("recipe", {}).get("teacher") or {}).get("ready")
    now, known = recipe.teacher and recipe.teacher.ready, manifest.get("ready_sha256")
    if not before or not now or before == now or known is None or not Path(now).expanduser().is_file():
        return []
    found = sha256_file(Path(now).expanduser())
    if found == known:
        return []
    return [f"teacher.ready was {before!r} (sha256 {known[:12]}), now {now!r} ({found[:12]})"]


def begin_manifest(
    run: Run, recipe: Recipe, source: Source, device: torch.device, display: Display, processes: int
) -> None:
    """Begin the manifest, or go on with the one there is; says so where packages or processes have changed since."""
    import torchvision

    before = run.read_manifest() if run.manifest_path.is_file() else {}
    versions = {
        "kdedge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }
    changed = [
        f"{n} {before['versions'][n]} to {v}" for n, v in versions.items() if before and before["versions"][n] != v
    ]
    if changed:
        display.say(f"Since the run began, {', '.join(changed)}: it goes on, but not bit for bit as it would have.")
    if (known := before.get("processes", processes)) != processes:
        display.say(
            f"The run was begun by {known} processes and goes on with {processes}: the same training, but for rounding."
        )
    asked = recipe.model_dump(mode="json")
    run.update_manifest(
        status="running",
        stage=before.get("stage"),
        recipe=asked,
        recipe_sha256=sha256_bytes(recipe_io.dump(recipe).encode()),
        data_fingerprint=source.fingerprint,
        seed=recipe.seed,
        versions=versions,
        failure=None,
        host={"system": platform.platform(), "machine": platform.machine()},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        device_type=device.type,
        processes=processes,
        engine_plan=before.get("engine_plan", {}),
        stages=before.get("stages", {}),
        started_at_s=before.get("started_at_s", round(time.time(), 3)),
    )
