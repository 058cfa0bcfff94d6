"""A suite on a board: which calls it makes, and what becomes of what the board tells. The board is a stand-in."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdedge.errors import DeviceError
from kdedge_bench import suite_there
from kdedge_bench.remote_place import Place
from kdedge_bench.suite_run import run_suite

MakeRun = Callable[..., Path]
BOARD = Place.parse("ssh://me@orin")


def told(artifact: str, runtime: str, session: str, ms: float) -> dict[str, Any]:
    spread = {"p50": ms, "p90": ms, "p99": None, "min": ms, "max": ms, "mean": ms, "std": 0.0, "count": 9}
    precision = {"trt": "int8"}.get(artifact, artifact)
    return {
        "schema": 1,
        "machine": {"name": "orin", "model": "Orin", "cpu": None, "architecture": "aarch64"},
        "conditions": {"threads": None, "batch": 1, "mode": "single stream", "load_average": None},
        "artifact": {"name": artifact, "sha256": artifact * 8, "precision": precision, "runtime": runtime},
        "latency_ms": {"compute": spread, "with_copies": spread, "end_to_end": None},
        "rounds_ms": {"p50": [ms] * 6, "p90": [ms] * 6},
        "session": session,
        "flags": {"throttled": False, "unstable": False},
        "started_at": f"2026-01-02T03:04:0{session}Z",
    }


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []

    @contextlib.contextmanager
    def answered(place: Place, path: Path, arguments: list[str], **_: Any) -> Any:
        made.append(" ".join(arguments))
        number = str(len(made))
        if "--threads 2" in made[-1]:
            raise DeviceError("The board has one core.")
        records = [told("fp32", "tensorrt", number, 4.0), told("trt", "tensorrt", number, 1.0)]
        yield {
            "records": records,
            "not_run": {"fp16": "there is no FP16 here.", "int8": "it is for a CPU."},
            "failed": {},
        }

    monkeypatch.setattr(suite_there, "finished_on", answered)
    return made


def test_a_call_for_each_number_of_threads_and_batch(make_run: MakeRun, tmp_path: Path, calls: list[str]) -> None:
    text = tmp_path / "mine.yaml"
    text.write_text(
        f"models: [{{path: {make_run()}, name: net}}]\nprecisions: [fp32, fp16, int8]\n"
        "runtimes: [onnxruntime, tensorrt]\n"
        "threads: [1, 2]\nsingle_stream: [1, 8]\neffort: quick\n",
        encoding="utf-8",
    )
    said: list[str] = []
    found = run_suite(str(text), on=BOARD, out=tmp_path / "out", say=said.append)
    words = "bench --artifact all --build --rounds 6 --effort quick --threads {} --batch {}"
    assert calls == [words.format(threads, batch) for batch in (1, 8) for threads in (1, 2)]
    rows = {row.way: row for row in found.rows}
    assert len(rows) == len(found.rows) == 24
    int8 = rows["INT8, 1 thread, batch 8"]
    assert int8.speed is not None
    assert (int8.speed.times, int8.speed.base, int8.p90_ms) == (pytest.approx(4.0), "FP32", 1.0)
    assert rows["FP16, 1 thread, batch 1"].why == "there is no FP16 here."
    assert rows["FP32, onnxruntime, 1 thread, batch 1"].why == "me@orin does not run it with onnxruntime."
    assert rows["INT8, onnxruntime, 1 thread, batch 1"].why == "it is for a CPU."
    assert rows["INT8, 2 threads, batch 1"].why == "The board has one core."
    assert found.exit_code == 1
    assert (len(found.records), len(found.document["sessions"]), found.document["session"]) == (4, 2, None)
    assert len(list((tmp_path / "out" / "records").iterdir())) == 4
    assert "2 sessions" in found.text


def test_nothing_from_a_board(make_run: MakeRun, tmp_path: Path, calls: list[str]) -> None:
    text = tmp_path / "mine.yaml"
    text.write_text(f"models: [{{path: {make_run()}}}]\nthreads: [2]", encoding="utf-8")
    with pytest.raises(DeviceError, match="The board has one core"):
        run_suite(str(text), on=BOARD, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
