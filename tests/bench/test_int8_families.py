"""The record behind the INT8 column of `kdedge models`: how it is made, and that the column tells it."""

import json
from pathlib import Path

import numpy as np
import pytest

from kdedge.models.zoo import ARCHITECTURES, INT8_SPEEDUP
from kdedge_bench import int8_families
from kdedge_bench.int8_families import STUDENTS, geometric_mean, main, smooth_images, speed_ratio

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*/int8-families.json"))


def test_the_ratio_is_that_of_the_rounds() -> None:
    # The second round ran while something else did: both were slow, and the ratio stays; one outlier moves no median.
    times = {"fp32": np.array([[2.0, 2.0, 90.0], [6.0, 6.0, 6.0], [3.0, 3.0, 3.0]]), "int8": np.ones((3, 3))}
    times["int8"][1] = 3.0
    assert speed_ratio(times) == {"median": 2.0, "min": 2.0, "max": 3.0, "interval": None}


def test_the_interval_over_rounds_is_not_moved_by_a_disturbed_one() -> None:
    ratios = np.array([2.0, 2.1, 1.9, 2.05, 1.95, 2.0, 2.02, 40.0])
    low, high = speed_ratio({"fp32": ratios[:, None], "int8": np.ones((8, 1))})["interval"]
    assert 1.9 < low < 2.0 < high < 10


def test_a_student_that_int8_slows_down_counts_as_float() -> None:
    families = {name: {"speedup": {"median": 2.0}} for name in STUDENTS}
    families["mobilenet-v3-small"] = {"speedup": {"median": 0.5}}
    assert geometric_mean(families) == pytest.approx(2.0 ** (5 / 6))
    assert geometric_mean({}) is None


def test_images_are_smooth_and_use_all_tones() -> None:
    images = smooth_images(3, 32, seed=0)
    assert (images.shape, images.dtype) == ((3, 32, 32, 3), np.uint8)
    assert (images.min(), images.max()) == (0, 255)
    steps = np.abs(np.diff(images.astype(int), axis=1)).mean()
    assert steps < 0.5 * images.std(), "neighbours are alike; those of independent pixels differ by more than std"
    assert not np.array_equal(images, smooth_images(3, 32, seed=1))


def test_a_family_is_measured_and_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_families, "SETTLE_S", 0.0)
    monkeypatch.setattr(int8_families, "IMAGES", 8)
    out = tmp_path / "record.json"
    main(["--families", "squeezenet", "--px", "32", "--rounds", "2", "--queries", "2", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["conditions"]["weights"] == "random"
    found = record["families"]["squeezenet"]
    assert found["latency_ms"]["fp32"] > 0
    assert found["speedup"]["min"] <= found["speedup"]["median"] <= found["speedup"]["max"]
    assert 0 < found["relative_rms"] < 0.3
    assert found["bytes"]["int8"] < 0.4 * found["bytes"]["fp32"]
    assert found["left_in_float"] == []


def test_the_zoo_tells_what_was_recorded() -> None:
    """Without a record nothing is told; with it, every family, to the digit."""
    told = {
        name: f"{record['families'][name]['speedup']['median']:.1f}" for record in loaded() for name in ARCHITECTURES
    }
    assert {name: str(value) for name, value in INT8_SPEEDUP.items()} == told


def loaded() -> list[dict]:
    assert len(RECORDS) <= 1, "say in the zoo which machine's record is told"
    return [json.loads(path.read_text()) for path in RECORDS]
