"""Checkpoints: written beside the loop, one at a time, whole or not at all."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from kdedge.errors import RunError
from kdedge.runs import Run, half_written, write_bytes, write_json
from kdedge.train import checkpoint as checkpoint_module
from kdedge.train.checkpoint import Checkpoints
from kdedge.train.saving import Saver


class SlowDisk:
    """Writes as `write_bytes` does, once it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun, self.fails = threading.Event(), threading.Event(), False
        monkeypatch.setattr(checkpoint_module, "write_bytes", self.write)

    def write(self, path: Any, content: bytes) -> None:
        self.begun.set()
        assert self.go.wait(timeout=20)
        if self.fails:
            raise RunError(f"Cannot write {path}: No space left on device.")
        write_bytes(path, content)


def steps(checkpoints: Checkpoints) -> list[int]:
    return sorted(int(path.name.split(".")[1]) for path in checkpoints.folder.glob("*.safetensors"))


def test_the_state_is_that_of_its_step_while_the_loop_goes_on(tmp_path, monkeypatch) -> None:
    disk, checkpoints = SlowDisk(monkeypatch), Checkpoints(tmp_path, "outer")
    weight = torch.arange(6.0).reshape(1, 2, 3, 1).to(memory_format=torch.channels_last)
    with Saver(checkpoints, every_s=1e-9) as saver:
        assert saver.due()
        saver.save(1, {"weight": weight}, note="one")
        assert disk.begun.wait(timeout=20)
        weight += 100  # the next step
        assert not saver.due()  # one write at a time
        disk.go.set()
        saver.wait()
    checkpoint, notes = checkpoints.load()
    assert notes == []
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.header) == (1, {"note": "one", "step": 1})
    assert torch.equal(checkpoint.tensors["weight"], torch.arange(6.0).reshape(1, 2, 3, 1))


def test_copies_go_to_the_same_memory_and_follow_new_shapes(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, "outer")
    with Saver(checkpoints, every_s=0) as saver:
        saver.save(1, {"a": torch.zeros(3), "count": torch.tensor(1)})
        first = saver._copies["a"].data_ptr()
        saver.save(2, {"a": torch.ones(3), "count": torch.tensor(2), "best": torch.ones(2, requires_grad=True)})
        assert saver._copies["a"].data_ptr() == first
        saver.save(3, {"a": torch.ones(4), "count": torch.tensor(3)})
    checkpoint, _ = checkpoints.load()
    assert checkpoint is not None
    assert {name: tensor.tolist() for name, tensor in checkpoint.tensors.items()} == {"a": [1.0] * 4, "count": 3}
    assert steps(checkpoints) == [2, 3]


def test_a_full_disk_is_told_at_the_next_step_and_leaves_the_old_checkpoint(tmp_path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path, "outer")
    checkpoints.save(4, {"a": torch.zeros(3)})
    disk = SlowDisk(monkeypatch)
    disk.fails = True
    disk.go.set()

    def asks_after_each_step() -> None:
        with Saver(checkpoints, every_s=1e-9) as saver:
            saver.save(5, {"a": torch.ones(3)})
            while not saver.due():
                pass

    def ends_before_it_asks(error: Exception | None = None) -> None:
        with Saver(checkpoints, every_s=1e-9) as saver:
            saver.save(5, {"a": torch.ones(3)})
            if error is not None:
                raise error

    with pytest.raises(RunError, match="No space left"):
        asks_after_each_step()
    with pytest.raises(RunError, match="No space left"):
        ends_before_it_asks()
    with pytest.raises(ValueError, match="the first error is the one to tell"):
        ends_before_it_asks(ValueError("the first error is the one to tell"))
    assert steps(checkpoints) == [4]


