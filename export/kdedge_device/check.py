"""Whether a bundle is whole, and answers here as it did at export: every hash, and the logits of the golden images.

n images, K classes.
"""

import os
from typing import Any, Dict, List, Tuple

import numpy as np

from kdedge_device.choose_runner import Runner, runtime_of, why_not_onnxruntime
from kdedge_device.evaluate import checked_logits
from kdedge_device.failures import BudgetFailure, CorruptFailure, DeviceFailure, Failure, RuntimeFailure, VersionFailure
from kdedge_device.manifest import Bundle
from kdedge_device.runners import OrtRunner
from kdedge_device.trt import Here, load_tensorrt
from kdedge_device.trt_build import PRECISIONS, BuildOptions
from kdedge_device.trt_bundle import find_engine, fitting_engines, has_engines, open_engine, source_artifact
from kdedge_device.trt_runner import TrtRunner

__all__ = ["check"]

# Of the span of the golden logits. An engine rounds to eleven bits (TF32, FP16) what it stores in each of some fifty
# layers, and an FP16 one also what it adds up; ONNX Runtime, which the golden logits are of, keeps more.
_ENGINE_SHARE = 0.03
_Golden = Dict[str, "np.ndarray[Any, Any]"]


def check(bundle: Bundle, threads: int = 1) -> Dict[str, Any]:
    """Hash every file, run on the golden images what can be run here, and compare with the logits noted at export.

    {files, engines: {file: state}, golden: {name: {artifact, runtime, max_abs_difference, tolerance, same_class}},
    not_run: {name: why}}. A name is an artifact's, for ONNX Runtime, or the file of an engine that was built here.
    `golden` is empty where nothing can be run here: that is no fault of the bundle. CorruptFailure where a file is
    altered, BudgetFailure where a logit is further off than `tolerance`.
    """
    files, engines, golden = bundle.verify(), bundle.engines(), bundle.golden()
    found: Dict[str, Dict[str, Any]] = {}
    not_run: Dict[str, str] = {}
    for name in sorted(bundle.artifacts):
        if "logits__" + name not in golden:
            raise CorruptFailure(f"golden.npz of {bundle.path} has no logits of '{name}'. Copy the bundle again.")
        why = why_not_onnxruntime(bundle, name)
        if why:
            not_run[name] = why
            continue
        try:
            found[name] = _compared(bundle, golden, name, OrtRunner(bundle.model_path(name), threads))
        except RuntimeFailure as error:
            not_run[name] = str(error)
    if has_engines(bundle):
        _add_engines(bundle, golden, found, not_run)
    wrong = [name for name, each in found.items() if not each["max_abs_difference"] <= each["tolerance"]]
    if wrong:
        raise BudgetFailure(
            "The golden images give other logits than at export: {}.".format(
                "; ".join(
                    "{} differs by {max_abs_difference:.4g}, tolerated are {tolerance:.4g}".format(n, **found[n])
                    for n in wrong
                )
            )
        )
    return {"files": files, "engines": engines, "golden": found, "not_run": not_run}


def _compared(bundle: Bundle, golden: _Golden, artifact: str, runner: Runner) -> Dict[str, Any]:
    expected = golden["logits__" + artifact]
    with runner:
        logits = checked_logits(bundle, runner, golden["images"])
    tolerance = float(bundle.artifacts[artifact]["golden_tolerance"])
    if isinstance(runner, TrtRunner):
        tolerance = max(tolerance, _ENGINE_SHARE * float(expected.max() - expected.min()))
    return {
        "artifact": artifact,
        "runtime": runner.runtime,
        "max_abs_difference": float(np.abs(logits - expected).max()),
        "tolerance": tolerance,
        "same_class": float((logits.argmax(1) == expected.argmax(1)).mean()),
    }


def _add_engines(bundle: Bundle, golden: _Golden, found: Dict[str, Dict[str, Any]], not_run: Dict[str, str]) -> None:
    """What every engine for this machine answers; an artifact that one of them is built from has then been run."""
    try:
        here = load_tensorrt()
    except (RuntimeFailure, VersionFailure) as error:
        not_run.update(dict.fromkeys(_for_tensorrt(bundle), str(error)))
        return
    for precision in PRECISIONS:
        for path, (artifact, mark) in _engines(bundle, precision, here).items():
            try:
                compared = _compared(bundle, golden, artifact, TrtRunner(path, here, mark))
            except (RuntimeFailure, VersionFailure, DeviceFailure) as error:  # an engine of another machine
                not_run[os.path.basename(path)] = str(error)
            else:
                found[os.path.basename(path)] = compared
                not_run.pop(artifact, None)
    for name in _for_tensorrt(bundle):
        if name in not_run:
            try:
                open_engine(bundle, name, here)
            except Failure as error:
                not_run[name] = str(error)


def _for_tensorrt(bundle: Bundle) -> List[str]:
    return [name for name in sorted(bundle.artifacts) if runtime_of(bundle, name) == TrtRunner.runtime]


def _engines(bundle: Bundle, precision: str, here: Here) -> Dict[str, Tuple[str, Dict[str, Any]]]:
    """{path: (the artifact it is built from, fingerprint)}; also one that has only the name of one for this machine."""
    try:
        artifact = source_artifact(bundle, precision, here)
    except Failure:  # such an engine cannot be built of this bundle
        return {}
    engines = fitting_engines(bundle, precision, here)
    named = find_engine(bundle, BuildOptions(precision), here)
    if named is not None:
        engines.setdefault(*named)
    return {path: (artifact, mark) for path, mark in engines.items()}
