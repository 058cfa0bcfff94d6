"""What is logged of a run's pace and memory, and TensorBoard's files."""

import builtins
import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from toys import VIEWS, toy_pool

from kdedge.data.batches import Batches
from kdedge.errors import MissingPackage
from kdedge.train.metrics import MetricsLog, SilentDisplay
from kdedge.train.pace import Pace, memory_peak


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr("kdedge.train.pace.time.perf_counter", lambda: self.now_s)


def batches() -> Batches:
    return Batches(toy_pool(), VIEWS, labeled_batch=4, unlabeled_batch=6, seed=0, stage="outer")


def go(clock: Clock, pace: Pace, *, wait_s: float, compute_s: float) -> None:
    with pace.waiting():
        clock.now_s += wait_s
    clock.now_s += compute_s


def test_a_line_is_of_the_steps_since_the_one_before(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    pace = Pace("outer", 20, batches())
    go(clock, pace, wait_s=1, compute_s=3)
    go(clock, pace, wait_s=0, compute_s=4)
    assert pace.line(22) == {"images_per_second": 2 * 16 / 8, "loader_wait_fraction": 1 / 8}
    go(clock, pace, wait_s=1, compute_s=1)
    assert pace.line(23) == {"images_per_second": 16 / 2, "loader_wait_fraction": 1 / 2}


class Elsewhere:
    """A store on a GPU, which this machine need not have: nothing of it is read."""

    device, waited_s = torch.device("cuda"), 0.0


def test_a_slow_loader_is_told_of_once_and_not_too_soon(monkeypatch) -> None:
    clock, source = Clock(monkeypatch), batches()
    source.pool = dataclasses.replace(source.pool, images=Elsewhere())
    pace = Pace("outer", 0, source)
    go(clock, pace, wait_s=5, compute_s=4.9)
    assert pace.slow_loader() is None
    source.pool.images.waited_s = 3.0  # as a store that reads from disk counts
    go(clock, pace, wait_s=0, compute_s=20.1)
    sentence = pace.slow_loader()
    assert sentence is not None
    assert sentence.startswith("Stage outer waits 17% of its time for its images, 10% for the disk")
    assert "kdedge data pack" in sentence
    assert "views.operations" in sentence
    go(clock, pace, wait_s=9, compute_s=0)
    assert pace.slow_loader() is None


def test_on_a_cpu_views_are_no_waiting_but_the_disk_is(monkeypatch) -> None:
    clock, source = Clock(monkeypatch), batches()
    pace = Pace("outer", 0, source)
    go(clock, pace, wait_s=50, compute_s=50)
    assert pace.slow_loader() is None
    source.pool.images.waited_s = 5.0
    assert pace.slow_loader() is None  # five percent are fine
    source.pool.images.waited_s = 5.1
    assert pace.slow_loader() is not None


def test_the_peak_of_memory_is_in_mib_and_does_not_fall() -> None:
    before = memory_peak(torch.device("cpu"))
    assert set(before) == {"memory_peak_mib"}
    assert 50 < before["memory_peak_mib"] < 50_000
    block = torch.ones(30_000_000)
    held = memory_peak(torch.device("cpu"))["memory_peak_mib"]
    del block
    assert held >= before["memory_peak_mib"]
    assert memory_peak(torch.device("cpu"))["memory_peak_mib"] >= held


class FakeWriter:
    """What is called of torch's SummaryWriter, which needs the package tensorboard."""

    made: list["FakeWriter"]

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.calls = Path(folder), purge_step, list[tuple[Any, ...]]()
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.calls.append((name, value, step))

    def add_text(self, name: str, text: str, step: int) -> None:
        self.calls.append((name, text, step))

    def flush(self) -> None:
        self.calls.append(("flush",))

    def close(self) -> None:
        self.calls.append(("close",))


def test_tensorboard_gets_numbers_and_sentences_by_stage(tmp_path, monkeypatch) -> None:
    FakeWriter.made = []
    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    log = MetricsLog(tmp_path / "metrics.jsonl", SilentDisplay(), tensorboard=True)
    log.rewind("outer", 4)
    log.write("outer", 5, total_steps=9, loss=torch.tensor(0.5), shares=[1.0, 2.0], nothing=float("nan"))
    log.write("outer", 6, total_steps=9, alarm="One class takes over.")
    log.write("trusted", 1, total_steps=1, kept_fraction=1.0)
    outer, trusted = FakeWriter.made
    assert (outer.folder, outer.purge_step) == (tmp_path / "tensorboard" / "outer", 5)
    assert outer.calls == [
        ("loss", 0.5, 5),
        ("flush",),
        ("alarm", "One class takes over.", 6),
        ("flush",),
        ("close",),
    ]
    assert (trusted.folder.name, trusted.purge_step, trusted.calls) == (
        "trusted", 1, [("kept_fraction", 1.0, 1), ("flush",)],
    )  # fmt: skip
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    MetricsLog(tmp_path / "metrics.jsonl", SilentDisplay(), tensorboard=True, writes=False).rewind("outer", 0)
    assert len(FakeWriter.made) == 2


def test_without_the_package_tensorboard_is_refused_with_its_command(tmp_path, monkeypatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ModuleNotFoundError(f"No module named '{name}'")
        return real_import(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackage, match=r"engine\.tensorboard=true needs it.*pip install 'kdedge\[tensorboard\]'"):
        MetricsLog(tmp_path / "metrics.jsonl", SilentDisplay(), tensorboard=True)
    MetricsLog(tmp_path / "metrics.jsonl", SilentDisplay()).write("outer", 1, loss=1.0)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"stage": "outer", "step": 1, "loss": 1.0}
