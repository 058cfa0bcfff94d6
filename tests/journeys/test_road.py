"""The whole road through the real command line, as a stranger walks it.

Where not the start of a program is tried but what it then does, it is forked from a process that has its imports.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdedge.runs import sha256_file
from kdedge_bench.faults_process import start

SMALL = [
    "--set",
    "teacher.optim.total_steps=20",
    "--set",
    "student.optim.total_steps=10",
    "--set",
    "baseline.enabled=false",
]


def kdedge(*arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "kdedge", *map(str, arguments)],
        cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **options,
    )  # fmt: skip


def forked(*arguments: object, cwd: Path) -> tuple[int | None, str]:
    """The same without the seconds of imports: its exit code, and what it said on both streams."""
    told = cwd / "told.txt"
    told.unlink(missing_ok=True)
    process = start([str(each) for each in arguments], cwd, told)
    try:
        process.join()
    finally:
        process.kill()  # where the time of the test is over
    return process.exitcode, told.read_text()


def one_document(done: subprocess.CompletedProcess[str]) -> Any:
    """The exactly one JSON document on standard output."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the first four commands were typed; nothing named but the recipe. A space is in its path."""
    place = tmp_path_factory.mktemp("a place")
    for name, command in {
        "train": ["train-recipe", "tiny"],
        "export": ["export", "--int8"],
        "bench": ["bench", "--effort", "quick"],
        "report": ["report"],
    }.items():
        done = kdedge(*command, "--json", cwd=place)
        document = one_document(done)
        (place / f"{name}.json").write_text(json.dumps(document))
        (place / f"{name}.log").write_text(done.stderr)
    return place


def test_the_road_ends_at_a_bundle_records_and_a_page(place) -> None:
    run = place / "runs" / "tiny-digits-40-s0"
    assert {
        "model.onnx",
        "model.int8.onnx",
        "manifest.json",
        "gate.json",
        "golden.npz",
        "run.pyz",
        "quantization.json",
    } <= {p.name for p in (run / "bundle").iterdir()}
    assert {p.stem.rpartition("-")[2] for p in (run / "bench").iterdir()} == {"fp32", "fp16", "int8"}
    page = (run / "report.html").read_text()
    assert "<html" in page
    assert "https://" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    result, exported = json.loads((run / "result.json").read_text()), json.loads((place / "export.json").read_text())
    assert exported["artifacts"]["fp32"]["accuracy"] == result["student"]["test_accuracy"]
    assert exported["shipped"] in {"fp32", "int8"}
    assert exported["artifacts"]["int8"]["bytes"] < exported["artifacts"]["fp32"]["bytes"]


def test_logs_are_plain_lines_and_say_what_was_taken(place) -> None:
    log = (place / "train.log").read_text()
    assert "--data FOLDER" in log  # how to point it at one's own images
    assert "\x1b" not in log
    for told in ("baseline: 30 steps", "outer: 150 steps", "Trusted pseudo labels: ", "inner: 60 steps"):
        assert told in log
    assert "images/s" in log
    assert "kept" in log
    assert "tiny-digits-40-s0" in (place / "export.log").read_text()


def test_predict_and_eval_agree_with_the_result(place, tmp_path) -> None:
    run = place / "runs" / "tiny-digits-40-s0"
    result = json.loads((run / "result.json").read_text())
    scored = one_document(kdedge("eval", run, "--data", "digits", "--json", cwd=place))
    assert scored["accuracy"] == pytest.approx(result["student"]["test_accuracy"], abs=1e-9)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "black.png")
    said = one_document(kdedge("predict", run / "bundle", tmp_path / "black.png", "--json", cwd=place))
    assert said["predictions"][0]["class"] in [str(k) for k in range(10)]
    same = one_document(kdedge("compare", run, run, "--max-drop", "0", "--json", cwd=place))
    assert same["passed"] is True


