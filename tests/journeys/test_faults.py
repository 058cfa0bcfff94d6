"""Kills, full disks and damaged checkpoints: the run ends as if there had been none. The whole of it, a hundred kills
and every write, is `python -m kdedge_bench.faults`."""

import random
import signal
from pathlib import Path

import pytest
import torch

from kdedge.runs import write_bytes
from kdedge.train.checkpoint import read_tensors, tensors_to_bytes
from kdedge_bench import faults
from kdedge_bench.faults_equal import differences, summary_of
from kdedge_bench.faults_process import Fault
from kdedge_bench.faults_trials import Reference, make_images, reference

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def images(folder: Path) -> Path:
    return make_images(folder / "images")


@pytest.fixture(scope="module")
def thresholds(folder: Path, images: Path) -> Reference:
    return reference("thresholds", folder, images)


def test_the_reference_run_has_what_a_resume_could_lose(thresholds) -> None:
    right = thresholds.right
    assert set(right["weights"]) == {"baseline.safetensors", "teacher.safetensors", "student.safetensors"}
    assert right["stages"] == ["baseline", "inner", "outer", "trusted"]
    assert 0 < right["result"]["trusted"]["size"] < 72
    # val chooses a student that is not the last: a kill must not lose it
    seen = [line["val_accuracy"] for line in right["metrics"] if line["stage"] == "inner" and "val_accuracy" in line]
    assert max(seen) > seen[-1]
    written = " ".join(thresholds.writes)
    for name in (".lock", "manifest.json", "splits.json", "recipe.yaml", "metrics.jsonl", "baseline.1.safetensors",
                 "baseline.safetensors", "features.npy", "trusted.npz", "predictions.npz", "result.json"):  # fmt: skip
        assert name in written


@pytest.mark.parametrize(
    "write",
    [
        "os.rename manifest.json",  # the very first: the folder holds nothing yet that could be resumed
        "write splits.json",
        "write baseline.1.safetensors",
        "write outer.3.safetensors",
        "os.remove outer.1.safetensors",
        "os.rename teacher.safetensors",
        "write features.npy",
        "os.rename trusted.npz",
        "os.rename result.json",
    ],
)
def test_killed_at_a_write(thresholds, write) -> None:
    what, name = write.split()
    at = next(i for i, line in enumerate(thresholds.writes, 1) if line.startswith(what) and name in line)
    trial, wrong = faults.killed_at_a_write(thresholds, at)
    assert wrong == []
    assert len(trial.kills) == 1


def test_killed_in_the_middle_of_a_line_of_metrics(thresholds) -> None:
    lines = [i for i, line in enumerate(thresholds.writes, 1) if line.startswith("write") and "metrics" in line]
    assert faults.killed_at_a_write(thresholds, lines[5])[1] == []


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_again_and_again(thresholds, seed) -> None:
    trial, wrong = faults.killed_on_and_on(thresholds, f"on-{seed}", random.Random(seed), 60)
    assert wrong == []
    assert len(trial.kills) > 2


@pytest.mark.parametrize("variant", ["memory", "started"])
def test_every_state_of_a_method_outlives_kills(thresholds, folder, images, variant) -> None:
    """CRD's memory and outliers; starting weights, a probed head and a live outer network."""
    weights = thresholds.folder.parent / "run" / "teacher.safetensors"
    found = reference(variant, folder, images, weights if variant == "started" else None)
    for checkpoint in ("outer.2.", "inner.2."):
        assert faults.killed_at_a_write(found, found.first_after(checkpoint))[1] == []


def test_killed_at_a_moment(thresholds) -> None:
    """Checkpoints are written by a thread here, every few steps."""
    draw = random.Random(0)
    for i in range(2):
        assert faults.killed_at_a_moment(thresholds, f"moment-{i}", draw)[1] == []


@pytest.mark.parametrize("checkpoint", ["baseline.1.", "inner.2."])
def test_a_full_disk_is_a_sentence_and_the_run_goes_on(thresholds, checkpoint) -> None:
    assert faults.full_disk(thresholds, thresholds.first_after(checkpoint)) == []


@pytest.mark.parametrize("how", ["truncated", "altered", "both"])
def test_a_damaged_checkpoint_is_passed_over(thresholds, how) -> None:
    assert faults.damaged(thresholds, how) == []


def test_a_second_writer_is_refused(thresholds) -> None:
    assert faults.second_writer(thresholds) == []


@pytest.mark.parametrize(
    ("number", "after"),
    [
        (signal.SIGTERM, "outer.2."),
        (signal.SIGTERM, "manifest.json"),  # before the first stage
        (signal.SIGTERM, "trusted.npz"),
        (signal.SIGINT, "inner.3."),  # in the last step
    ],
)
def test_a_stop_is_told_and_the_run_goes_on(thresholds, number, after) -> None:
    code, wrong = faults.stopped(thresholds, thresholds.first_after(after), number)
    assert wrong == []
    assert code == 130


@pytest.mark.parametrize(
    ("stage", "step", "part"),
    [
        ("outer", 4, "momentum"),
        ("outer", 4, "ema"),
        ("outer", 4, "method.policy"),
        ("inner", 3, "best"),
        ("outer", 5, "tally"),
    ],
)
def test_what_a_checkpoint_forgets_is_noticed(thresholds, stage, step, part) -> None:
    """The comparison can fail: a checkpoint with zeros in one part, and a right hash, ends in another run."""
    trial = thresholds.trial(f"forgets-{part}")
    trial.go_on(Fault("kill", thresholds.first_after(f"{stage}.{step}.")))
    for path in trial.run.checkpoint_path.glob(f"{stage}.*.safetensors"):
        tensors, header = read_tensors(path)
        forgotten = [name for name in tensors if name.startswith(part)]
        assert forgotten
        tensors |= {name: torch.zeros_like(tensors[name]) for name in forgotten}
        write_bytes(path, tensors_to_bytes(tensors, header))
    assert trial.go_on() == 0
    assert differences(thresholds.right, summary_of(trial.run)) != []
