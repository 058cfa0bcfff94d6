"""The record of a packed file's memory, at toy size, and the committed one."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from kdedge.errors import BugError
from kdedge_bench import pack_memory, peak_memory

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
SIZES = ["--images", "4000", "--px", "8", "--batches", "2"]


@pytest.fixture
def here(monkeypatch) -> None:
    """A process more for each size costs seconds; its command line is what is tested."""

    def run(command, check):
        assert command[1:3] == ["-m", "kdedge_bench.pack_memory"]
        pack_memory.main(command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(peak_memory, "subprocess", SimpleNamespace(run=run))


@pytest.mark.usefixtures("here")
def test_a_record_has_every_size_and_leaves_no_images_behind(tmp_path) -> None:
    out, scratch = tmp_path / "record.json", tmp_path / "scratch"
    scratch.mkdir()
    pack_memory.main([*SIZES, "--out", str(out), "--scratch", str(scratch)])
    record = json.loads(out.read_text())
    assert [one["images"] for one in record["sizes"]] == [4, 40, 400, 4000]
    assert all(one["random_images_per_second"] > 0 for one in record["sizes"])
    assert record["command"].endswith("--images 4000 --px 8 --batches 2 --out record.json")
    assert record["pixel_bytes_an_image"] == 192
    assert list(scratch.iterdir()) == []


@pytest.mark.usefixtures("here")
def test_an_image_that_is_not_the_one_written_is_found(tmp_path, monkeypatch) -> None:
    whole = pack_memory._image
    monkeypatch.setattr(pack_memory, "_image", lambda numbers, px: whole(numbers + (len(numbers) == 4), px))
    with pytest.raises(BugError, match="not the one that was written"):
        pack_memory.main([*SIZES, "--out", str(tmp_path / "record.json"), "--scratch", str(tmp_path)])


def test_the_committed_record_is_flat_to_a_million_images() -> None:
    found = [json.loads(path.read_text()) for path in RESULTS.glob("*/pack-memory.json")]
    assert found
    for record in found:
        smallest, largest = record["sizes"][0], record["sizes"][-1]
        assert (smallest["images"], largest["images"]) == (1_000, 1_000_000)
        grown_mib = largest["reading_above_opened_mib"] - smallest["reading_above_opened_mib"]
        assert grown_mib < 0.01 * largest["pixels_mib"]
        # What is known of each image: id, label, part, its place.
        assert record["opened_bytes_an_image"] < 150
        assert largest["cold_batch_ms"]["store"] < largest["cold_batch_ms"]["memory_map"]
