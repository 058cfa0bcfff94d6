"""The experiment on guards: what its sets hold, and that its record adds up."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kdedge.data import Source, make_splits, open_source
from kdedge_bench import guards
from kdedge_bench.guards import ARMS, write_longtail, write_ood
from kdedge_device.preprocess import Preprocess

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*/guards-*.json"))


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source("digits")


def _pool(path: Path, digits: Source) -> tuple[Source, np.ndarray]:
    """The set as a run opens it, and the true digit of each of its images."""
    source = open_source(str(path))
    return source, digits.labels[[int(Path(name).stem) for name in source.ids]]


def test_the_pool_with_images_of_no_class(tmp_path, digits) -> None:
    source, truth = _pool(write_ood(tmp_path, digits, 0, clean=False), digits)
    assert source.classes == ("0", "1", "2", "3", "4", "5")
    assert Counter(truth[source.part == "train"].tolist()) == dict.fromkeys(range(6), 4)
    counts = Counter(truth[source.part == "unlabeled"].tolist())
    assert [counts[k] for k in range(6)] == [26] * 6
    assert sum(counts[k] for k in range(6, 10)) == 500
    assert set(truth[source.part == "test"]) == set(range(6))
    clean, truth_clean = _pool(write_ood(tmp_path, digits, 0, clean=True), digits)
    assert set(clean.ids) == {name for name, k in zip(source.ids, truth, strict=True) if k < 6}
    assert truth_clean.max() == 5
    other, _ = _pool(write_ood(tmp_path, digits, 1, clean=False), digits)
    assert set(other.ids) != set(source.ids)
    pixels = source.load([0], Preprocess(8, 8, 1, "squash", (0.0,), (1.0,)))
    original = digits.images.rows(np.array([int(Path(source.ids[0]).stem)]))
    np.testing.assert_array_equal(pixels[0, 0], original[0, :, :, 0])


def test_the_long_tail(tmp_path, digits) -> None:
    source, truth = _pool(write_longtail(tmp_path, digits, 3), digits)
    order = guards.tail_of(10, 3)
    labeled = [int((truth[source.part == "train"] == k).sum()) for k in order]
    pool = [int((truth[source.part != "test"] == k).sum()) for k in order]
    assert labeled == [10, 8, 6, 5, 4, 3, 2, 2, 1, 1]
    assert (pool[0], pool[-1]) == (120, 12)
    assert pool == sorted(pool, reverse=True)
    assert (source.part == "test").sum() == 540
    assert len(make_splits(source).labeled) == sum(labeled)


@pytest.mark.parametrize("scenario", sorted(ARMS))
def test_a_tiny_run_writes_a_record_and_runs_nothing_twice(tmp_path, scenario, capsys) -> None:
    tiny = ["teacher.optim.total_steps=2", "student.optim.total_steps=2", "teacher.optim.labeled_batch=4"]
    tiny += ["student.optim.labeled_batch=4", "trust.filters=confidence", "teacher.arch=wide-resnet-10-1"]
    where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "record.json")]
    arguments = [scenario, "--seeds", "7", *where]
    arguments += [word for setting in tiny for word in ("--set", setting)]
    guards.main(arguments)
    record = json.loads((tmp_path / "record.json").read_text())
    assert str(tmp_path) not in record["command"]
    assert list(record["runs"]) == [arm.name for arm in ARMS[scenario]]
    for arm in ARMS[scenario]:
        assert [run["seed"] for run in record["runs"][arm.name]] == [7]
        if arm.teacher_of is not None:
            teachers = [[run["teacher"] for run in record["runs"][name]] for name in (arm.name, arm.teacher_of)]
            assert teachers[0] == teachers[1]
    _adds_up(record)
    capsys.readouterr()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")}
    guards.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/result.json")} == finished
    assert "against no guard" in capsys.readouterr().out


def _adds_up(record: dict) -> None:
    for name, runs in record["runs"].items():
        assert record["arms"][name]["student"]["mean"] == pytest.approx(np.mean([run["student"] for run in runs]))
    for found in record["comparisons"]:
        new, base = ([run[found["metric"]] for run in record["runs"][found[who]]] for who in ("new", "base"))
        assert found["mean"] == pytest.approx(np.mean(new) - np.mean(base))
        low, high = found["interval_95"] or (-1.0, 1.0)  # one seed has none
        assert found["word"] == ("helps" if low > 0 else "hurts" if high < 0 else "no evidence")


def test_the_committed_records_add_up() -> None:
    assert {json.loads(path.read_text())["scenario"] for path in RECORDS} == set(ARMS)
    for path in RECORDS:
        record = json.loads(path.read_text())
        assert record["command"].startswith("python -m kdedge_bench.guards ")
        assert len(record["runs"]["no guard"]) == 5
        assert all("student" in found for found in record["arms"].values())
        _adds_up(record)
