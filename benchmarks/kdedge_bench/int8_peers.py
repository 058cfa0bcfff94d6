"""Our INT8 beside other quantizers': the same FP32 file, the same calibration images, the same test images, one run.

python -m kdedge_bench.int8_peers NAME=RUN... --out RECORD.json [--peer NAME=PYTHON:FILE[:METHOD]]... [--qat]

A run may be given more than once under one NAME (other seeds): its images are pooled. Every way is a process of its
own; one that fails is a row that says how. ONNX Runtime runs every file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

from kdedge import __version__
from kdedge.intervals import tango
from kdedge.models.weights import load_model
from kdedge.runs import Run, open_finished, read_json, write_json
from kdedge_bench.int8_families import speed_ratio, times_ms
from kdedge_device.preprocess import Preprocess
from kdedge_device.record import load_average, machine, now
from kdedge_device.runners import OrtRunner
from kdedge_export.images import open_run_images

__all__ = ["Way", "compare", "main", "parse_peer", "table"]

Logits = npt.NDArray[np.float32]
HERE = Path(__file__).resolve().parent / "peers"
BUILT_IN = {  # ONNX Runtime is a dependency anyway
    f"onnxruntime {method}": (sys.executable, str(HERE / "onnxruntime_static.py"), method)
    for method in ("minmax", "entropy", "percentile")
}


OF_QUANTIZING = ("collection", "choice", "cures", "training")  # not the comparisons and races of the gate


@final
@dataclass(frozen=True)
class Way:
    """One file made one way from one run. `failure`: why there is none."""

    seconds: float | None = None
    peak_mib: float | None = None
    version: str | None = None
    bytes: int | None = None
    failure: str | None = None
    note: str | None = None


def parse_peer(text: str) -> tuple[str, tuple[str, str, str]]:
    """NAME=PYTHON:FILE[:METHOD]; FILE may be the plain name of one in kdedge_bench/peers."""
    name, _, command = text.partition("=")
    python, _, rest = command.partition(":")
    file, _, method = rest.partition(":")
    if not (name and python and file):
        raise argparse.ArgumentTypeError(f"'{text}': NAME=PYTHON:FILE[:METHOD] was expected")
    return name, (python, str(HERE / file) if "/" not in file else file, method)


def compare(
    name: str, runs: Sequence[Path], peers: Mapping[str, tuple[str, str, str]], qat: bool, rounds: int, queries: int
) -> dict[str, Any]:
    """The rows of one model: every way over all of its runs, test images pooled."""
    ways: dict[str, list[Way]] = {}
    answers: dict[str, list[Logits | None]] = {}
    labels: list[npt.NDArray[np.int64]] = []
    speeds: dict[str, Any] = {}
    for path in runs:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            made = _ours(path, folder, qat)
            if made["kdedge"].failure is not None:  # it makes the FP32 file that all start from
                ways.setdefault("kdedge", []).append(made["kdedge"])
                answers.setdefault("kdedge", []).append(None)
                continue
            made |= _theirs(path, folder, peers)
            files = {"fp32": folder / "kdedge" / "model.onnx"}
            files |= {way: _file(folder, way) for way, found in made.items() if found.failure is None}
            images = open_run_images(Run(path))
            preprocess = load_model(Run(path).student_path).preprocess
            logits = dict(zip(files, images.test.logits(list(files.values()), preprocess), strict=True))
            labels.append(images.test.labels)
            for way in ("fp32", *made):
                answers.setdefault(way, []).append(logits.get(way))
                ways.setdefault(way, []).append(made.get(way, Way(bytes=files["fp32"].stat().st_size)))
            if not speeds:  # of the first run: speed does not depend on the seed
                batch = preprocess.normalize(images.gate.load(preprocess, slice(0, 32)))
                speeds = _speeds(files, batch, rounds, queries)
    rows = {way: _row(found, answers["fp32"], answers[way], labels, speeds.get(way)) for way, found in ways.items()}
    return {"runs": [str(path) for path in runs], "images": int(sum(map(len, labels))), "ways": rows}


def _file(folder: Path, way: str) -> Path:
    return folder / way / "model.int8.onnx"


def _ours(run: Path, folder: Path, qat: bool) -> dict[str, Way]:
    """`kdedge export --int8` as a user types it, and with --qat."""
    made = {}
    for way, flags in (("kdedge", []), ("kdedge --qat", ["--qat"])):
        if flags and not qat:
            continue
        out = folder / way
        command = [sys.executable, "-m", "kdedge", "export", str(run), "--int8", *flags, "--out", str(out), "--json"]
        done = _measured(command, folder / "usage.json")
        if done["returncode"]:
            made[way] = Way(failure=done["last"])
            continue
        table = read_json(out / "quantization.json")
        spent = {name: table["seconds"].get(name, 0.0) for name in OF_QUANTIZING}
        made[way] = Way(
            seconds=sum(spent.values()),
            peak_mib=done["peak_mib"],
            version=f"kdedge {__version__}",
            bytes=_file(folder, way).stat().st_size,
            note=f"{table['chosen']}, {len(table['fallback']['left_float'])} layers left in float",
        )
    return made


def _theirs(run: Path, folder: Path, peers: Mapping[str, tuple[str, str, str]]) -> dict[str, Way]:
    images = open_run_images(Run(run))
    preprocess: Preprocess = load_model(Run(run).student_path).preprocess
    calibration = folder / "calibration.npy"
    np.save(calibration, preprocess.normalize(images.calibration.load(preprocess)))
    made = {}
    for way, (python, file, method) in peers.items():
        out = _file(folder, way)
        out.parent.mkdir()
        flags = ["--method", method] if method else []
        model = str(folder / "kdedge" / "model.onnx")
        done = subprocess.run(
            [python, file, model, str(calibration), str(out), *flags], capture_output=True, text=True, check=False
        )
        try:
            told = json.loads(done.stdout.strip().splitlines()[-1])
            made[way] = Way(**told, bytes=out.stat().st_size)
        except (ValueError, IndexError, TypeError, OSError):
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            made[way] = Way(failure=f"exit code {done.returncode}: {last[0][:300]}")
    calibration.unlink()
    return made


def _measured(command: Sequence[str], usage: Path) -> dict[str, Any]:
    """Exit code, last line of standard error and peak memory of a command."""
    watcher = (
        "import json, resource, subprocess, sys; "
        "done = subprocess.run(sys.argv[2:], capture_output=True, text=True); "
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10; "
        "last = (done.stderr.strip().splitlines() or ['no message'])[-1]; "
        "json.dump({'returncode': done.returncode, 'peak_mib': peak, 'last': last}, open(sys.argv[1], 'w'))"
    )
    subprocess.run([sys.executable, "-c", watcher, str(usage), *command], check=True)
    found: dict[str, Any] = read_json(usage)
    return found


def _speeds(files: Mapping[str, Path], batch: npt.NDArray[np.float32], rounds: int, queries: int) -> dict[str, Any]:
    """Of each file: median milliseconds and FP32's latency over its own, in turns, one thread, batch 1."""
    found = {}
    with OrtRunner(files["fp32"]) as fp32:
        for way, file in files.items():
            if way == "fp32":
                continue
            with OrtRunner(file) as int8:
                times = times_ms({"fp32": fp32, "int8": int8}, batch, rounds, queries)
            found[way] = {"latency_ms": float(np.median(times["int8"])), "speedup": speed_ratio(times)}
            found["fp32"] = {"latency_ms": float(np.median(times["fp32"]))}
    return found


