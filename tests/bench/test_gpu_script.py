"""The GPU script at toy size, on the CPU: stopped in its first slice, gone on with elsewhere, to the end."""

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdedge import recipe_io
from kdedge.data import open_source
from kdedge.errors import DataError, RunError
from kdedge_bench import engine_profile, engine_race, gpu, gpu_state, verdict_sets
from kdedge_bench.gpu_jobs import IMAGES, Program, Work, jobs
from kdedge_bench.gpu_sizes import REAL, TOY

ROOM = Path(__file__).parents[2] / "benchmarks" / "gpu"
RACE, PARTS = "speed-wide-resnet-10-1-fp32", "parts-wide-resnet-10-1"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of the layout of CIFAR-10's JPEG copy: nine images of each class to train on, two to test."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    with tarfile.open(folder / gpu.ARCHIVE, "w:xz", preset=0) as archive:
        for part, count in (("train", 9), ("test", 2)):
            for tone, name in enumerate(CLASSES):
                for i in range(count):
                    content = io.BytesIO()
                    pixels = rng.integers(0, 60, (32, 32, 3)) + 19 * tone
                    Image.fromarray(pixels.astype(np.uint8)).save(content, "JPEG")
                    member = tarfile.TarInfo(f"cifar10/{part}/{name}/{i:04d}.jpg")
                    member.size = content.tell()
                    archive.addfile(member, io.BytesIO(content.getvalue()))
    return folder


class Watch:
    """A display that stops the run, as Ctrl-C does, at the first logged step where `over` says so."""

    def __init__(self, over: Callable[[], bool]) -> None:
        self.over = over

    def stage(self, name: str, total_steps: int) -> None:
        pass

    def say(self, sentence: str) -> None:
        pass

    def step(self, record: Mapping[str, Any]) -> None:
        if self.over():
            raise KeyboardInterrupt


def inside(argv: Sequence[str], folder: Path, log: Path, over: Callable[[], bool]) -> gpu.Ended:
    """What `gpu._run` does, in this process, which has torch loaded already."""
    from kdedge.pipeline import train

    assert argv[:4] == [sys.executable, "-m", "kdedge", "train-recipe"]
    recipe, words = argv[4], list(argv[5:])
    settings = [value for flag, value in itertools.pairwise(words) if flag == "--set"]
    out, device = (words[words.index(flag) + 1] for flag in ("--out", "--device"))
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("run inside the test\n")
    try:
        with contextlib.chdir(folder):
            loaded = recipe_io.load(recipe, settings, device=device)
            train(loaded, Path(out), resume="--resume" in words, display=Watch(over))
    except KeyboardInterrupt:
        return "stopped"
    return "finished"


