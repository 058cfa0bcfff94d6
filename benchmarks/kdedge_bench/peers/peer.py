"""What the peers share: their command line, and how a runtime of their own is asked. numpy alone.

Served, one JSON document a line on standard input, one on standard output: {"ready": true} first, then for
{"logits": IN.npy, "out": OUT.npy} (float32 [N, C, H, W] -> float32 [N, K], one image at a time) {"images": N}, and for
{"time": IN.npy, "queries": Q} {"ms": [Q numbers]}, one image a query. It ends with standard input.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

__all__ = ["Peer", "Runner", "main", "timed_ms"]

Array = Any  # of numpy; the environments hold different releases of it


class Runner(NamedTuple):
    """`prepare` brings one float32 [1, C, H, W] into the runtime's own layout, untimed; `run` gives logits [1, K]."""

    prepare: Callable[[Array], Any]
    run: Callable[[Any], Array]


class Peer(NamedTuple):
    """`quantize(model, images, out, method)` writes a file and gives its path; `version` is asked after that.

    `runtime` and `open_file` are of those that run their own files.
    """

    quantize: Callable[[str, Array, Path, str], Path]
    version: Callable[[], str]
    methods: Sequence[str] = ("default",)
    runtime: Callable[[], str] | None = None
    open_file: Callable[[str], Runner] | None = None


def main(peer: Peer) -> None:
    """The command line of one peer's file. Whatever the libraries print goes to standard error."""
    said = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    if sys.argv[1:2] == ["--serve"]:
        if peer.open_file is None:
            raise SystemExit("ONNX Runtime runs the files of this one.")
        _serve(peer.open_file(sys.argv[2]), said)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=peer.methods, default=peer.methods[0])
    options = parser.parse_args()
    images = np.load(options.calibration, mmap_mode="r")
    begun = time.perf_counter()
    file = peer.quantize(options.model, images, options.out.absolute(), options.method)
    told: dict[str, Any] = {"seconds": time.perf_counter() - begun, "version": peer.version(), "file": file.name}
    if peer.runtime is not None:
        told["runtime"] = peer.runtime()
    print(json.dumps(told), file=said)


def timed_ms(run: Callable[[Any], Any], prepared: Sequence[Any], queries: int) -> list[float]:
    """Milliseconds of each of `queries`, one image each in turn, after one that is not counted."""
    run(prepared[0])  # what ran before has filled the caches
    times = []
    for query in range(queries):
        image = prepared[query % len(prepared)]
        begun = time.perf_counter_ns()
        run(image)
        times.append((time.perf_counter_ns() - begun) / 1e6)
    return times


def _serve(runner: Runner, said: TextIO) -> None:
    print(json.dumps({"ready": True}), file=said)
    for line in sys.stdin:
        asked = json.loads(line)
        if "logits" in asked:
            images = np.load(asked["logits"], mmap_mode="r")
            singles = (np.ascontiguousarray(images[i : i + 1]) for i in range(len(images)))
            found = [np.array(runner.run(runner.prepare(each)), np.float32).reshape(1, -1) for each in singles]
            np.save(asked["out"], np.concatenate(found))
            answer: dict[str, Any] = {"images": len(found)}
        else:
            images = np.load(asked["time"])
            prepared = [runner.prepare(images[i : i + 1]) for i in range(len(images))]
            answer = {"ms": timed_ms(runner.run, prepared, asked["queries"])}
        print(json.dumps(answer), file=said)
