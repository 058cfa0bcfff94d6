"""Records over seeds: their arithmetic, the command they keep, and the README that quotes them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from kdedge_bench import seeds
from kdedge_bench.seeds import markdown_row, mean_and_interval

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))


def records() -> list[dict]:
    return [found for path in RECORDS if "test_accuracy" in (found := json.loads(path.read_text()))]


def test_the_interval_is_students() -> None:
    values = [0.96, 0.95, 0.97, 0.94, 0.98]
    found = mean_and_interval(values)
    deviation = math.sqrt(sum((v - 0.96) ** 2 for v in values) / 4)
    assert found["mean"] == pytest.approx(0.96)
    assert found["half_width_95"] == pytest.approx(2.776 * deviation / math.sqrt(5), rel=1e-3)  # t(4) from the table
    assert mean_and_interval([0.9]) == {"mean": 0.9, "half_width_95": None}


def test_a_record_keeps_the_command_without_this_machines_folders() -> None:
    typed = seeds._typed(["--data", "/home/me/photos", "--set", "student.init=/a/b/w.npz", "--labels", "40"])
    assert typed == "python -m kdedge_bench.seeds --data photos --set student.init=w.npz --labels 40"


def test_the_readme_quotes_every_record_and_only_records() -> None:
    """Each row of the README's table of results is a record under benchmarks/results, to the digit."""
    lines = (ROOT / "README.md").read_text().splitlines()
    head = lines.index("| data | labels only | teacher | student | FP32 file | INT8 file |")
    rows = []
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(line)
    assert len(rows) >= 3
    assert sorted(rows) == sorted(markdown_row(record) for record in records())


@pytest.mark.parametrize("taught", [True, False])
def test_a_recipe_without_a_teacher_has_a_record_too(
    taught: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--set teacher=null`: nothing is trusted, and the rest is said. Only the two commands are replaced."""
    network = {"arch": "a", "params": 1, "test_accuracy": 0.9}
    trusted = {"size": 5, "coverage": 0.5, "precision": 1.0} if taught else None
    result = {"baseline": network, "teacher": network if taught else None, "student": network, "trusted": trusted}
    result |= {"seconds": 1.0, "data": "digits", "labels": 40, "test_images": 10, "input": [1, 8, 8]}
    artifacts = {key: {"accuracy": 0.9} for key in ("fp32", "int8")}

    def commands(*words: str) -> None:
        run = tmp_path / "runs" / "s0"
        (run / "bundle").mkdir(parents=True, exist_ok=True)
        for name, content in {"manifest": {"artifacts": artifacts}, "gate": {"passed": True}}.items():
            (run / "bundle" / f"{name}.json").write_text(json.dumps(content))
        (run / "result.json").write_text(json.dumps(result))

    monkeypatch.setattr(seeds, "_kdedge", commands)
    out = tmp_path / "record.json"
    words = ["--seeds", "0", "--runs", str(tmp_path / "runs"), "--out", str(out), "--set", "teacher=null"]
    seeds.main(words)
    record = json.loads(out.read_text())
    assert record["seeds"][0]["trusted"] == ({"size": 5, "coverage": 0.5} if taught else None)
    assert set(record["networks"]) == {"baseline", "student"} | ({"teacher"} if taught else set())
    assert ("teacher" in record["test_accuracy"]) is taught
    assert markdown_row(record).count(" - ") == (0 if taught else 1)


def test_the_records_add_up() -> None:
    assert len(records()) >= 3
    for record in records():
        for key, found in record["test_accuracy"].items():
            values = [one["test_accuracy"][key] for one in record["seeds"]]
            assert found["mean"] == pytest.approx(np.mean(values))
        assert record["command"].startswith("python -m kdedge_bench.seeds ")
        assert record["machine"]["cpu"]
        assert record["date"].startswith("20")
