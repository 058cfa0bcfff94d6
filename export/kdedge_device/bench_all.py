"""What of a bundle is measured side by side on this machine: its engines where TensorRT is, else ONNX Runtime's files.

In the order FP32, FP16, INT8. What cannot be measured here is named with the reason. Python 3.8, standard library.
"""

import json
import subprocess
from typing import Dict, List, NamedTuple, Optional, Sequence

from kdedge_device.bench_rounds import Job
from kdedge_device.children import child
from kdedge_device.failures import Failure
from kdedge_device.manifest import Bundle
from kdedge_device.trt import Here, load_tensorrt
from kdedge_device.trt_build import BuildOptions
from kdedge_device.trt_bundle import find_engine, has_engines, source_artifact

__all__ = ["Field", "field"]

_PRECISIONS = ("fp32", "fp16", "int8")
_ORDER = {precision: place for place, precision in enumerate(_PRECISIONS)}


class Field(NamedTuple):
    """`jobs` to measure; `not_run`: {artifact: why}."""

    jobs: List[Job]
    not_run: Dict[str, str]


def field(
    bundle: Bundle, arguments: Sequence[str], batch: int = 1, engines: Optional[str] = None, build: bool = False
) -> Field:
    """`arguments`: what `bench` is called with for each, beside the bundle and the artifact.

    `build`: engines that are missing are built first, each in a process of its own. `engines`: where they are kept.
    """
    not_run: Dict[str, str] = {}
    jobs = _engines(bundle, arguments, batch, engines, build, not_run) if build or _any(bundle, engines) else []
    if jobs:
        return Field(jobs, not_run)
    for name, entry in sorted(bundle.artifacts.items(), key=lambda each: _ORDER.get(str(each[1]["precision"]), 3)):
        runtime = entry.get("runtime", "onnxruntime")
        if runtime == "onnxruntime":
            jobs.append(Job(name, [bundle.path, "--artifact", name, *arguments]))
        elif runtime == "tensorrt":
            not_run.setdefault(name, "it needs TensorRT and an engine, which `python run.pyz build` makes")
        else:
            not_run[name] = f"it needs {runtime}"
    return Field(jobs, not_run)


def _any(bundle: Bundle, engines: Optional[str]) -> bool:
    return engines is not None or has_engines(bundle)


def _engines(
    bundle: Bundle,
    arguments: Sequence[str],
    batch: int,
    folder: Optional[str],
    build: bool,
    not_run: Dict[str, str],
) -> List[Job]:
    """A job for each precision that has an engine for this machine; the reasons of the others go into `not_run`."""
    jobs: List[Job] = []
    try:
        here = load_tensorrt()
    except Failure as error:
        not_run["tensorrt"] = str(error)
        return jobs
    where = [] if folder is None else ["--engines", folder]
    for precision in _PRECISIONS:
        try:
            name = source_artifact(bundle, precision, here) if precision == "int8" else precision
        except Failure as error:
            not_run[precision] = str(error)
            continue
        why = _build(bundle, precision, batch, where) if build else None
        if why or not _fits(bundle, precision, batch, here, folder):
            hint = f"there is no engine for this machine; build it with: python run.pyz build --artifact {precision}"
            not_run[name] = why or hint
            continue
        chosen = [bundle.path, "--runtime", "tensorrt", "--artifact", precision, *where]
        jobs.append(Job(name, [*chosen, *arguments]))
    return jobs


def _fits(bundle: Bundle, precision: str, batch: int, here: Here, folder: Optional[str]) -> bool:
    try:
        return find_engine(bundle, BuildOptions(precision, (batch,) * 3), here, folder) is not None
    except Failure:
        return False


def _build(bundle: Bundle, precision: str, batch: int, where: Sequence[str]) -> Optional[str]:
    """Why it could not be built; None where it is there now."""
    arguments = ["build", bundle.path, "--artifact", precision, "--batch", str(batch), *where, "--json"]
    command = child("__main__", *arguments)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    if done.returncode == 0:
        return None
    try:
        return str(json.loads(done.stdout.decode("utf-8"))["error"])
    except (ValueError, KeyError, TypeError):
        return f"its build ended with code {done.returncode}"
