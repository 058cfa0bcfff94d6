"""Measurements in turn, each in a process of its own, and one record over all rounds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdedge_device import __main__ as program
from kdedge_device.bench import bench, measure
from kdedge_device.bench_all import field
from kdedge_device.bench_rounds import Job, Told, in_turn, one_round
from kdedge_device.bench_subject import POOL, input_pool, open_subject, runner_of
from kdedge_device.clock import Effort, summarize
from kdedge_device.failures import CorruptFailure, Failure
from kdedge_device.manifest import Bundle

from .conftest import linear_model
from .trt_world import complete

SHORT = Effort(0.0, 5, 0.0)


def test_rounds_go_back_and_forth_and_leave_out_what_failed() -> None:
    calls: list[str] = []

    def measured(job: Job) -> Told:
        calls.append(job.name)
        if job.name == "b" and calls.count("b") == 2:
            raise CorruptFailure("b is damaged.")
        latency = {"compute": summarize([1_000_000])}
        return Told({"latency_ms": latency, "conditions": {"headline": "compute"}}, None)

    said: list[str] = []
    told, failed = in_turn([Job("a", []), Job("b", []), Job("c", [])], 3, measured, said.append)
    assert "".join(calls) == "abccbaac"
    assert {name: len(each) for name, each in told.items()} == {"a": 3, "c": 3}
    assert {name: str(error) for name, error in failed.items()} == {"b": "b is damaged."}
    assert said[0] == "round 1 of 3, a: p90 1.000 ms"
    assert "b: b is damaged." in said


def test_a_round_is_a_process_that_notes_its_times(bundle: Path) -> None:
    words = ["--seconds", "0", "--runs", "20", "--warm-up", "0"]
    told = one_round(Job("fp32", [str(bundle), *words]))
    assert told.times_ns is not None
    assert summarize(told.times_ns["compute"] or []) == told.record["latency_ms"]["compute"]
    (bundle / "model.onnx").write_bytes(b"altered")
    with pytest.raises(CorruptFailure, match=r"model\.onnx has 7 bytes"):
        one_round(Job("fp32", [str(bundle), *words]))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = program.main(["bench", *[str(each) for each in arguments], "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_all_of_a_bundle(bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    complete(bundle)
    seen: list[list[str]] = []

    def here(job: Job) -> Told:
        seen.append([job.name, *job.arguments[3:]])
        if job.name == "fp16":
            raise Failure("fp16 is slow.")
        done = measure(open_subject(str(bundle), job.name), SHORT, "custom")
        return Told(*done)

    monkeypatch.setattr("kdedge_device.bench_rounds.one_round", here)
    code, found = run(capsys, bundle, "--artifact", "all", "--rounds", 2, "--runs", 7, "--seconds", 0.5, "--batch", 1)
    assert (code, set(found["not_run"]), found["failed"]) == (0, {"trt", "trt-fp16"}, {"fp16": "fp16 is slow."})
    assert [each["artifact"]["name"] for each in found["records"]] == ["fp32"]
    assert [each[0] for each in seen] == ["fp32", "fp16", "fp32"]
    assert ["--idle" in each for each in seen] == [False, False, True], "power at rest is measured once"
    assert seen[0][1:7] == ["--seconds", "0.5", "--runs", "7", "--warm-up", "0.3"], "each round's, as it was asked for"
    assert {each["session"] for each in found["records"]} == {found["session"]}
    seen.clear()
    assert (
        run(capsys, bundle, "--artifact", "all", "--rounds", 4, "--effort", "standard")[1]["records"][0]["repeats"] == 4
    )
    assert seen[0][1:7] == ["--seconds", "15.0", "--runs", "500", "--warm-up", "2.5"], "an effort is shared"
    seen.clear()
    mlperf = [bundle, "--artifact", "all", "--effort", "mlperf"]
    (whole,) = run(capsys, *mlperf)[1]["records"]
    assert ([each[0] for each in seen], seen[0][2], seen[0][4]) == (["fp32", "fp16"], "600.0", "2000"), "unbroken"
    assert (whole["conditions"]["effort"], whole["repeats"]) == ("mlperf", 1)
    (shared,) = run(capsys, *mlperf, "--rounds", 2)[1]["records"]
    assert (shared["conditions"]["effort"], shared["conditions"]["rounds"]["runs"]) == ("600 s in 2 rounds", [5, 5])
    monkeypatch.setattr("kdedge_device.bench_rounds.one_round", lambda job: pytest.fail("no round was asked for"))
    wrongs = [["--rounds", 0], ["--warm-up", -1], ["--runs", 0], ["--seconds", "nan"], ["--build"]]
    for wrong in (*wrongs, ["--power-mode", "MAXN"]):
        code, document = run(capsys, bundle, *wrong)
        assert (code, "error" in document) == (2, True), wrong
    assert "is a file" in run(capsys, bundle / "model.onnx", "--artifact", "all")[1]["error"]


def test_nothing_to_measure_is_no_success(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete(bundle, leave_out=("fp32", "fp16"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "shipped": "trt"}))
    code, found = run(capsys, bundle, "--artifact", "all")
    assert (code, found["records"]) == (6, [])
    assert set(found["not_run"]) == {"trt", "trt-fp16"}
    assert field(Bundle(bundle), []).jobs == []


def test_sixty_four_different_samples_go_round(bundle: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(3, 4, 4, 1)).astype(np.uint8)
    subject = open_subject(str(bundle))._replace(images=np.concatenate([images] * 20)[:16])
    for batch, batches in ((1, 64), (24, 3), (100, 2)):
        with runner_of(subject) as runner:
            pool = input_pool(subject, runner, batch)
        assert (len(pool.batches), pool.batches[0].shape) == (batches, (batch, 1, 4, 4))
        assert pool.samples == 12, "three images, each moved aside by 0 to 3 of its 4 pixels: what is equal counts once"
    (tmp_path / "bare.onnx").write_bytes(linear_model())
    bare = open_subject(str(tmp_path / "bare.onnx"))
    with runner_of(bare) as runner:
        assert input_pool(bare, runner, 1)[1:] == (POOL, "random numbers")
    (tmp_path / "two.onnx").write_bytes(linear_model(batch=2))
    with pytest.raises(Failure, match=r"takes batches of 2 only; use --batch 2"):
        bench(open_subject(str(tmp_path / "two.onnx")), SHORT, "custom")
    assert bench(open_subject(str(tmp_path / "two.onnx")), SHORT, "custom", batch=2)["conditions"]["batch"] == 2


def test_offline_tells_throughput_and_no_latency(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(capsys, bundle, "--offline", "--seconds", 0, "--runs", 100, "--warm-up", 0)
    told = found["conditions"]["offline"]
    assert (code, told["samples"], told["batch_ms"]["count"]) == (0, 112, 7), "16 images a call"
    assert found["throughput_ips"] == 112 / told["seconds"]
    assert set(found["latency_ms"].values()) == {None}
    assert found["early_stopping_p90_ms"] is None
    assert program.main(["bench", str(bundle), "--offline", "--seconds", "0", "--runs", "8", "--batch", "4"]) == 0
    assert "images a second" in capsys.readouterr().out
