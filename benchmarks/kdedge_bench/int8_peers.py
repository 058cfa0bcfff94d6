"""Our INT8 beside other quantizers': the same FP32 file, the same calibration images, the same test images, one run.

python -m kdedge_bench.int8_peers NAME=RUN... --out RECORD.json [--peer NAME=PYTHON:FILE[:METHOD]]... [--qat]

A run may be given more than once under one NAME (other seeds): its images are pooled. Every way is a process of its
own; one that fails is a row that says how. ONNX Runtime runs every file but those of peers with a runtime of their own,
which stand beside FP32 in that runtime too. With --keep DIR the files stay, and a second call makes only what is not
there and times all again: make on a busy machine, time on an idle one.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdedge import __version__
from kdedge.intervals import tango
from kdedge.models.weights import load_model
from kdedge.runs import Run, open_finished, sha256_bytes, write_json
from kdedge_bench.int8_families import SETTLE_S, speed_ratio
from kdedge_bench.peers.peer import timed_ms
from kdedge_bench.peers_make import BUILT_IN, Limits, Peer, Way, make_all, parse_peer
from kdedge_bench.peers_process import PeerFailed, Served
from kdedge_device.failures import Failure
from kdedge_device.preprocess import Preprocess
from kdedge_device.record import load_average, machine, now
from kdedge_device.runners import OrtRunner
from kdedge_export.images import Part, open_run_images

__all__ = ["compare", "main"]

Logits = npt.NDArray[np.float32]
Times = Callable[[int], Sequence[float] | npt.NDArray[np.float64]]  # a number of queries -> milliseconds of each
CHUNK = 256  # test images on disk at a time, for the runtimes that are not in this process


def compare(
    runs: Sequence[Path],
    peers: Mapping[str, Peer],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The rows of one model: every way over all of its runs, test images pooled."""
    ways: dict[str, list[Way]] = {}
    answers: dict[str, list[Logits | None]] = {}
    labels: list[npt.NDArray[np.int64]] = []
    speeds: dict[str, Any] = {}
    limits = Limits(options.limit_s, options.limit_gib * 2**10)
    for path in runs:
        with _folder(options.keep, path) as folder:
            made = make_all(path, folder, peers, limits, qat=options.qat)
            images = open_run_images(Run(path))
            preprocess = load_model(Run(path).student_path).preprocess
            found, made = _logits(made, folder, peers, images.test, preprocess, limits)
            for way, each in made.items():
                answers.setdefault(way, []).append(found.get(way))
                ways.setdefault(way, []).append(each)
            if "fp32" in found:
                labels.append(images.test.labels)
            if "fp32" in found and not speeds:  # of the first run: speed does not depend on the seed
                batch = preprocess.normalize(images.gate.load(preprocess, slice(0, 32)))
                there = {way: made[way] for way in found}
                speeds = _speeds(there, folder, peers, batch, options, limits)
    fp32 = answers.get("fp32", [])  # none where our own export failed in every run
    rows = {way: _row(made, fp32, answers[way], labels, speeds.get(way)) for way, made in ways.items()}
    return {"runs": [path.name for path in runs], "images": int(sum(map(len, labels))), "ways": rows}


@contextlib.contextmanager
def _folder(keep: Path | None, run: Path) -> Iterator[Path]:
    """Of the student's own bytes: files of another one are never taken for its."""
    if keep is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    folder = keep.absolute() / sha256_bytes(Run(run).student_path.read_bytes())[:16]
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def _served(way: Way, folder: Path, peers: Mapping[str, Peer], limits: Limits) -> Served:
    """The runtime of the way's own, with its file open."""
    if way.peer not in peers:
        raise PeerFailed(f"its file needs the runtime of --peer {way.peer}=..., which this call does not name")
    assert way.peer is not None
    assert way.file is not None
    peer = peers[way.peer]
    return Served(peer.python, peer.adapter, folder / way.file, limits.seconds)


def _logits(
    made: Mapping[str, Way], folder: Path, peers: Mapping[str, Peer], test: Part, preprocess: Preprocess, limits: Limits
) -> tuple[dict[str, Logits], dict[str, Way]]:
    """float32 [N, K] of every way that answers as FP32 does, in shape; and the ways, those that do not as failed."""
    found: dict[str, Logits] = {}
    told = dict(made)
    for way, each in made.items():
        if each.failure is not None or each.file is None:
            continue
        try:
            kept = (folder / each.file).with_suffix(f".{test.fingerprint[:16]}.npy")
            logits = np.load(kept) if kept.exists() else _asked(each, folder, peers, test, preprocess, limits)
            expected = found["fp32"].shape if found else logits.shape
            if logits.shape != expected or not np.isfinite(logits).all():
                raise PeerFailed(
                    f"its file gives {list(logits.shape)} of which some may not be finite; {list(expected)} "
                    "finite numbers were expected"
                )
            found[way] = logits
            np.save(kept, logits)  # beside the file, and gone with it
        except (PeerFailed, Failure) as error:
            told[way] = replace(each, failure=f"made, but not usable: {error}")
    return found, told


def _asked(
    way: Way, folder: Path, peers: Mapping[str, Peer], test: Part, preprocess: Preprocess, limits: Limits
) -> Logits:
    assert way.file is not None
    if way.runtime is None:
        (logits,) = test.logits([folder / way.file], preprocess)
        return logits
    with _served(way, folder, peers, limits) as runtime:
        return _answers(runtime, test, preprocess)


