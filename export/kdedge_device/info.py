"""`run.pyz info`: what this machine is, what it can run of the bundle, and for what reason not. It always answers.

Python 3.8, standard library: the packages that are missing are the answer.
"""

import platform
from typing import Any, Dict, List, Optional, Tuple

from kdedge_device import board
from kdedge_device.cuda_probe import Probe, probe
from kdedge_device.failures import Failure, VersionFailure
from kdedge_device.manifest import engines_in, read_manifest
from kdedge_device.packages import Found, look_for
from kdedge_device.record import machine
from kdedge_device.trt import Here
from kdedge_device.trt_cache import fingerprint, read_side
from kdedge_device.watch import snapshot

__all__ = ["info"]

_WITH_BUNDLE = ("check", "build", "eval", "predict")


def info(path: Optional[str]) -> Tuple[Dict[str, Any], str, int]:
    """The document, the text for people and the exit code, which tells of the bundle at `path`; None: there is none.

    {python, machine, board, state, runtimes: {package: version or null}, problems: {package: why not}, can: {command:
    null or why not}, bundle, manifest}, and where the bundle cannot be read also {error, class, exit_code}.
    """
    here, found, gpu = board.identify(), look_for(), probe()
    manifest, failure = _manifest(path)
    runtimes: Dict[str, Any] = {name: each.version for name, each in found.items()}
    runtimes["cuda_driver"] = gpu.gpus[0].driver or gpu.gpus[0].cuda if gpu.gpus else None
    document: Dict[str, Any] = {
        "python": platform.python_version(),
        "machine": machine(),
        "board": here._asdict(),
        "state": snapshot(),
        "runtimes": runtimes,
        "problems": _problems(found, gpu),
        "can": _can(here, found, gpu, path, failure),
        "bundle": path,
        "manifest": manifest,
    }
    if failure is not None:
        document.update({"error": str(failure), "class": type(failure).__name__, "exit_code": failure.exit_code})
    return document, _text(document), failure.exit_code if failure else 0


def _manifest(path: Optional[str]) -> Tuple[Optional[Dict[str, Any]], Optional[Failure]]:
    try:
        return (None if path is None else read_manifest(path)), None
    except Failure as error:
        return None, error


def _problems(found: Dict[str, Found], gpu: Probe) -> Dict[str, str]:
    problems = {name: each.reason for name, each in found.items() if each.version is None}
    if not gpu.usable:
        problems["cuda_driver"] = gpu.reason
    return problems


def _can(
    here: board.Board,
    found: Dict[str, Found],
    gpu: Probe,
    path: Optional[str],
    failure: Optional[Failure],
) -> Dict[str, Optional[str]]:
    """For every command the first reason that stops it here. `check` proves at least that the files are whole."""
    tensorrt, onnxruntime = (found[name].version is not None for name in ("tensorrt", "onnxruntime"))
    reasons: Dict[str, Optional[str]] = {}
    for command in ("check", "build", "bench", "eval", "predict"):
        runtime = ["tensorrt"] if command == "build" else [] if command == "check" or tensorrt else ["onnxruntime"]
        reason = _refused(here) or _missing(found, ["numpy", *runtime])
        engines = command == "build" or (command != "check" and not onnxruntime)
        if engines and not gpu.usable:
            reason = reason or gpu.reason
        if command in _WITH_BUNDLE:
            reason = reason or _no_bundle(path, failure)
        if engines and command != "build" and path is not None:
            reason = reason or _no_engine(path, found, gpu)
        reasons[command] = reason
    return reasons


def _no_engine(path: str, found: Dict[str, Found], gpu: Probe) -> Optional[str]:
    """None where one lies there that says it was built on such a machine; opening it will tell the rest."""
    here = fingerprint(Here(None, str(found["tensorrt"].version), gpu.gpus[0]), "", {})
    machine_here = {key: here[key] for key in ("gpu", "capability", "driver", "cuda", "tensorrt")}
    for engine in engines_in(path):
        try:
            mark = read_side(engine)["fingerprint"]
        except Failure:
            continue
        if all(mark.get(key) == value for key, value in machine_here.items()):
            return None
    return "There is no ONNX Runtime, and no engine for this machine yet. Build one with: python run.pyz build"


