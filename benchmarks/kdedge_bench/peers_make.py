"""INT8 files of one run, made by `kdedge export` and by each peer from the same FP32 file and the same images."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from kdedge import __version__
from kdedge.models.weights import load_model
from kdedge.runs import Run, read_json, write_json
from kdedge_bench.peers_process import Done, measured
from kdedge_export.images import open_run_images

__all__ = ["BUILT_IN", "HERE", "Limits", "Peer", "Way", "make_all", "parse_peer"]

HERE = Path(__file__).resolve().parent / "peers"
OF_QUANTIZING = ("collection", "choice", "cures", "training")  # not the comparisons and races of the gate
OURS = {"kdedge": (), "kdedge --qat": ("--qat",)}


class Peer(NamedTuple):
    """A Python of some environment, a file that follows `kdedge_bench.peers`, and which of its methods."""

    python: str
    adapter: str
    method: str = ""


class Limits(NamedTuple):
    """Of one file's making; and of one answer of a runtime."""

    seconds: float
    mib: float


BUILT_IN = {  # ONNX Runtime is a dependency anyway
    f"onnxruntime {method}": Peer(sys.executable, str(HERE / "onnxruntime_static.py"), method)
    for method in ("minmax", "entropy", "percentile")
}


@final
@dataclass(frozen=True)
class Way:
    """One file made one way from one run. `failure`: why there is none. `runtime`: None is ONNX Runtime.

    `file` is below the folder of all ways; `peer` is who can open it, `base` the way that is FP32 in the same runtime.
    """

    seconds: float | None = None
    peak_mib: float | None = None
    version: str | None = None
    bytes: int | None = None
    failure: str | None = None
    note: str | None = None
    runtime: str | None = None
    file: str | None = None
    peer: str | None = None
    base: str | None = None


def parse_peer(text: str) -> tuple[str, Peer]:
    """NAME=PYTHON:FILE[:METHOD]; FILE may be the plain name of one in kdedge_bench/peers."""
    name, _, command = text.partition("=")
    python, _, rest = command.partition(":")
    file, _, method = rest.partition(":")
    if not (name and python and file):
        raise argparse.ArgumentTypeError(f"'{text}': NAME=PYTHON:FILE[:METHOD] was expected")
    adapter = str(HERE / file) if "/" not in file else file
    if not Path(adapter).is_file():
        known = ", ".join(sorted({each.name for each in HERE.glob("*.py")} - {"__init__.py", "peer.py", "watch.py"}))
        raise argparse.ArgumentTypeError(f"'{text}': there is no file {adapter}. Known: {known}")
    return name, Peer(python, adapter, method)


def make_all(run: Path, folder: Path, peers: Mapping[str, Peer], limits: Limits, *, qat: bool) -> dict[str, Way]:
    """Every way in turn, FP32 first. What `folder` holds of an earlier call stays; remove a way's folder to repeat it.

    Where `kdedge` fails nothing else is tried: it writes the FP32 file that all start from.
    """
    noted = folder / "made.json"
    made = {way: Way(**found) for way, found in (read_json(noted) if noted.exists() else {}).items()}
    made = {way: found for way, found in made.items() if (folder / way).is_dir()}
    fp32 = folder / "kdedge" / "model.onnx"
    for way, flags in OURS.items():
        if way not in made and (qat or not flags):
            made[way] = _ours(run, folder, way, flags, limits)
            write_json(noted, {each: asdict(found) for each, found in made.items()})
        if made["kdedge"].failure is not None:
            return made
    wanted = {way: peer for way, peer in peers.items() if way not in made}
    if wanted:
        calibration = folder / "calibration.npy"
        _save_calibration(run, calibration)
        for way, peer in wanted.items():
            made |= _theirs(way, peer, fp32, calibration, folder, limits, made)
            write_json(noted, {each: asdict(found) for each, found in made.items()})
        calibration.unlink()
    return {"fp32": Way(bytes=fp32.stat().st_size, file="kdedge/model.onnx")} | made


def _ours(run: Path, folder: Path, way: str, flags: tuple[str, ...], limits: Limits) -> Way:
    """`kdedge export --int8` as a user types it, and with --qat."""
    out = folder / way
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-P", "-m", "kdedge", "export", str(run), "--int8", *flags, "--out", str(out), "--json"]
    done = measured(command, limit_s=limits.seconds, limit_mib=limits.mib)
    if done.failure is not None:
        return Way(failure=done.failure)
    table = read_json(out / "quantization.json")
    file = f"{way}/model.int8.onnx"
    return Way(
        seconds=sum(table["seconds"].get(name, 0.0) for name in OF_QUANTIZING),
        peak_mib=done.peak_mib,
        version=f"kdedge {__version__}",
        bytes=(folder / file).stat().st_size,
        note=f"{table['chosen']}, {len(table['fallback']['left_float'])} layers left in float",
        file=file,
    )


def _save_calibration(run: Path, file: Path) -> None:
    preprocess = load_model(Run(run).student_path).preprocess
    np.save(file, preprocess.normalize(open_run_images(Run(run)).calibration.load(preprocess)))


def _theirs(
    way: str, peer: Peer, fp32: Path, calibration: Path, folder: Path, limits: Limits, made: Mapping[str, Way]
) -> dict[str, Way]:
    """A peer's file; and FP32 in its own runtime's form, once a runtime."""
    found = _one(way, peer, fp32, calibration, folder, limits)
    if found.failure is not None or found.runtime is None:
        return {way: found}
    base = f"FP32 in {found.runtime.split()[0]}"
    bases = {}
    if base not in made:
        plain = _one(base, peer._replace(method="float"), fp32, calibration, folder, limits)
        bases[base] = replace(plain, peer=way)
    return bases | {way: replace(found, peer=way, base=base)}


def _one(way: str, peer: Peer, fp32: Path, calibration: Path, folder: Path, limits: Limits) -> Way:
    out = folder / way
    out.mkdir(exist_ok=True)
    flags = ["--method", peer.method] if peer.method else []
    command = [peer.python, peer.adapter, str(fp32), str(calibration), str(out / "model.int8.onnx"), *flags]
    done = measured(command, limit_s=limits.seconds, limit_mib=limits.mib)
    if done.failure is not None:
        return Way(failure=done.failure, peak_mib=done.peak_mib)
    return _told(done, out)


def _told(done: Done, out: Path) -> Way:
    """What a peer says that it did, held to what is there."""
    try:
        told: dict[str, Any] = json.loads(done.told)
        seconds, version = float(told["seconds"]), str(told["version"])
        file = out / Path(str(told.get("file", "model.int8.onnx"))).name
        runtime = None if told.get("runtime") is None else str(told["runtime"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return Way(failure=f"its last line is no JSON with seconds and version: {done.told[:200]!r}")
    if not file.is_file() or not file.stat().st_size:
        return Way(failure=f"it ended well, but wrote no {file.name}")
    size = sum(each.stat().st_size for each in out.rglob("*") if each.is_file())
    return Way(seconds, done.peak_mib, version, size, runtime=runtime, file=f"{out.name}/{file.name}")
