"""`kdedge export --on`: what a bundle could ship is timed where it will run, and its gate.json is decided anew.

The accuracy side of a gate is the same everywhere, since the files are; only the speeds are the machine's own.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdedge.errors import DeviceError
from kdedge.runs import read_json, sha256_file, write_json
from kdedge_bench.measured import reasons
from kdedge_export.bundle import new_bundle
from kdedge_export.export import CPU, TENSORRT
from kdedge_export.judging.gate import fill_in
from kdedge_export.judging.latency import LOOKS, Speedup, speedup
from kdedge_export.targets import Target, for_board

__all__ = ["Command", "decide_there"]

Command = Callable[[Sequence[str]], Mapping[str, Any]]
"""`python run.pyz ARGUMENTS --json` on the machine in question; DeviceError where it fails."""

ROUNDS, CONFIDENCE = LOOKS[0]
RACE = ("bench", "--artifact", "all", "--rounds", str(ROUNDS), "--seconds", "0.25", "--runs", "30")


def decide_there(
    bundle: Path,
    run: Command,
    targets: Sequence[Target] = (),
    say: Callable[[str], None] = lambda sentence: None,
) -> tuple[str, dict[str, Any]]:
    """(target, its entry in gate.json), decided by speeds that `run` measured there. The bundle is replaced whole.

    Of `targets`, which the bundle was exported for, the one that the machine is; else "tensorrt" where the machine has
    that, else an entry named after the machine. Raises DeviceError where the machine can run neither.
    """
    info = run(["info"])
    tensorrt = _has_tensorrt(info)
    target = _which(targets, info, tensorrt)
    gate = read_json(bundle / "gate.json")
    kind = TENSORRT if tensorrt else CPU
    if kind not in gate["targets"]:
        raise DeviceError(f"The bundle {bundle} has no INT8 file for {kind}. Export it with --int8 --on.")
    what = "Building engines, and measuring them" if tensorrt else "Measuring the files"
    say(f"{what} in turn there{f', as {target.name}' if target else ''}")
    records = _measured(run, target, tensorrt, say)
    machine = records["fp32"]["machine"]
    name = target.name if target else TENSORRT if tensorrt else str(machine["name"])
    template = gate["targets"].get(name) or gate["targets"][kind]
    gate["targets"][name] = template
    decided = fill_in(gate, name, _speedups(template["candidates"], records))
    entry = decided["targets"][name]
    entry["machine"] = machine
    entry["latency"] = {
        each: {"compute_ms": record["latency_ms"]["compute"], "rounds_ms": record["rounds_ms"]}
        for each, record in records.items()
    }
    _replace(bundle, decided)
    return name, entry


def _which(targets: Sequence[Target], info: Mapping[str, Any], tensorrt: bool) -> Target | None:
    """A Jetson without TensorRT is none of the targets that are for it."""
    board = info.get("board") or {}
    fitting = [each for each in targets if (each.runtime == "tensorrt") == tensorrt]
    return for_board(fitting, board.get("model"), str(board.get("architecture")))


def _has_tensorrt(info: Mapping[str, Any]) -> bool:
    runtimes = info.get("runtimes") or {}
    if runtimes.get("tensorrt"):
        return True
    if not runtimes.get("onnxruntime"):
        raise DeviceError(
            "The machine has neither TensorRT nor ONNX Runtime, so it can run no file. "
            "Install one there: pip install onnxruntime"
        )
    return False


def _measured(
    run: Command, target: Target | None, tensorrt: bool, say: Callable[[str], None]
) -> dict[str, Mapping[str, Any]]:
    """Records by artifact, FP32 and INT8 at least, all by the runtime that the decision is for.

    One call builds and measures: on a board where nothing stays between calls the engines would be gone.
    """
    words = ["--build"] if tensorrt else []
    if target:
        words += ["--batch", str(target.batch)]
        words += ["--workspace-mib", str(target.workspace_mib)] if tensorrt and target.workspace_mib else []
        words += ["--threads", str(target.threads)] if target.threads else []
    document = run([*RACE, *words])
    why = reasons(document, "failed", "not_run")
    for each in why:
        say(each)
    records = {str(each["artifact"]["name"]): each for each in document["records"]}
    wanted = "tensorrt" if tensorrt else "onnxruntime"
    others = sorted(name for name, each in records.items() if each["artifact"].get("runtime") != wanted)
    if others:
        raise DeviceError(
            f"The machine was to measure {wanted}, and its times of {', '.join(others)} are not of that. "
            f"{' '.join([*why, 'Try there: run.pyz info'])}"
        )
    found = {each["artifact"]["precision"] for each in records.values()}
    if "fp32" not in records or "int8" not in found:
        lacking = "FP32" if "fp32" not in records else "INT8"
        raise DeviceError(
            f"The machine measured no {lacking} file, so there is nothing to decide. "
            f"{' '.join([*why, 'Try there: run.pyz info'])}"
        )
    return records


def _speedups(candidates: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> dict[str, Speedup]:
    """By candidate, of those that were timed: of its two INT8 files a TensorRT runs one, and the other has no say.

    A record under no candidate's name is taken for the one of its precision (ONNX Runtime's `int8`, say).
    """
    base = records["fp32"]["rounds_ms"]["p50"]
    named = {candidates[name]["precision"] for name in records if name in candidates}
    found = {}
    for name, candidate in candidates.items():
        precision = candidate["precision"]
        same = [each for each in records.values() if each["artifact"]["precision"] == precision]
        record = records.get(name) or (same[0] if same and precision not in named else None)
        if record is not None:
            found[name] = speedup(base, record["rounds_ms"]["p50"], CONFIDENCE)
    return found


def _replace(bundle: Path, gate: Mapping[str, Any]) -> None:
    """The same bundle with another gate.json; whole, like an export, since the manifest has the hash of each file."""
    with new_bundle(bundle) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
        write_json(folder / "gate.json", gate)
        manifest = read_json(folder / "manifest.json")
        path = folder / "gate.json"
        manifest["files"]["gate.json"] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        write_json(folder / "manifest.json", manifest)