def _refused(here: board.Board) -> Optional[str]:
    try:
        board.refuse_unsupported(here)
    except VersionFailure as error:
        return str(error)
    return None


def _missing(found: Dict[str, Found], needed: List[str]) -> Optional[str]:
    missing = [name for name in needed if found[name].version is None]
    if not missing:
        return None
    why = "; ".join(f"{name}: {found[name].reason}" for name in missing)
    packages = [_pinned(found, name) for name in missing if name != "tensorrt"]
    ways = ["pip install " + " ".join(packages)] if packages else []
    if "tensorrt" in missing:
        ways.append("TensorRT, on a Jetson, with: sudo apt install nvidia-jetpack")
    return f"It needs {' and '.join(missing)} ({why}). Install: {', and '.join(ways)}"


def _pinned(found: Dict[str, Found], name: str) -> str:
    """Wheels of ONNX Runtime from 1.21 on stop cores of ARMv8.0 (Raspberry Pi 4) with an illegal instruction."""
    illegal = name == "onnxruntime" and "SIGILL" in found[name].reason
    return "'onnxruntime<1.21'" if illegal else name


def _no_bundle(path: Optional[str], failure: Optional[Failure]) -> Optional[str]:
    if failure is not None:
        return str(failure)
    return "No bundle was named; give one with --bundle FOLDER." if path is None else None


def _text(document: Dict[str, Any]) -> str:
    here = document["board"]
    lines = ["{}, Python {}".format(here["model"] or document["machine"]["name"], document["python"])]
    if here["l4t"]:
        lines.append("JetPack {jetpack} (L4T {l4t}), CUDA {cuda}, TensorRT {tensorrt}".format(**here))
    state = _state_line(document["state"])
    lines.extend([state] if state else [])
    for name, version in document["runtimes"].items():
        lines.append("{:12} {}".format(name, version or "-  " + document["problems"].get(name, "")))
    lines.extend(_bundle_lines(document))
    lines.append("can run:     " + (", ".join(name for name, why in document["can"].items() if not why) or "nothing"))
    for reason in sorted({why for why in document["can"].values() if why}):
        lines.append("not {}: {}".format(", ".join(n for n, why in document["can"].items() if why == reason), reason))
    return "\n".join(lines)


def _state_line(state: Dict[str, Any]) -> str:
    """What a latency of now would depend on, as far as this machine tells: not much on a PC."""
    mode, clocks, degrees = state["power_mode"], (state["clocks_mhz"] or {}).get("gpu"), state["temperatures_c"]
    parts = ["power mode {} ({})".format(mode["name"] or "of no name", mode["id"])] if mode else []
    if clocks and clocks["cur"] and clocks["max"]:
        parts.append("GPU {cur:.0f} of {max:.0f} MHz".format(**clocks))
    if degrees:
        parts.append(f"{max(degrees.values()):.0f} degrees")
    told = ", ".join(parts)
    return "\n".join(line for line in (told, state["clocks_left_held"]) if line)


def _bundle_lines(document: Dict[str, Any]) -> List[str]:
    manifest = document["manifest"]
    if manifest is None:
        return [document["error"]] if "error" in document else []
    classes = manifest["classes"]
    named = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    lines = ["{}: {} classes, {}".format(document["bundle"], len(classes), named)]
    for name, entry in sorted(manifest["artifacts"].items()):
        accuracy, mark = entry.get("accuracy"), "  (shipped)" if name == manifest["shipped"] else ""
        told = "" if accuracy is None else f"  test accuracy {accuracy:.4f}"
        lines.append("  {:9} {}  {} bytes{}{}".format(name, entry["file"], entry["bytes"], told, mark))
    lines.extend(
        "  engine    {}  {} bytes, for {}".format(file, entry["bytes"], entry.get("gpu"))
        for file, entry in sorted(manifest.get("engines", {}).items())
    )
    return lines
