"""`torchrun -m kdedge train-recipe`: a run of two processes, one of which is killed and which torchrun restarts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kdedge import recipe_io
from kdedge.pipeline import train
from kdedge.runs import Run, read_json, sha256_file

SETTINGS = [
    "teacher.optim.total_steps=12",
    "student.optim.total_steps=4",
    "baseline.enabled=false",
    "trust.threshold=0.2",
    "engine.checkpoint_every_s=0",
    "engine.log_every_steps=1",
]


def torchrun(out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    command += ["-m", "kdedge", "train-recipe", "tiny", "--out", str(out), "--json"]
    command += [word for setting in SETTINGS for word in ("--set", setting)]
    path = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_second_rank(launcher: subprocess.Popen[str], out: Path, lines: int) -> None:
    """As soon as the outer network's log has some lines."""
    metrics = out / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count('"outer"') < lines:
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.02)
    (second,) = [c for c in children(launcher.pid) if b"\0RANK=1\0" in Path(f"/proc/{c}/environ").read_bytes()]
    os.kill(second, signal.SIGKILL)


def documents(text: str) -> list[dict]:
    found, rest = [], text.lstrip()
    while rest:
        document, end = json.JSONDecoder().raw_decode(rest)
        found.append(document)
        rest = rest[end:].lstrip()
    return found


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str, str]:
    """A run whose second process was killed once: its folder, standard output, standard error."""
    out = tmp_path_factory.mktemp("runs") / "restarted"
    launcher = torchrun(out, "--max-restarts", "1")
    try:
        kill_second_rank(launcher, out, 4)
        said, remarks = launcher.communicate(timeout=1500)
    finally:
        if launcher.poll() is None:
            launcher.terminate()  # its processes are in groups of their own, and it ends them
            launcher.communicate()
    assert launcher.returncode == 0, remarks
    return Run(out), said, remarks


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes under /proc")
def test_a_killed_rank_ends_the_others_with_a_sentence_and_the_restart_finishes(restarted) -> None:
    run, said, remarks = restarted
    assert "--resume" in remarks  # what the surviving one was told: the other has ended
    assert "Traceback" not in remarks
    # One document from each life of the first process: its error, where it came to tell it, and the result.
    *errors, result = documents(said)
    assert len(errors) <= 1
    assert all("has ended" in document["error"] for document in errors)
    assert result["run"] == str(run.path)
    assert run.read_manifest()["status"] == "finished"
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    for stage, steps in (("outer", 12), ("inner", 4)):  # each step once: one process writes, and it rewinds
        logged = [line["step"] for line in lines if line["stage"] == stage and "loss" in line]
        assert logged == list(range(1, steps + 1))
    assert not run.checkpoint_path.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes under /proc")
def test_it_is_the_run_of_one_process_but_for_rounding(restarted, tmp_path) -> None:
    run, _, _ = restarted
    alone, expected = train(recipe_io.load("tiny", SETTINGS), tmp_path / "alone")
    found = read_json(run.result_path)
    for name in ("labels", "test_images", "training_flops", "data_guards"):
        assert found[name] == expected[name]
    assert sha256_file(run.splits_path) == sha256_file(alone.splits_path)
    with np.load(run.predictions_path) as mine, np.load(alone.predictions_path) as theirs:
        np.testing.assert_array_equal(mine["test_id"], theirs["test_id"])
        for name in ("teacher", "student"):  # float32: a leaky ReLU that rounds to the other side moves a little
            difference = np.abs(mine[f"test_logits__{name}"] - theirs[f"test_logits__{name}"])
            assert difference.max() < 0.1 * np.abs(theirs[f"test_logits__{name}"]).max()