def odd_photos(folder: Path) -> None:
    """Two classes of every kind of image that a folder holds in practice."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(("caffè latte", "thé")):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 90, (30 + i, 40, 3)) + 120 * k
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.jpg")
        base = Image.fromarray((rng.integers(0, 90, (33, 40, 3)) + 120 * k).astype(np.uint8))
        base.convert("CMYK").save(folder / name / "cmyk.jpg")
        base.convert("P").save(folder / name / "palette.png")
        base.convert("RGBA").save(folder / name / "alpha.png")
        Image.fromarray(rng.integers(0, 65535, (20, 20)).astype(np.uint16)).save(folder / name / "sixteen.png")
        base.save(folder / name / "moves.gif", save_all=True, append_images=[base.rotate(90)])
        base.resize((1, 1)).save(folder / name / "dot.png")
        base.save(folder / name / "0.png")  # two files with one name
    (folder / "thé" / "notes.jpg").write_text("not an image at all")
    (folder / "thé" / "README.txt").write_text("stray")
    # 900 megapixels in the header, no pixels behind it
    header = b"IHDR" + (30000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    import zlib

    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    (folder / "caffè latte" / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IEND\xaeB`\x82")


def test_a_folder_of_odd_photos_just_works_and_what_is_left_out_is_told_once(tmp_path) -> None:
    odd_photos(tmp_path / "photos")
    checked = kdedge("data", "check", "photos", cwd=tmp_path)
    assert "notes.jpg" in checked.stdout + checked.stderr
    train = ("train-recipe", "tiny", "--data", "photos", "--labels", 8, *SMALL)
    code, told = forked(*train, cwd=tmp_path)
    assert code == 2  # two of 36 is more than a twentieth
    assert "notes.jpg" in told
    assert "data.max_unreadable_fraction" in told
    code, told = forked(*train, "--set", "data.max_unreadable_fraction=0.1", cwd=tmp_path)
    assert code == 0, told
    assert told.count("huge.png") == told.count("notes.jpg") == 1
    assert "1 stray file" in told
    splits = json.loads((tmp_path / "runs" / "tiny-photos-8-s0" / "splits.json").read_text())
    assert splits["classes"] == ["caffè latte", "thé"]
    assert splits["splits"]["unlabeled"]["count"] == 34


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_stopped_in_the_middle_and_resumed_it_ends_the_same(tmp_path, how) -> None:
    settings = [
        "--set",
        "engine.checkpoint_every_s=0",
        "--set",
        "baseline.enabled=false",
        "--set",
        "engine.log_every_steps=1",
    ]
    settings += ["--set", "teacher.optim.total_steps=60", "--set", "student.optim.total_steps=10"]
    command = [sys.executable, "-m", "kdedge", "train-recipe", "tiny", *settings, "--out", "stopped"]

    def hear_ctrl_c() -> None:  # a shell's background jobs ignore it, and their children with them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_ctrl_c
    )
    metrics, deadline = tmp_path / "stopped" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") > 5):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    _, told = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -9)
    if how == signal.SIGINT:
        assert "--resume" in told
        assert "Traceback" not in told
    train = ("train-recipe", "tiny", *settings, "--out")
    code, told = forked(*train, "stopped", cwd=tmp_path)
    assert code == 2
    assert "--resume" in told
    code, told = forked(*train, "stopped", "--resume", cwd=tmp_path)
    assert code == 0, told
    if how == signal.SIGKILL:
        assert forked(*train, "whole", cwd=tmp_path)[0] == 0
        for name in ("teacher.safetensors", "student.safetensors"):
            assert sha256_file(tmp_path / "stopped" / name) == sha256_file(tmp_path / "whole" / name)


def test_a_full_disk_is_a_sentence_and_nothing_half_written_stays(tmp_path) -> None:
    """A limit on the size of files stands for the disk: the write fails in the middle, as on a full one."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    done = kdedge("train-recipe", "tiny", *SMALL, "--out", "run", cwd=tmp_path, preexec_fn=limit)
    assert done.returncode == 2
    assert "Cannot write" in done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [p.name for p in (tmp_path / "run").rglob(".*") if p.name != ".lock"]
    assert not (tmp_path / "run" / "teacher.safetensors").exists()
    assert forked("train-recipe", "tiny", *SMALL, "--out", "run", "--resume", cwd=tmp_path)[0] == 0


def test_an_output_folder_that_cannot_be_written_is_a_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in ("file/run", "/proc/kdedge"):
        code, told = forked("train-recipe", "tiny", *SMALL, "--out", out, cwd=tmp_path)
        assert code == 2
        assert out in told
        assert "Traceback" not in told


def test_records_say_how_accurate_the_very_file_is(place: Path) -> None:
    """The same number as the export's, counted by another part of the program."""
    run = place / "runs" / "tiny-digits-40-s0"
    manifest = json.loads((run / "bundle" / "manifest.json").read_text())
    for path in (run / "bench").glob("*.json"):
        record = json.loads(path.read_text())
        known = manifest["artifacts"][record["artifact"]["name"]]
        assert record["artifact"]["sha256"] == known["sha256"]
        assert record["accuracy"]["value"] == pytest.approx(known["accuracy"])
        assert record["accuracy"]["sha256"] == manifest["accuracy"]["sha256"]
        assert (record["accuracy"]["images"], record["accuracy"]["split"]) == (540, "test")