def _row(
    made: Sequence[Way],
    fp32: Sequence[Logits | None],
    found: Sequence[Logits | None],
    labels: Sequence[npt.NDArray[np.int64]],
    speed: Mapping[str, Any] | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {"made": [asdict(way) for way in made], "speed": speed}
    if any(each is None for each in found):
        return row
    truth = np.concatenate(labels)
    before, after = (np.concatenate([each.argmax(1) for each in part if each is not None]) for part in (fp32, found))
    lost, won = int(((before == truth) & (after != truth)).sum()), int(((before != truth) & (after == truth)).sum())
    low, high = tango(lost, won, len(truth))
    row |= {"accuracy": float((after == truth).mean()), "agreement": float((after == before).mean())}
    return row | {
        "drop_points": 100 * (lost - won) / len(truth),
        "drop_points_interval": [100 * low, 100 * high],
    }


def table(*records: Mapping[str, Any]) -> str:
    """Markdown: a row for each model and way. Drop of accuracy in points with its 95 % interval; speed beside FP32."""
    rows = [
        "| model | way | top-1 | drop, points | agrees with FP32 | speed | file | made in | peak |",
        "|" + " --- |" * 9,
    ]
    for record in records:
        for model, found in record["models"].items():
            rows += [_line(model, way, row) for way, row in found["ways"].items()]
    return "\n".join(rows)


def _line(model: str, way: str, row: Mapping[str, Any]) -> str:
    made = row["made"][0]
    if made["failure"]:
        return f"| {model} | {way} | failed: {made['failure']} |" + " |" * 6
    if way == "fp32":
        return f"| {model} | FP32 | {row['accuracy']:.4f} | | | | {_mib(made['bytes'])} | | |"
    low, high = row["drop_points_interval"]
    speed = row["speed"]["speedup"]["median"]
    return (
        f"| {model} | {way} | {row['accuracy']:.4f} | {row['drop_points']:+.2f} ({low:+.2f} to {high:+.2f}) "
        f"| {100 * row['agreement']:.1f} % | {speed:.2f}x | {_mib(made['bytes'])} | {made['seconds']:.0f} s "
        f"| {made['peak_mib']:,.0f} MiB |"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.int8_peers", description=__doc__)
    flags.add_argument("runs", nargs="+", metavar="NAME=RUN")
    flags.add_argument("--peer", action="append", default=[], type=parse_peer, metavar="NAME=PYTHON:FILE[:METHOD]")
    flags.add_argument("--qat", action="store_true", help="also our quantization-aware training")
    flags.add_argument("--rounds", type=int, default=9)
    flags.add_argument("--queries", type=int, default=50)
    flags.add_argument("--out", type=Path, required=True, help="the record")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Every model in turn; the record is written anew after each, so that a long run can be looked at."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    models: dict[str, list[Path]] = {}
    for text in options.runs:
        name, _, path = text.partition("=")
        if not path:
            raise SystemExit(f"'{text}': NAME=RUN was expected")
        models.setdefault(name, []).append(open_finished(Path(path)).path)
    record: dict[str, Any] = {
        "schema": 1,
        "command": " ".join(["python", "-m", "kdedge_bench.int8_peers", *arguments]),
        "date": now(),
        "machine": machine(),
        "kdedge": __version__,
        "conditions": {"threads": 1, "batch": 1, "rounds": options.rounds, "queries": options.queries},
        "models": {},
    }
    for name, runs in models.items():
        before = load_average()
        found = compare(name, runs, BUILT_IN | dict(options.peer), options.qat, options.rounds, options.queries)
        record["models"][name] = found | {"load_average": {"before": before, "after": load_average()}}
        print(json.dumps({name: {way: row.get("drop_points") for way, row in found["ways"].items()}}), file=sys.stderr)
        write_json(options.out, record)


if __name__ == "__main__":
    main()
