"""`kdedge bench`: one child process a measurement, one record a file.

A child each, because two sessions in one process share thread pools and caches, and waiting threads of the one slow
the other.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kdedge_device
from kdedge.errors import BundleError, DeviceError, KdedgeError, RunError
from kdedge.runs import Run, read_json, write_json
from kdedge_bench.records import Record, file_name
from kdedge_device.clock import EFFORTS

__all__ = ["Job", "bench", "jobs"]


@dataclass(frozen=True)
class Job:
    """One measurement: what the child is given, and where its record goes."""

    target: Path  # bundle folder or model file
    artifact: str | None  # of a bundle
    name: str  # in the record's file name
    out: Path


def bench(
    targets: Sequence[Path],
    effort: str = "quick",
    out: Path | None = None,
    *,
    threads: int = 1,
    on: Sequence[str] = ("local",),
    suite: str | None = None,
) -> list[Record]:
    """Measure each artifact of each target (RUN, BUNDLE or MODEL.onnx) in turn; return the records as written.

    A record goes to `out`, else to RUN/bench, else to bench/ beside a model file or a bundle that is in no run.
    RunError where a target is nothing that can be measured, DeviceError where a measurement fails.
    """
    _refuse_what_is_not_there(effort, on, suite)
    if threads < 1:
        raise DeviceError(f"{threads} threads were asked for; expected at least 1.")
    work = [job for target in targets for job in jobs(target, out)]  # all targets are checked before the first is timed
    if not work:
        raise RunError("Nothing to measure was named. Expected a run folder, a bundle or a .onnx file.")
    return [_measure(job, effort, threads) for job in work]


def _refuse_what_is_not_there(effort: str, on: Sequence[str], suite: str | None) -> None:
    if effort not in EFFORTS:
        raise DeviceError(f"The effort '{effort}' is not known. Expected one of: {', '.join(EFFORTS)}.")
    remote = [place for place in on if place != "local"]
    if remote:
        raise DeviceError(
            f"Measuring on {remote[0]} is not there yet; only --on local is. "
            "Copy the bundle folder to the board and run there: python run.pyz bench --json"
        )
    if suite is not None:
        raise DeviceError(
            f"The suite '{suite}' is not known: there are no suites yet. Name runs, bundles or models instead."
        )


def jobs(target: Path, out: Path | None = None) -> Iterator[Job]:
    """The measurements that `target` asks for. RunError where it is none of RUN, BUNDLE, MODEL.onnx."""
    if target.is_file():
        if target.suffix not in (".onnx", ".engine"):
            raise RunError(
                f"{target} is no ONNX file or engine. Expected a run folder, a bundle, a file named *.onnx or *.engine."
            )
        yield Job(target, None, target.stem, out or _records_of(target.parent))
        return
    if not target.is_dir():
        raise RunError(f"{target} does not exist. Expected a run folder, a bundle or a .onnx file.")
    bundle = target if _artifacts(target) else Run(target).bundle_path
    artifacts = _artifacts(bundle)
    if not artifacts:
        Run(target).read_manifest()  # a folder that is neither says so itself
        raise RunError(f"The run {target} has no bundle to measure. Make one first: kdedge export {target} --int8")
    for artifact in artifacts:
        yield Job(bundle, artifact, artifact, out or _records_of(bundle))


def _artifacts(folder: Path) -> list[str]:
    """Names of a bundle's artifacts that can be run; empty where `folder` is no bundle.

    A file for TensorRT is run by an engine, and one has to be in the bundle.
    """
    manifest = folder / "manifest.json"
    document = read_json(manifest) if manifest.is_file() else None
    artifacts = document.get("artifacts") if isinstance(document, dict) else None
    if not isinstance(artifacts, dict):
        return []
    engines = any(folder.glob("*.engine"))
    return [name for name, entry in artifacts.items() if engines or entry.get("runtime") != "tensorrt"]


def _records_of(folder: Path) -> Path:
    """RUN/bench where `folder` is the bundle of a run, else bench/ in the folder itself."""
    run = Run(folder.parent)
    if folder.name == run.bundle_path.name and run.manifest_path.is_file():
        return run.bench_path
    return folder / "bench"


def _measure(job: Job, effort: str, threads: int) -> Record:
    command = [sys.executable, "-m", "kdedge_device", "bench", str(job.target), "--json"]
    command += ["--effort", effort, "--threads", str(threads)]
    if job.artifact is not None:
        command += ["--artifact", job.artifact]
    # The child gets the kdedge_device that this process uses, wherever it was imported from.
    source = str(Path(kdedge_device.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
        )
    except OSError as error:
        raise DeviceError(f"The measurement of {job.target} cannot be started: {error}.") from error
    record = _record(job, done)
    record["artifact"]["name"] = job.name
    write_json(job.out / file_name(record, job.name), record)
    return record


def _record(job: Job, done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    """The child's document, or its failure as our error."""
    try:
        document = json.loads(done.stdout)
    except ValueError:
        document = {}
    if done.returncode == 0 and isinstance(document, dict) and isinstance(document.get("artifact"), dict):
        return document
    told = document.get("error") if isinstance(document, dict) else None
    what = told or f"it ended with code {done.returncode}. {' '.join(done.stderr.split())[-400:]}".strip()
    kind: type[KdedgeError] = BundleError if done.returncode == 5 else DeviceError
    raise kind(f"The measurement of {job.artifact or job.target} failed: {what}")
