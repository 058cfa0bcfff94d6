"""NVIDIA's trtexec on the same engine, as a cross-check of our times, where it is installed.

Its defaults flipped at 11.0: until then copies are timed, and there is neither a CUDA graph nor a busy wait; since then
all three are the other way round. So what is wanted is said with every flag that its version has, and one query at a
time (--exposeDMA), where two overlap otherwise. Its times are read from the JSON that --exportTimes writes; the text
changes. Python 3.8, standard library.
"""

import math
import os
import re
import shutil
import subprocess
import tempfile
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from kdedge_device.clock import Effort, summarize
from kdedge_device.failures import CorruptFailure, Failure, RuntimeFailure
from kdedge_device.strict_json import read_json

__all__ = ["Wanted", "cross_check", "find_trtexec", "flags", "times_of", "version_of"]

_PLACES = ("/usr/src/tensorrt/bin/trtexec", "/usr/local/tensorrt/bin/trtexec")
_SHORTEST_S = 10.0  # a shorter measurement is not worth the loading of an engine once more
_LONGEST_S = 60.0
_FLIPPED = (11, 0)
_LARGEST = 1 << 30  # bytes of a file of times: some 3 million queries


class Wanted(NamedTuple):
    """What trtexec is to do. `shapes` is None for an engine of a fixed shape."""

    engine: str
    warm_up_ms: int
    seconds: int
    graph: bool
    shapes: Optional[str]


def cross_check(
    engine: str, record: Dict[str, Any], effort: Effort, asked: Optional[str], log: Callable[[str], None]
) -> Optional[Dict[str, Any]]:
    """{tool, version, flags, compute, with_copies, ratio_p50} beside our record; {tool, error} where it fails.

    None where `engine` is none, no latency was measured, there is no trtexec, or it is a short measurement and nobody
    `asked`.
    """
    path = find_trtexec(asked)
    if path is None or not engine.endswith(".engine") or record["latency_ms"]["compute"] is None:
        return None
    if asked is None and effort.seconds < _SHORTEST_S:
        return None
    conditions = record["conditions"]
    dynamic = not isinstance(conditions["input_declared"][0], int)
    shape = "x".join(str(size) for size in conditions["input_shape"])
    wanted = Wanted(
        engine,
        math.ceil(effort.warm_up_seconds * 1e3),
        max(1, math.ceil(min(effort.seconds, _LONGEST_S))),
        bool(conditions["cuda_graph"]),
        "{}:{}".format(conditions["input_name"], shape) if dynamic else None,
    )
    log(f"{path} measures the same engine")
    try:
        version = version_of(path)
        given = flags(version, wanted)
        compute, latency = _run(path, given, wanted)
    except Failure as error:
        return {"tool": "trtexec", "error": str(error)}
    ours, theirs = record["latency_ms"]["compute"], summarize(compute)
    return {
        "tool": "trtexec",
        "version": ".".join(str(part) for part in version),
        "flags": [flag for flag in given if not flag.startswith("--loadEngine")],
        "compute": theirs,
        "with_copies": summarize(latency),
        "ratio_p50": ours["p50"] / theirs["p50"] if theirs["p50"] else None,
    }


def find_trtexec(asked: Optional[str] = None) -> Optional[str]:
    """`asked`, which has to exist; else from PATH or where JetPack has it. None where there is none, or "off"."""
    if asked == "off":
        return None
    if asked is not None:
        if not (os.path.isfile(asked) and os.access(asked, os.X_OK)):
            raise Failure(f"--trtexec {asked} is no program; give the path of trtexec, or 'off'.")
        return asked
    return shutil.which("trtexec") or next((path for path in _PLACES if os.access(path, os.X_OK)), None)


def version_of(path: str) -> Tuple[int, int, int]:
    """From the banner, "[TensorRT v8502]" or "[TensorRT v100300]": 8.5.2, 10.3.0. RuntimeFailure where it has none."""
    text = _output([path, "--help"], 60.0)[1]
    found = re.search(r"\[TensorRT v(\d{4,7})\]", text)
    if found is None:
        raise RuntimeFailure(f"{path} does not tell its version, on which its flags depend.")
    number = int(found.group(1))
    step = 1000 if number < 10000 else 10000  # a digit more for the minor number, from 10 on
    return number // step, number % step // 100, number % 100


def flags(version: Tuple[int, ...], wanted: Wanted) -> List[str]:
    """Copies timed, one query in flight, a sleeping wait, and a CUDA graph as ours: in the words of that version."""
    given = [
        f"--loadEngine={wanted.engine}",
        f"--warmUp={wanted.warm_up_ms}",
        f"--duration={wanted.seconds}",
        "--iterations=10",
        "--sleepTime=0",
        "--idleTime=0",
        "--infStreams=1" if version >= (8, 6) else "--streams=1",
        "--exposeDMA",
    ]
    if version >= _FLIPPED:
        given += ["--includeDataTransfers", "--noSpinWait"] + ([] if wanted.graph else ["--noCudaGraph"])
    else:  # copies and a sleeping wait have no flag: they are what is done without one
        given += ["--useCudaGraph"] if wanted.graph else []
    return given + ([] if wanted.shapes is None else [f"--shapes={wanted.shapes}"])


def _run(path: str, given: List[str], wanted: Wanted) -> Tuple[List[int], List[int]]:
    with tempfile.TemporaryDirectory(prefix="kdedge-") as folder:
        file = os.path.join(folder, "times.json")
        code, text = _output([path, *given, f"--exportTimes={file}"], 10.0 * wanted.seconds + 300)
        if code != 0:
            last = [line for line in text.splitlines() if "[E]" in line][-1:] or [f"it ended with code {code}"]
            raise Failure(f"trtexec failed: {last[0].strip()[:300]}.")
        return times_of(file, wanted.warm_up_ms)


def times_of(file: str, warm_up_ms: float) -> Tuple[List[int], List[int]]:
    """Nanoseconds of (computing, computing with copies) of each query after the warm-up, which older ones write, too.

    CorruptFailure where the file is not what --exportTimes writes.
    """
    document = read_json(file, _LARGEST)
    try:
        kept = [each for each in document if each["startComputeMs"] >= warm_up_ms]
        compute, latency = ([round(each[key] * 1e6) for each in kept] for key in ("computeMs", "latencyMs"))
    except (TypeError, KeyError) as error:
        raise CorruptFailure(f"The times of trtexec have another form than expected ({error!r}).") from None
    if not compute or min(*compute, *latency) < 0:
        raise CorruptFailure("trtexec wrote no times, or some below 0.")
    return compute, latency


def _output(command: List[str], limit_seconds: float) -> Tuple[int, str]:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_seconds,
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"{command[0]} did not end within {limit_seconds:g} seconds.") from None
    except OSError as error:
        raise Failure(f"{command[0]} cannot be started: {error.strerror}.") from None
    return done.returncode, done.stdout.decode("utf-8", "replace")
