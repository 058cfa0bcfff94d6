"""`kdedge export --on`: what a bundle could ship is timed where it will run, and its gate.json is decided anew.

The accuracy side of a gate is the same everywhere, since the files are; only the speeds are the machine's own. Where it
has ONNX Runtime, its times also say which layers go back to float (`elsewhere`), a call of six rounds a file. An engine
is built for minutes, so TensorRT's times only decide.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from onnx import TensorProto, helper

from kdedge.errors import DeviceError
from kdedge.runs import read_json, sha256_file, write_json
from kdedge_bench.measured import reasons
from kdedge_device.preprocess import Preprocess
from kdedge_export.bundle import new_bundle
from kdedge_export.elsewhere import Elsewhere, write_trial
from kdedge_export.export import CPU, TENSORRT
from kdedge_export.judging.gate import fill_in
from kdedge_export.judging.latency import LOOKS, Speedup, speedup
from kdedge_export.targets import Target, for_board

__all__ = ["Command", "CommandIn", "decide_there", "elsewhere"]

Command = Callable[[Sequence[str]], Mapping[str, Any]]
"""`python run.pyz ARGUMENTS --json` on the machine in question; DeviceError where it fails."""
CommandIn = Callable[[Path, Sequence[str], bool], Mapping[str, Any]]
"""The same of the bundle in that folder; True where its files are of use there to the next call."""
Say = Callable[[str], None]

ROUNDS, CONFIDENCE = LOOKS[0]
RACE = ("bench", "--artifact", "all", "--rounds", str(ROUNDS), "--seconds", "0.25", "--runs", "30")
PROBE = ("bench", "--artifact", "all", "--rounds", "1", "--seconds", "0", "--runs", "5")
NO_SEARCH = "no layer goes back to float for speed there, since every try would be an engine to build"


def elsewhere(
    run: CommandIn, targets: Sequence[Target] = (), threads: int = 1, say: Say = lambda sentence: None
) -> Elsewhere | None:
    """The machine as one whose times choose the layers that stay in float; None where it has TensorRT, and it is said.

    Before anything is exported a model of one operator is run there. DeviceError where it cannot be.
    """
    with tempfile.TemporaryDirectory(prefix="kdedge-") as folder:
        probe = _probe(Path(folder))
        info = run(probe, ["info"], False)
        runtimes = info.get("runtimes") or {}
        if runtimes.get("tensorrt"):
            say(f"The machine has TensorRT: {NO_SEARCH}. Its times decide what ships.")
            return None
        run(probe, PROBE, False)  # of ONNX Runtime, or of none, and then it says what to install
    target = _which(targets, info, tensorrt=False)

    def speed(folder: Path) -> Speedup:
        records = _measured(lambda arguments: run(folder, arguments, True), _How(target, False, threads, "int8"))
        base, other = (records[name]["rounds_ms"]["p50"] for name in ("fp32", "int8"))
        return speedup(base, other, CONFIDENCE)

    own = (info.get("machine") or {}).get("name") or "the machine of --on"
    return Elsewhere(target.name if target else str(own), target.name if target else None, speed)


def _probe(folder: Path) -> Path:
    """A bundle whose model does next to nothing, by an operator that every version has."""
    shape = ["batch", 1, 4, 4]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("input", "logits")]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["logits"])], "probe", ends[:1], ends[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "probe.onnx"
    )
    write_trial(
        folder / "bundle", {"fp32": folder / "probe.onnx"}, Preprocess(4, 4, 1, "squash", (0.5,), (0.5,)), ("any",)
    )
    return folder / "bundle"


def decide_there(
    bundle: Path,
    run: Command,
    targets: Sequence[Target] = (),
    threads: int = 1,
    say: Say = lambda sentence: None,
) -> tuple[str, dict[str, Any]]:
    """(target, its entry in gate.json), decided by speeds that `run` measured there. The bundle is replaced whole.

    Of `targets`, which the bundle was exported for, the one that the machine is; else "tensorrt" where the machine has
    that, else an entry named after the machine. `threads`: of ONNX Runtime, where the target does not say. What ships
    where ONNX Runtime runs is also what the bundle runs by itself. Raises DeviceError where the machine can run
    neither.
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
    asked = next((str(each["precision"]) for each in gate["targets"][kind]["candidates"].values()), "int8")
    records = _measured(run, _How(target, tensorrt, threads, asked), say)
    machine = records["fp32"]["machine"]
    name = target.name if target else TENSORRT if tensorrt else str(machine["name"])
    template = gate["targets"].get(name) or gate["targets"][kind]
    gate["targets"][name] = template
    decided = fill_in(gate, name, _speedups(template["candidates"], records))
    entry = decided["targets"][name]
    if tensorrt and entry["shipped"] != "int8":
        entry["why"] += f" {NO_SEARCH[0].upper()}{NO_SEARCH[1:]}."
    entry["machine"] = machine
    entry["latency"] = {
        each: {"compute_ms": record["latency_ms"]["compute"], "rounds_ms": record["rounds_ms"]}
        for each, record in records.items()
    }
    if not tensorrt:
        decided["shipped"] = entry["shipped"]
    _replace(bundle, decided, None if tensorrt else entry["artifact"])
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


class _How(NamedTuple):
    """How files race there. `asked`: the precision without which there is nothing to decide."""

    target: Target | None
    tensorrt: bool
    threads: int
    asked: str


def _measured(run: Command, how: _How, say: Say = lambda sentence: None) -> dict[str, Mapping[str, Any]]:
    """Records by artifact, FP32 and what was asked for at least, all by the runtime that the decision is for.

    One call builds and measures: on a board where nothing stays between calls the engines would be gone.
    """
    target, tensorrt, threads, asked = how
    words = ["--build"] if tensorrt else []
    if target:
        words += ["--batch", str(target.batch)]
        words += ["--workspace-mib", str(target.workspace_mib)] if tensorrt and target.workspace_mib else []
    if not tensorrt:
        words += ["--threads", str((target.threads if target else None) or threads)]
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
    if "fp32" not in records or asked not in found:
        lacking = "FP32" if "fp32" not in records else asked.upper()
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


def _replace(bundle: Path, gate: Mapping[str, Any], shipped: str | None) -> None:
    """The same bundle with another gate.json; whole, like an export, since the manifest has the hash of each file.

    `shipped`: the artifact that a machine with ONNX Runtime runs unless told otherwise; None leaves it as it is.
    """
    with new_bundle(bundle) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
        write_json(folder / "gate.json", gate)
        manifest = read_json(folder / "manifest.json")
        manifest["shipped"] = shipped or manifest["shipped"]
        path = folder / "gate.json"
        manifest["files"]["gate.json"] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        write_json(folder / "manifest.json", manifest)