def _answers(runtime: Served, test: Part, preprocess: Preprocess) -> Logits:
    parts = []
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "images.npy", Path(scratch) / "logits.npy"
        for images in test.chunks(preprocess, CHUNK):
            np.save(asked, preprocess.normalize(images))
            parts.append(runtime.logits(asked, answered))
    return np.concatenate(parts)


def _speeds(
    made: Mapping[str, Way],
    folder: Path,
    peers: Mapping[str, Peer],
    batch: npt.NDArray[np.float32],
    options: argparse.Namespace,
    limits: Limits,
) -> dict[str, Any]:
    """Of each way: median milliseconds, and FP32's latency over its own, in turns, one thread, batch 1.

    `speedup` is beside FP32 in ONNX Runtime, `own_speedup` beside FP32 in the way's own runtime.
    """
    found: dict[str, Any] = {}
    for way, each in made.items():
        if way == "fp32":
            continue
        with contextlib.ExitStack() as stack:
            images = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "images.npy"
            np.save(images, batch)
            sides = {"fp32": made["fp32"], "int8": each}
            if each.base in made and each.base is not None:
                sides["own"] = made[each.base]
            try:
                times = _in_turns(
                    {name: _timer(side, folder, peers, images, stack, limits) for name, side in sides.items()}, options
                )
            except (PeerFailed, Failure) as error:
                found[way] = {"failure": str(error)}
                continue
        found[way] = {"latency_ms": float(np.median(times["int8"])), "speedup": speed_ratio(times)}
        if "own" in times:
            found[way]["own_speedup"] = speed_ratio({"fp32": times["own"], "int8": times["int8"]})
        found["fp32"] = {"latency_ms": float(np.median(times["fp32"]))}
    return found


def _timer(
    way: Way, folder: Path, peers: Mapping[str, Peer], images: Path, stack: contextlib.ExitStack, limits: Limits
) -> Times:
    """What times a number of queries of a way's file, open until `stack` is closed."""
    assert way.file is not None
    if way.runtime is not None:
        served = stack.enter_context(_served(way, folder, peers, limits))
        return partial(served.times_ms, images)
    runner = stack.enter_context(OrtRunner(folder / way.file))
    singles = [image[None] for image in np.load(images)]
    return partial(timed_ms, runner.run, singles)


def _in_turns(timers: Mapping[str, Times], options: argparse.Namespace) -> dict[str, npt.NDArray[np.float64]]:
    """Milliseconds [rounds, queries] of each, in turns, so that whatever slows the machine slows all."""
    until = time.perf_counter() + SETTLE_S
    while time.perf_counter() < until:
        for timer in timers.values():
            timer(5)
    rounds = [{name: timer(options.queries) for name, timer in timers.items()} for _ in range(options.rounds)]
    return {name: np.array([each[name] for each in rounds], np.float64) for name in timers}


def _row(
    made: Sequence[Way],
    fp32: Sequence[Logits | None],
    found: Sequence[Logits | None],
    labels: Sequence[npt.NDArray[np.int64]],
    speed: Mapping[str, Any] | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {"made": [asdict(way) for way in made], "speed": speed}
    if not fp32 or any(each is None for each in found):
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


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.int8_peers", description=__doc__)
    flags.add_argument("runs", nargs="+", metavar="NAME=RUN")
    flags.add_argument("--peer", action="append", default=[], type=parse_peer, metavar="NAME=PYTHON:FILE[:METHOD]")
    flags.add_argument("--qat", action="store_true", help="also our quantization-aware training")
    flags.add_argument("--without", action="append", default=[], choices=BUILT_IN, help="leave one out")
    flags.add_argument("--keep", type=Path, metavar="DIR", help="the files stay here, and are not made again")
    flags.add_argument("--rounds", type=int, default=9)
    flags.add_argument("--queries", type=int, default=50)
    flags.add_argument("--limit-s", type=float, default=1800.0, help="of making one file, and of one answer")
    flags.add_argument("--limit-gib", type=float, default=8.0, help="memory of making one file")
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
    peers = {way: peer for way, peer in BUILT_IN.items() if way not in options.without} | dict(options.peer)
    record: dict[str, Any] = {
        "schema": 2,
        "command": " ".join(["python", "-m", "kdedge_bench.int8_peers", *map(without_folders, arguments)]),
        "date": now(),
        "machine": machine(),
        "kdedge": __version__,
        "conditions": {
            "threads": 1,
            "batch": 1,
            "rounds": options.rounds,
            "queries": options.queries,
            "limit_s": options.limit_s,
            "limit_gib": options.limit_gib,
        },
        "models": {},
    }
    for name, runs in models.items():
        before = load_average()
        found = compare(runs, peers, options)
        record["models"][name] = found | {"load_average": {"before": before, "after": load_average()}}
        print(json.dumps({name: {way: row.get("drop_points") for way, row in found["ways"].items()}}), file=sys.stderr)
        write_json(options.out, record)


def without_folders(argument: str) -> str:
    """A command for a record: what a file is called, not where it lay on this machine."""
    head, equals, tail = argument.rpartition("=")
    return head + equals + ":".join(part.rsplit("/", 1)[-1] for part in tail.split(":"))


if __name__ == "__main__":
    main()
