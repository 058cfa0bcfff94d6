"""`make arm64`: a real bundle on emulated arm64: `check` passes, and the answers are those of this machine.

Then the CUDA layer: a driver library compiled for arm64 that works on plain memory, and the fake TensorRT on top of it,
so that ctypes, streams, events and graphs are called as an arm64 process calls them. Not a board: no time counts.

BUNDLE=FOLDER takes another bundle than the one it makes, RECORD=FILE writes what was seen.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from kdedge_device.record import now

from ..road import ROOT, Wrong, cache, compare, make_bundle, run_pyz, say, walk
from .userland import CPU, PACKAGES, WHEELS, Userland, build

__all__ = ["main"]

TENSORRT = ("8.5.3.1", "10.3.0", "11.4.0.106")  # of JetPack 5, of 6, and the newest
FAKE = """
import ctypes, os, sys
sys.path[:0] = [{fakes!r}, {tests!r}]
import fake_tensorrt
library = ctypes.CDLL("libcuda.so.1")
library.fake_host.restype = ctypes.c_void_p
sys.modules["tensorrt"] = fake_tensorrt.make(os.environ["FAKE_TENSORRT"], fake_tensorrt.World(cuda=library))
"""


def main() -> int:
    try:
        folder = cache("arm64")
        land = build(folder, sys.executable)
        record = prove(land, make_bundle(), folder)
    except Wrong as error:
        say(f"Error: {error}")
        return 1
    text = json.dumps(record, indent=1)
    if os.environ.get("RECORD"):
        Path(os.environ["RECORD"]).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def prove(land: Userland, bundle: Path, folder: Path) -> dict[str, Any]:
    started_at = now()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    here = walk(run_pyz([sys.executable], bundle, environment), bundle)
    say("Running the bundle on arm64")
    environment["PYTHONPATH"] = str(land.site)
    there = walk(run_pyz([str(land.python)], bundle, environment), bundle)
    if there["architecture"] != "aarch64":
        raise Wrong(f"The bundle ran on {there['architecture']}; aarch64 was expected.")
    return {
        "schema": 1,
        "what": "run.pyz on emulated arm64 (no time in it means anything)",
        "started_at": started_at,
        "emulator": {"qemu": _qemu(), "cpu": CPU, "on": platform.machine()},
        "here": {key: here[key] for key in ("python", "architecture", "runtimes")},
        "there": {key: there[key] for key in ("python", "architecture", "runtimes")},
        "pins": {"debian": list(PACKAGES), "wheels": list(WHEELS)},
        "artifacts": compare(here, there),
        "fakes": {version: _with_fakes(land, bundle, folder, environment, version) for version in TENSORRT},
    }


def _with_fakes(
    land: Userland, bundle: Path, folder: Path, environment: dict[str, str], version: str
) -> dict[str, Any]:
    """Build an engine, check it, score it and time it, by a TensorRT of `version` whose memory is malloc'ed."""
    say(f"Engines on the fake TensorRT {version}, on arm64")
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(bundle, work / "bundle")
    (work / "site").mkdir()
    tests = str(ROOT / "tests" / "device")
    (work / "site" / "tensorrt.py").write_text(FAKE.format(fakes=str(land.fakes), tests=tests))
    (work / "cuda").mkdir()
    driver = ["-shared", "-fPIC", "-O1", "-o", str(work / "cuda" / "libcuda.so.1"), str(Path(tests) / "fake_cuda.c")]
    subprocess.run(["aarch64-linux-gnu-gcc", "-Wall", "-Werror", *driver], check=True)
    changes = {
        "PYTHONPATH": os.pathsep.join([str(land.site), str(work / "site")]),
        "LD_LIBRARY_PATH": str(work / "cuda"),
        "XDG_CACHE_HOME": str(work / "cache"),
        "FAKE_TENSORRT": version,
    }
    run = run_pyz([str(land.python)], work / "bundle", {**environment, **changes})
    # Not the INT8 file of TensorRT 11, which only the fake would run by ONNX Runtime: 1.23 computes Q/DQ between FP16
    # tensors wrongly, on x86 too (1.31 and ONNX's reference evaluator agree with the golden logits).
    run("build", "--artifact", "fp16")
    named = ["--artifact", "fp16", "--runtime", "tensorrt"]
    scored, record = run("eval", *named), run("bench", *named, "--seconds", "0", "--runs", "3")
    return {
        "cuda_driver": run("info")["runtimes"]["cuda_driver"],
        "artifact": scored["artifact"],
        "accuracy": scored["accuracy"],
        "runtime": {scored["runtime"]: scored["version"]},
        "bench": {part: each and each["count"] for part, each in record["latency_ms"].items()},
    }


def _qemu() -> str:
    done = subprocess.run(["qemu-aarch64-static", "--version"], capture_output=True, text=True, check=True)
    return done.stdout.split("version", 1)[1].split()[0]


if __name__ == "__main__":
    sys.exit(main())
