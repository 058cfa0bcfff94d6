"""Distillation without labels beside a peer: what the table says of sides that went well, badly, or not at all."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdedge_bench import distill_peer
from kdedge_bench.distill_peer import OURS, PEER, RANDOM, summary, table

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted(ROOT.glob("benchmarks/results/*/distill-peer.json"))


def _seed(theirs: float, ours: float, untaught: float) -> dict[str, dict[str, Any]]:
    cost = {"cpu_s": 100.0, "peak_mib": 900.0, "steps": 91}
    return {
        PEER: cost | {"accuracy": theirs},
        OURS: cost | {"cpu_s": 50.0, "accuracy": ours},
        RANDOM: {"steps": 0, "accuracy": untaught},
    }


def test_the_difference_is_paired_and_has_our_sign() -> None:
    found = summary([_seed(0.5, 0.6, 0.3), _seed(0.7, 0.8, 0.4)])
    assert found[PEER]["accuracy"]["mean"] == pytest.approx(0.6)
    # each seed's difference is 0.1: paired, it has no spread, whatever the seeds do
    assert found[PEER]["ours_minus_it"] == {"mean": pytest.approx(0.1), "half_width_95": pytest.approx(0.0, abs=1e-9)}
    assert "ours_minus_it" not in found[OURS]
    drawn = table({"summary": found}).splitlines()
    assert drawn[2] == "| lightly-train | 91 | 60.0 ± 127.1 | +10.0 ± 0.0 | 100 s | 900 MiB |"
    assert drawn[3].startswith(f"| {OURS} | 91 | 70.0 ± 127.1 | - | 50 s |")
    assert drawn[4].endswith("| +35.0 ± 63.5 | - | - |")


def test_a_side_that_ends_is_a_row_that_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    teacher = SimpleNamespace(student_path=tmp_path / "teacher.safetensors")
    monkeypatch.setattr(distill_peer, "open_finished", lambda path: teacher)
    dies = tmp_path / "dies.py"
    dies.write_text("raise SystemExit('no such teacher')")
    monkeypatch.setattr(distill_peer, "ADAPTER", dies)
    options = argparse.Namespace(
        teacher=tmp_path, keep=tmp_path / "keep", data=tmp_path, peer=sys.executable, epochs=1, limit_s=60.0
    )
    found = distill_peer.compare(0, options)
    assert found == {PEER: {"failure": "exit code 1: no such teacher"}}
    drawn = table({"summary": summary([found])})
    assert "| lightly-train | - | failed: exit code 1: no such teacher | - | - | - |" in drawn
    assert f"| {OURS} | - | failed: not begun" in drawn


def test_what_another_call_made_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "teacher.safetensors").write_bytes(b"a teacher")
    teacher = SimpleNamespace(student_path=tmp_path / "teacher.safetensors")
    monkeypatch.setattr(distill_peer, "open_finished", lambda path: teacher)
    monkeypatch.setattr(distill_peer, "compare", lambda seed, options: _seed(0.5, 0.6, 0.3))
    call = ["--data", str(tmp_path), "--teacher", "t", "--peer", "p", "--seeds", "2"]
    call += ["--keep", str(tmp_path / "keep"), "--out", str(tmp_path / "record.json")]
    for _ in range(2):
        distill_peer.main(call)
    with pytest.raises(SystemExit, match="Give another --keep"):
        distill_peer.main([*call, "--epochs", "9"])


def test_the_readme_says_what_the_record_says() -> None:
    assert RECORDS
    readme = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for path in RECORDS:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record["summary"] == summary(record["seeds"])
        assert table(record) in readme
        assert "/work" not in record["command"]
