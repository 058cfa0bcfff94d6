"""What of a bundle is measured side by side on this machine: its engines where TensorRT is, else ONNX Runtime's files.

In the order FP32, FP16, INT8. What cannot be measured here is named with the reason. Python 3.8, standard library.
"""

import json
import subprocess
from typing import Dict, List, NamedTuple, Optional, Sequence

from kdedge_device.bench_rounds import Job
from kdedge_device.children import child
from kdedge_device.choose_runner import why_not_onnxruntime
from kdedge_device.failures import BudgetFailure, Failure
from kdedge_device.manifest import Bundle
from kdedge_device.trt import Here, load_tensorrt
from kdedge_device.trt_build import BuildOptions
from kdedge_device.trt_bundle import find_engine, has_engines, source_artifact
from kdedge_device.trt_cache import read_engine

__all__ = ["Field", "Wish", "field"]

_PRECISIONS = ("fp32", "fp16", "int8")
_ORDER = {precision: place for place, precision in enumerate(_PRECISIONS)}


class Wish(NamedTuple):
    """What the engines to be measured are like: for `batch` images a call (0: any number), kept in `folder`.

    `build`: those that are missing are built, with `workspace_mib` for a kernel, each in a process of its own.
    """

    batch: int = 1
    folder: Optional[str] = None
    build: bool = False
    workspace_mib: int = BuildOptions().workspace_mib


_USUAL = Wish()


class Field(NamedTuple):
    """`jobs` to measure; `not_run`: {artifact: why} of what is not for this machine; `failed`: of builds."""

    jobs: List[Job]
    not_run: Dict[str, str]
    failed: Dict[str, Failure]


def field(bundle: Bundle, arguments: Sequence[str], wish: Wish = _USUAL) -> Field:
    """`arguments`: what `bench` is called with for each, beside the bundle and the artifact.

    Where engines are to be built and TensorRT is here, ONNX Runtime's files never stand in for them: whoever asks for a
    board's engines must not get times of its CPU.
    """
    BuildOptions("fp32", (wish.batch or 1,) * 3, wish.workspace_mib).checked()
    found = Field([], {}, {})
    if wish.build or wish.folder is not None or has_engines(bundle):
        try:
            here = load_tensorrt()
        except Failure as error:
            found.not_run["tensorrt"] = str(error)
        else:
            _add_engines(found, bundle, arguments, wish, here)
            if wish.build or found.jobs:
                return found
    for name in sorted(bundle.artifacts, key=lambda each: _ORDER.get(str(bundle.artifacts[each]["precision"]), 3)):
        why = why_not_onnxruntime(bundle, name)
        if why:
            found.not_run.setdefault(name, why)
        else:
            found.jobs.append(Job(name, [bundle.path, "--artifact", name, *arguments]))
    return found


def _add_engines(found: Field, bundle: Bundle, arguments: Sequence[str], wish: Wish, here: Here) -> None:
    """A job for each precision that has an engine for this machine, and why the others have none."""
    where = [] if wish.folder is None else ["--engines", wish.folder]
    for precision in _PRECISIONS:
        try:
            source = source_artifact(bundle, precision, here)
        except Failure as error:
            found.not_run[precision] = str(error)
            continue
        name = source if precision == "int8" else precision
        if not _fits(bundle, precision, wish, here):
            if not wish.build:
                hint = (
                    f"there is no engine for this machine; build it with: python run.pyz build --artifact {precision}"
                )
                found.not_run[name] = hint
                continue
            why = _build(bundle, precision, wish, where)
            if why:
                found.failed[name] = BudgetFailure(f"There is no {precision.upper()} engine: {why}")
                continue
        chosen = [bundle.path, "--runtime", "tensorrt", "--artifact", precision, *where]
        found.jobs.append(Job(name, [*chosen, *arguments]))


def _fits(bundle: Bundle, precision: str, wish: Wish, here: Here) -> bool:
    """Whether an engine lies there that can be loaded, and computes neither more nor fewer images than are wished."""
    try:
        engine = find_engine(bundle, BuildOptions(precision, (wish.batch or 1,) * 3), here, wish.folder)
        if engine is None:
            return False
        least, _, most = engine[1]["options"]["batch"]
        if wish.batch and not least <= wish.batch <= most:
            return False
        read_engine(engine[0], here, engine[1])
    except Failure:
        return False
    return True


def _build(bundle: Bundle, precision: str, wish: Wish, where: Sequence[str]) -> Optional[str]:
    """Why it could not be built; None where it is there now."""
    options = ["--batch", str(wish.batch or 1), "--workspace-mib", str(wish.workspace_mib)]
    arguments = ["build", bundle.path, "--artifact", precision, *options, *where, "--json"]
    done = subprocess.run(child("__main__", *arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    if done.returncode == 0:
        return None
    try:
        return str(json.loads(done.stdout.decode("utf-8"))["error"])
    except (ValueError, KeyError, TypeError):
        killed = "; if it was killed for lack of memory: --workspace-mib 256" if done.returncode < 0 else ""
        return f"its build ended with code {done.returncode}{killed}"
