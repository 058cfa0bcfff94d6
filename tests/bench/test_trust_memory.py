"""The record of the trusted set's memory, at toy size, and the committed one."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

from kdedge_bench import peak_memory, trust_memory

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_a_record_has_every_size_and_leaves_no_features_behind(tmp_path, monkeypatch) -> None:
    out, scratch = tmp_path / "record.json", tmp_path / "scratch"
    scratch.mkdir()

    def here(command, check):  # a process more for each size costs seconds; its command line is what is tested
        assert command[1:3] == ["-m", "kdedge_bench.trust_memory"]
        trust_memory.main(command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(peak_memory, "subprocess", SimpleNamespace(run=here))
    sizes = ["--images", "20000", "--features", "16", "--classes", "4"]
    trust_memory.main([*sizes, "--out", str(out), "--scratch", str(scratch)])
    record = json.loads(out.read_text())
    assert [one["images"] for one in record["sizes"]] == [200, 2000, 20000]
    assert all(one["precision"] > one["precision_after_confidence"] for one in record["sizes"])
    assert record["command"].endswith("--images 20000 --features 16 --classes 4 --out record.json")
    assert record["features_bytes_an_image"] == 32
    assert list(scratch.iterdir()) == []


def test_the_committed_record_is_flat_to_a_million_images() -> None:
    found = [json.loads(path.read_text()) for path in RESULTS.glob("*/trust-memory.json")]
    assert found
    for record in found:
        tenth, whole = record["sizes"][-2:]
        assert (whole["images"], record["features"]) == (1_000_000, 512)
        grown_mib = whole["peak_above_start_mib"] - tenth["peak_above_start_mib"]
        # What the answer itself takes (label, confidence, cluster, reason of each image), not the features.
        assert grown_mib < 0.15 * (whole["features_mib"] - tenth["features_mib"])
        assert whole["precision"] > whole["precision_after_confidence"]