def test_whoever_leaves_waits_for_the_write(tmp_path, monkeypatch) -> None:
    disk, checkpoints = SlowDisk(monkeypatch), Checkpoints(tmp_path, "outer")

    def is_stopped() -> None:
        with Saver(checkpoints, every_s=20) as saver:
            saver.save(1, {"a": torch.ones(3)})
            threading.Timer(0.05, disk.go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        is_stopped()
    assert steps(checkpoints) == [1]


def test_the_interval_grows_where_copying_takes_more_than_its_share(tmp_path, monkeypatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("kdedge.train.saving.time.perf_counter", lambda: now_s)
    saver = Saver(Checkpoints(tmp_path, "outer"), every_s=5)
    copy = saver._copy

    def slow_copy(tensors: Any) -> None:
        nonlocal now_s
        copy(tensors)
        now_s += 0.2

    monkeypatch.setattr(saver, "_copy", slow_copy)
    with saver:
        now_s = 4.9
        assert not saver.due()
        now_s = 5.0
        assert saver.due()
        saver.save(1, {"a": torch.ones(3)})
        assert saver._write is not None
        saver._write.result()
        now_s = 15.1  # 9.9 s after the end of a save that took 0.2 s
        assert not saver.due()
        now_s = 15.3
        assert saver.due()
        assert saver.blocked_fraction == pytest.approx(0.2 / 15.3)


def test_only_the_process_that_writes_does(tmp_path) -> None:
    one, other = Checkpoints(tmp_path, "outer"), Checkpoints(tmp_path, "outer", writes=False)
    one.save(1, {"a": torch.ones(3)})
    with Saver(other, every_s=0) as saver:
        assert not saver.due()
        saver.save(2, {"a": torch.ones(3)})
    other.clear()
    assert steps(other) == [1]
    assert other.load()[0] is not None


def test_what_killed_writes_left_is_removed_under_the_lock_and_strangers_stay(tmp_path, monkeypatch) -> None:
    run = Run(tmp_path)
    checkpoints = Checkpoints(run.checkpoint_path, "outer")
    checkpoints.save(4, {"a": torch.ones(3)})
    (run.checkpoint_path / "outer.notes.safetensors").write_bytes(b"not ours")

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        patched.setattr(Path, "unlink", killed)  # a killed process tidies nothing
        for write in (lambda: checkpoints.save(5, {"a": torch.ones(3)}), lambda: write_json(run.manifest_path, {})):
            with pytest.raises(Killed):
                write()
    assert len(half_written(run.path)) == len(half_written(run.checkpoint_path)) == 1
    with run.lock():
        assert half_written(run.path) == half_written(run.checkpoint_path) == []
    assert [path.name for path in run.path.iterdir() if path.is_file()] == [".lock"]
    assert sorted(path.name for path in run.checkpoint_path.iterdir()) == [
        "outer.4.safetensors",
        "outer.notes.safetensors",
    ]
    checkpoints.clear()
    assert [path.name for path in run.checkpoint_path.iterdir()] == ["outer.notes.safetensors"]


def test_damaged_checkpoints_make_room_for_sound_ones_once_there_is_one(tmp_path) -> None:
    first = Checkpoints(tmp_path, "outer")
    for step in (480, 500):
        first.save(step, {"a": torch.ones(3)})
        (tmp_path / f"outer.{step}.safetensors").write_bytes(b"damaged")
    checkpoints = Checkpoints(tmp_path, "outer")
    checkpoint, notes = checkpoints.load()
    assert checkpoint is None
    assert [note.count(f"outer.{step}.") for step, note in zip((500, 480), notes, strict=False)] == [1, 1]
    assert notes[2] == "No sound checkpoint of stage outer is left; it begins anew."
    assert steps(checkpoints) == [480, 500]
    checkpoints.save(20, {"a": torch.ones(3)})
    assert steps(checkpoints) == [20]
    checkpoints.save(40, {"a": torch.ones(3)})
    (tmp_path / "outer.40.safetensors").write_bytes(b"damaged")
    again = Checkpoints(tmp_path, "outer")
    assert again.load()[0] is not None
    again.save(30, {"a": torch.ones(3)})
    assert steps(again) == [20, 30]
    again.save(40, {"a": torch.ones(3)})
    again.save(50, {"a": torch.ones(3)})
    assert steps(again) == [40, 50]


def test_any_altered_byte_and_any_cut_is_noticed(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, "outer")
    checkpoints.save(1, {"a": torch.zeros(2)}, note="x")
    checkpoints.save(2, {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.float64)}, best_accuracy=0.5)
    newest = tmp_path / "outer.2.safetensors"
    content = newest.read_bytes()
    places = range(0, len(content), 7)
    damaged = [content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in places]
    damaged += [content[:place] for place in places]
    for altered in damaged:
        newest.write_bytes(altered)
        checkpoint, notes = checkpoints.load()
        assert checkpoint is not None
        same = checkpoint.step == 2 and torch.equal(checkpoint.tensors["a"], torch.arange(3.0))
        same = same and checkpoint.header == {"best_accuracy": 0.5, "step": 2}
        assert same or (checkpoint.step == 1 and len(notes) == 1)
    newest.write_bytes(content)
    newest.rename(tmp_path / "outer.7.safetensors")
    checkpoint, notes = checkpoints.load()
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert "holds the state after step 2, not 7" in notes[0]
