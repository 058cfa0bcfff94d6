"""trtexec as a cross-check, on a program that takes the flags of the real one's version, and refuses all others."""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from kdedge_device.bench import bench
from kdedge_device.bench_subject import Subject, open_subject
from kdedge_device.clock import Effort
from kdedge_device.failures import CorruptFailure, Failure, RuntimeFailure
from kdedge_device.trt_exec import Wanted, cross_check, find_trtexec, flags, times_of, version_of
from kdedge_device.trt_launch import Access

from .fake_tensorrt import World
from .trt_world import built, machine

# The names in samples/common/sampleOptions.cpp of NVIDIA/TensorRT, by tag, of what concerns timing.
COMMON = {
    "loadEngine",
    "warmUp",
    "duration",
    "iterations",
    "sleepTime",
    "idleTime",
    "exposeDMA",
    "exportTimes",
    "shapes",
}
KNOWN = {
    8503: COMMON | {"streams", "useCudaGraph", "useSpinWait", "noDataTransfers"},
    8601: COMMON | {"streams", "infStreams", "useCudaGraph", "useSpinWait", "noDataTransfers"},
    100300: COMMON | {"infStreams", "useCudaGraph", "useSpinWait", "noDataTransfers"},
    101601: COMMON | {"infStreams", "useCudaGraph", "useSpinWait", "noDataTransfers"},
    110000: COMMON | {"infStreams", "noCudaGraph", "noSpinWait", "includeDataTransfers"},  # the others do nothing
}
# Since 8.6 warm-up queries are left out of the file; older ones write them, too. Not a number where it did not tick.
PROGRAM = """
import json, sys
print("&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] # trtexec")
given = dict((each.lstrip("-").split("=", 1) + [""])[:2] for each in sys.argv[1:])
if "help" in given:
    sys.exit(0)
unknown = set(given) - set({known})
if unknown:
    print("[E] Unknown option: --" + sorted(unknown)[0])
    sys.exit(1)
json.dump(given, open({seen!r}, "w"))
first = 0 if {version} < 8600 else 100
times = [{{"startComputeMs": float(i), "computeMs": 1.0 + i / 1000, "latencyMs": 2.0}} for i in range(first, 200)]
open(given["exportTimes"], "w").write({text} or json.dumps(times))
"""


def program(folder: Path, version: int, text: str = "") -> Path:
    path = folder / "trtexec"
    content = PROGRAM.format(
        version=version,
        known=sorted(KNOWN.get(version, COMMON)),
        seen=str(folder / "seen.json"),
        text=repr(text),
    )
    path.with_suffix(".py").write_text(content)
    # A first line that names Python by itself would not survive a checkout whose path has a space.
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{path}.py" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("version", sorted(KNOWN))
def test_the_same_is_measured_by_each_version(version: int, tmp_path: Path) -> None:
    """Copies timed, no busy wait, a graph where ours had one: whatever the defaults are."""
    path = str(program(tmp_path, version))
    told = version_of(path)
    major = version // (1000 if version < 10000 else 10000)
    assert told[0] == major
    for graph in (True, False):
        given = flags(told, Wanted("a.engine", 100, 3, graph, None))
        names = {flag.lstrip("-").split("=")[0] for flag in given}
        assert names <= KNOWN[version]
        if major >= 11:
            assert {"includeDataTransfers", "noSpinWait"} <= names
            assert ("noCudaGraph" in names) is not graph
        else:
            assert not names & {"noDataTransfers", "useSpinWait"}
            assert ("useCudaGraph" in names) is graph


def test_versions() -> None:
    wanted = Wanted("a.engine", 0, 1, False, "input:1x3x224x224")
    assert "--shapes=input:1x3x224x224" in flags((10, 3, 0), wanted)
    assert "--streams=1" in flags((8, 5, 2), wanted)


def an_engine(folder: Path, world: World, monkeypatch: pytest.MonkeyPatch, version: str) -> Subject:
    here = machine(version, world)
    monkeypatch.setattr("kdedge_device.trt_runner.load_tensorrt", lambda: here)
    return open_subject(built(folder, here)["engine"])