def stopped_in_the_pilot(data: Path, out: Path, scratch: Path) -> None:
    """The script itself, told to stop as soon as there is a checkpoint."""
    words = ["--toy", "--what", "cifar", "--data", data, "--out", out, "--scratch", scratch, "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, ROOM / "measure.py", *words], env=environment)
    try:
        while not list(scratch.glob("work/runs/pilot/checkpoint/outer.*.safetensors")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    finally:
        process.kill()


def records_of(out: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    document = json.loads((out / "records.json").read_text())
    return document, {record["name"]: record for record in document["records"]}


def test_it_is_stopped_and_goes_on_elsewhere_to_the_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    stopped_in_the_pilot(data, first, tmp_path / "a")
    document, records = records_of(first)
    assert [(entry["job"], entry["ended"]) for entry in document["slices"]] == [("pilot", "stopped")]
    assert records == {}
    assert "pilot" in document["waiting"]
    names = [file["name"] for file in json.loads((first / gpu_state.INDEX).read_text())["files"]]
    assert sum("checkpoint/outer." in name for name in names) == 1

    monkeypatch.setattr(gpu, "_run", inside)
    words = ["--toy", "--data", str(data), "--out", str(second), "--scratch", str(tmp_path / "b"), "--device", "cpu"]
    assert gpu.main(ROOM / "cifar10.yaml", [*words, "--from", str(first), "--what", "cifar"]) == 0
    assert gpu.main(ROOM / "cifar10.yaml", [*words, "--what", "determinism"]) == 0
    document, records = records_of(second)
    assert document["waiting"] == [RACE, PARTS]
    ended = {job.name: [e["ended"] for e in document["slices"] if e["job"] == job.name] for job in jobs(TOY)}
    assert ended == {
        RACE: [],
        PARTS: [],
        "pilot": ["stopped", "finished"],
        "deterministic": ["finished"],
        "deterministic-resumed": ["stopped", "finished"],
        "cifar10-20": ["finished"],
        "mobilenet-v2-20": ["finished"],
    }
    assert records.keys() == ended.keys() - {RACE, PARTS} | {"determinism"}
    assert records["determinism"]["findings"]["equal_after_resume"] is True
    assert all(record["toy"] for record in records.values())
    row, student = (records[name]["findings"]["result"] for name in ("cifar10-20", "mobilenet-v2-20"))
    assert document["horizon"]["steps"] == 6
    assert "teacher.optim.total_steps=6" in records["cifar10-20"]["findings"]["settings"]
    assert row["test_images"] == 20
    assert None not in (row["baseline"]["test_accuracy"], row["student"]["test_accuracy"])
    assert student["teacher"]["test_accuracy"] == row["teacher"]["test_accuracy"]
    assert (row["student"]["arch"], student["student"]["arch"]) == ("wide-resnet-10-1", "mobilenet-v2")
    assert all(path.stat().st_size < 15_000_000 for path in second.iterdir())
    assert len(list(second.iterdir())) <= 8  # what comes back from the machine


SIDE = """
import json, sys
print(json.dumps({"plan": {}}), flush=True)
for line in sys.stdin:
    print(json.dumps({"steps": {"ours": 3, "supervised": 4}[sys.argv[2]], "elapsed_s": 1}), flush=True)
"""


def test_race_and_profile_at_toy_size_end_and_become_records(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sides are those of test_engine_race.py, which also does their steps: here they start at once."""

    def raced(argv: Sequence[str], folder: Path, log: Path, over: Callable[[], bool]) -> gpu.Ended:
        program = {module.__name__: module for module in (engine_race, engine_profile)}[argv[2]]
        with contextlib.chdir(folder):
            program.main(argv[3:])
        return "finished"

    fixed = {"matmul_gflops": 50.0, "convolution_gflops": 60.0, "copy_gbytes_per_second": 10.0}
    monkeypatch.setattr(engine_profile, "measured_rates", lambda _: fixed)

    (tmp_path / "side.py").write_text(SIDE)
    monkeypatch.setattr(engine_race, "_PROGRAM", (sys.executable, str(tmp_path / "side.py")))
    monkeypatch.setattr(gpu, "_run", raced)
    words = ["--toy", "--what", "speed", "--data", str(data), "--device", "cpu"]
    out = tmp_path / "out"
    assert gpu.main(ROOM / "cifar10.yaml", [*words, "--out", str(out), "--scratch", str(tmp_path / "s")]) == 0
    document, records = records_of(out)
    assert not {RACE, PARTS} & set(document["waiting"])
    (race,) = records[RACE]["findings"]["races"]
    assert race["share_of_supervised"]["median"] == 0.75
    (parts,) = records[PARTS]["findings"]["networks"]
    assert parts["operations"].keys() == parts["parts_ms"].keys()


def test_a_folder_is_packed_into_parts_and_joined_again(tmp_path: Path) -> None:
    work, out, rng = tmp_path / "work", tmp_path / "out", np.random.default_rng(0)
    (work / "runs" / "a").mkdir(parents=True)
    contents = {"runs/a/weights": rng.bytes(200_000), "horizon.json": b"{}", "empty": b""}
    for name, content in contents.items():
        (work / name).write_bytes(content)
    size = gpu_state.pack(work, [work / name for name in contents], out, limit_bytes=50_000)
    parts = sorted(out.glob("state.[0-9]*"))
    assert len(parts) == 5
    assert max(part.stat().st_size for part in parts) == 50_000
    assert sum(part.stat().st_size for part in parts) == size
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        assert sorted(archive.getnames()) == sorted(contents)
    back = tmp_path / "back"
    (back / "old").mkdir(parents=True)
    gpu_state.unpack(out, back)
    assert {p.relative_to(back).as_posix(): p.read_bytes() for p in back.rglob("*") if p.is_file()} == contents
    gpu_state.pack(work, [work / "horizon.json"], out)
    assert len(list(out.glob("state.[0-9]*"))) == 1


@pytest.mark.parametrize("damage", ["altered", "cut", "missing"])
def test_a_damaged_part_is_refused_and_nothing_is_replaced(tmp_path: Path, damage: str) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    (work / "weights").write_bytes(np.random.default_rng(0).bytes(1000))
    gpu_state.pack(work, [work / "weights"], out, limit_bytes=400)
    part = out / "state.01"
    content = part.read_bytes()
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    (work / "mine").write_text("kept")
    with pytest.raises(RunError, match=r"state\.01 (is missing|has sha256)"):
        gpu_state.unpack(out, work)
    assert (work / "mine").read_text() == "kept"


def test_what_travels(tmp_path: Path) -> None:
    work = Work(tmp_path / "work")
    for name, status in (("done", "finished"), ("open", "running")):
        run = work.run(name)
        run.update_manifest(status=status)
        for file in ("metrics.jsonl", "teacher.safetensors", "student.safetensors", "splits.json"):
            (run.path / file).write_text(file)
        for step in (9, 10):
            (run.checkpoint_path / f"inner.{step}.safetensors").parent.mkdir(exist_ok=True)
            (run.checkpoint_path / f"inner.{step}.safetensors").write_text("")
        (run.path / ".lock").write_text("")
    (work.path / "slices.json").write_text("[]")
    kept = gpu_state.worth_keeping(work.path, [work.run("done").teacher_path])
    assert sorted(path.relative_to(work.path).as_posix() for path in kept) == [
        "runs/done/manifest.json",
        "runs/done/metrics.jsonl",
        "runs/done/teacher.safetensors",
        "runs/open/checkpoint/inner.10.safetensors",
        "runs/open/manifest.json",
        "runs/open/metrics.jsonl",
        "runs/open/splits.json",
        "runs/open/student.safetensors",
        "runs/open/teacher.safetensors",
        "slices.json",
    ]


HEARS = "import time, pathlib; pathlib.Path('up').touch(); time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {HEARS}"


@pytest.mark.parametrize(
    ("code", "ended"), [("pass", "finished"), ("1 / 0", "failed"), (HEARS, "stopped"), (DEAF, "stopped")]
)
def test_how_a_job_ends(code: str, ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_GRACE_S", 0.1)
    log = tmp_path / "logs" / "job.log"
    assert gpu._run([sys.executable, "-c", code], tmp_path, log, (tmp_path / "up").exists) == ended
    assert ("ZeroDivisionError" in log.read_text()) is (ended == "failed")


def test_a_job_that_fails_stops_no_other_and_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(argv: Sequence[str], folder: Path, log: Path, over: Callable[[], bool]) -> gpu.Ended:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("out of luck")
        return "failed"

    monkeypatch.setattr(gpu, "_run", broken)
    out = tmp_path / "out"
    words = ["--toy", "--data", str(data), "--out", str(out), "--scratch", str(tmp_path / "s")]
    assert gpu.main(ROOM / "cifar10.yaml", words) == 1
    document, records = records_of(out)
    assert [entry["job"] for entry in document["slices"]] == [RACE, PARTS, "pilot"]  # the others need the pilot
    assert {entry["ended"] for entry in document["slices"]} == {"failed"}
    assert records == {}
    assert capsys.readouterr().out.count("out of luck") == 3
    assert gpu.main(ROOM / "cifar10.yaml", [*words, "--slice-s", "0"]) == 0  # no time: nothing is begun
    assert len(records_of(out)[0]["slices"]) == 3


def test_the_archive_is_checked_at_full_size_and_packed(data: Path, tmp_path: Path) -> None:
    images = tmp_path / IMAGES
    with pytest.raises(DataError, match=gpu.SHA256):
        gpu.prepare_images(data / gpu.ARCHIVE, images, REAL)
    with pytest.raises(DataError, match="does not exist"):
        gpu.prepare_images(tmp_path / gpu.ARCHIVE, images, TOY)
    gpu.prepare_images(data / gpu.ARCHIVE, images, TOY)
    source = open_source(str(images))
    assert {part: count for part, count in source.counts().items() if count} == {"train": 80, "test": 20}
    assert source.classes == tuple(CLASSES)
    assert [path.name for path in tmp_path.iterdir()] == [IMAGES]
    assert verdict_sets._SHA256["cifar10/cifar10_jpeg.tar.xz"] == gpu.SHA256


def test_the_jobs_can_be_made_in_their_order_and_stand_in_the_readme() -> None:
    made: set[str] = set()
    text = (ROOM / "README.md").read_text(encoding="utf-8")
    for job in jobs(REAL):
        assert made.issuperset(job.needs)
        assert job.name not in made
        assert f"`{job.name}`" in text
        made.add(job.name)
        if isinstance(job, Program):
            words = job.argv(Work(Path("work").absolute()), ROOM / "cifar10.yaml", "cuda")
            program = {module.__name__: module for module in (engine_race, engine_profile)}[words[2]]
            options = program.parser().parse_args(words[3:])
            assert (options.labeled, options.ratio, options.device) == (64, 7, "cuda")
            assert program is engine_profile or options.workers == 16
        else:
            recipe = recipe_io.load(str(ROOM / "cifar10.yaml"), job.settings)
            assert recipe.student.optim.labeled_batch == 64
    assert REAL.student_labels in REAL.labels


def setup(script: Path, venv: Path) -> subprocess.CompletedProcess[str]:
    wheels = venv.parent / "wheels"
    wheels.mkdir(exist_ok=True)
    words = ["bash", str(script), str(wheels), str(venv)]
    return subprocess.run(
        words, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, check=False
    )


def test_the_environment_has_the_machines_torch_and_this_checkout(tmp_path: Path) -> None:
    done = setup(ROOM / "setup.sh", tmp_path / "venv")
    assert done.returncode == 0, done.stderr
    assert "every dependency is there" in done.stdout
    code = (
        "import importlib.util as u; print(u.find_spec('torch').origin, u.find_spec('kdedge_bench').origin, sep='\\n')"
    )
    found = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    import torch

    assert found.stdout.splitlines() == [torch.__file__, str(ROOM.parent / "kdedge_bench" / "__init__.py")]


def test_what_must_be_carried_is_named(tmp_path: Path) -> None:
    copied = tmp_path / "benchmarks" / "gpu" / "setup.sh"
    copied.parent.mkdir(parents=True)
    shutil.copy(ROOM / "setup.sh", copied)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["click>=999.1", "kd-nowhere>=1", "numpy>=2.0"]\n'
    )
    done = setup(copied, tmp_path / "venv")
    assert done.returncode == 1
    assert "click>=999.1 (found " in done.stderr
    assert "kd-nowhere>=1 (not there)" in done.stderr
    assert "numpy" not in done.stderr