@pytest.mark.parametrize(("version", "number"), [("8.5.3.1", 8503), ("10.3.0", 100300), ("11.0.0.114", 110000)])
def test_the_cross_check_beside_our_record(
    version: str, number: int, trt_bundle_folder: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = an_engine(trt_bundle_folder, world, monkeypatch, version)
    record = bench(subject, Effort(0.0, 5, 0.1), "custom", access=Access(graph=True))
    path, said = str(program(tmp_path, number)), []  # type: ignore[var-annotated]
    found = cross_check(subject.model_path, record, Effort(2.5, 5, 0.1), path, said.append)
    assert found is not None
    assert found["version"] == {8503: "8.5.3", 100300: "10.3.0", 110000: "11.0.0"}[number]
    assert found["compute"]["count"] == 100, "the queries of the warm-up are left out"
    assert found["compute"]["min"] == 1.1
    assert found["with_copies"]["p90"] == 2.0
    assert found["ratio_p50"] == record["latency_ms"]["compute"]["p50"] / found["compute"]["p50"]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert (seen["loadEngine"], seen["duration"], seen["warmUp"]) == (subject.model_path, "3", "100")
    assert seen["shapes"] == "input:1x1x4x4"
    assert not any(subject.model_path in flag for flag in found["flags"]), "no path of this machine in a record"
    assert said
    json.dumps(found, allow_nan=False)


def test_a_cross_check_that_fails_says_so_and_spoils_nothing(
    trt_bundle_folder: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = an_engine(trt_bundle_folder, world, monkeypatch, "10.3.0")
    record = bench(subject, Effort(0.0, 5, 0.0), "custom", access=Access(graph=True))
    effort, log = Effort(0.0, 5, 0.0), lambda text: None
    ended = program(tmp_path, 8503)
    script = ended.with_suffix(".py")
    script.write_text(script.read_text().replace("v8503", "v110000"))  # takes none of the flags of 11
    told = cross_check(subject.model_path, record, effort, str(ended), log)
    assert told == {"tool": "trtexec", "error": "trtexec failed: [E] Unknown option: --includeDataTransfers."}
    (tmp_path / "trtexec").write_text("#!/bin/sh\necho hello")
    told = cross_check(subject.model_path, record, effort, str(tmp_path / "trtexec"), log)
    assert "does not tell its version" in (told or {})["error"]
    assert cross_check(subject.model_path, record, effort, "off", log) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cross_check(subject.model_path, record, effort, None, log) is None, (
        "a short measurement is not cross-checked unasked"
    )
    assert cross_check("model.onnx", record, effort, str(ended), log) is None
    unasked = cross_check(subject.model_path, {**record, "latency_ms": {"compute": None}}, effort, str(ended), log)
    assert unasked is None, "throughput has nothing to compare with"
    with pytest.raises(Failure, match=r"--trtexec .*absent is no program"):
        find_trtexec(str(tmp_path / "absent"))
    assert find_trtexec() == str(tmp_path / "trtexec")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[1]",
        "[{}]",
        "[nan]",
        "[[[[",
        '[{"startComputeMs": 9, "computeMs": "x", "latencyMs": 1}]',
        '[{"startComputeMs": 9, "computeMs": -1, "latencyMs": 1}]',
        '[{"startComputeMs": 1, "computeMs": 1}]',
    ],
)
def test_times_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text(text)
    with pytest.raises(CorruptFailure):
        times_of(str(tmp_path / "times.json"), 0)


def test_times_by_value(tmp_path: Path) -> None:
    rows = [{"startComputeMs": 50 * i, "computeMs": 0.5, "latencyMs": math.pi} for i in range(4)]
    (tmp_path / "times.json").write_text(json.dumps(rows))
    assert times_of(str(tmp_path / "times.json"), 100) == ([500_000] * 2, [3_141_593] * 2)
    assert np.shape(times_of(str(tmp_path / "times.json"), 0)) == (2, 4)


def test_programs_that_cannot_be_started(tmp_path: Path) -> None:
    (tmp_path / "trtexec").write_text("no program")
    os.chmod(tmp_path / "trtexec", 0o755)  # noqa: PTH101
    with pytest.raises(Failure, match=r"cannot be started"):
        version_of(str(tmp_path / "trtexec"))
    assert RuntimeFailure.exit_code == 6
