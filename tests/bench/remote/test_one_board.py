"""One board at the end of a real ssh: what travels, what comes back, what is left there, and how it is interrupted."""

import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kdedge.errors import DeviceError
from kdedge_bench import bench
from kdedge_bench.remote import ConnectionLost, run_remote

from .conftest import Board, mentioning, until, write_bundle

pytestmark = pytest.mark.sshd


class Call(threading.Thread):
    """A call of `bench` beside the test, which does things to the board meanwhile."""

    def __init__(self, bundle: Path, on: Sequence[str], clean: bool = False) -> None:
        super().__init__()
        self._bundle, self._on, self._clean = bundle, on, clean
        self.told: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.records = bench([self._bundle], "quick", on=self._on, clean=self._clean, say=self.told.append)
        except BaseException as error:
            self.error = error

    def heard(self, words: str) -> Callable[[], bool]:
        return lambda: any(words in line for line in self.told)

    def ended(self) -> "Call":
        self.join(60)
        assert not self.is_alive()
        return self


def nothing_is_left(board: Board) -> bool:
    """But the copied bundle."""
    left = {path.name for part in ("jobs", "incoming") for path in (board.cache / part).iterdir()}
    return not left and not list(board.temporary.iterdir()) and not list(mentioning("KDEDGE_JOB="))


def test_records_come_back_and_only_changes_travel(board: Board, bundle: Path) -> None:
    told: list[str] = []
    records = bench([bundle.parent], "quick", on=[board.address], repeats=2, threads=3, say=told.append)
    names = ["nvidia-jetson-orin-nano-developer-kit-fp32.json", "nvidia-jetson-orin-nano-developer-kit-int8.json"]
    assert sorted(path.name for path in (bundle.parent / "bench").iterdir()) == names
    assert [json.loads((bundle.parent / "bench" / name).read_text()) for name in names] == records
    assert board.calls() == ["bench --artifact all --build --rounds 2 --effort quick --threads 3 --json"]
    assert any("sending 4 of 4 files" in line for line in told)
    assert any("measuring fp32" in line for line in told)
    assert nothing_is_left(board)
    assert board.connections() == 1
    told.clear()
    write_bundle(bundle, model=b"other" * 1000)
    bench([bundle], "quick", on=[board.address], say=told.append)
    assert any("sending 2 of 4 files" in line for line in told)  # the model, and the manifest with its hash
    (copy,) = (board.cache / "bundles").iterdir()
    assert {path.name for path in copy.iterdir()} == {path.name for path in bundle.iterdir()} | {".files.json"}
    for path in bundle.iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes()
    told.clear()
    (copy / "int8-87-1030.engine").touch()
    (copy / "of-the-user").mkdir()
    (copy / "model.onnx").write_bytes(b"damaged")
    bench([bundle], "quick", on=[board.address], say=told.append)
    assert any("sending 1 of 4 files" in line for line in told)
    assert (copy / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()
    assert (copy / "int8-87-1030.engine").exists()
    told.clear()
    bench([bundle], "quick", on=[board.address], say=told.append)
    assert any("all 4 files are there" in line for line in told)
    assert board.measured() == 4


def test_a_call_of_another_command(board: Board, bundle: Path, tmp_path: Path) -> None:
    board.does(document={"accuracy": 0.5})
    (tmp_path / "images.npz").write_bytes(b"\0" * 10)
    extra = {"labelled.npz": tmp_path / "images.npz"}
    arguments = ["eval", "--data", "labelled.npz"]
    assert run_remote(board.place, bundle, arguments, extra=extra, clean=True) == {"accuracy": 0.5}
    assert board.calls() == ["eval --data labelled.npz --json"]
    assert not board.cache.exists()


def test_files_go_on_where_they_stopped(board: Board, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdedge_bench.remote.PIECE_BYTES", 3000)
    manifest = json.loads((bundle / "manifest.json").read_text())
    whole, altered = (manifest["artifacts"][name]["sha256"] for name in ("fp32", "int8"))
    (board.cache / "incoming").mkdir(parents=True)
    (board.cache / "incoming" / f"{whole}.part").write_bytes((bundle / "model.onnx").read_bytes()[:1200])
    (board.cache / "incoming" / f"{altered}.part").write_bytes(b"?" * 100)
    told: list[str] = []
    assert len(bench([bundle], "quick", on=[board.address], say=told.append)) == 2
    total = sum(path.stat().st_size for path in bundle.iterdir()) - 1300
    assert any(f"{total / 1e3:.1f} kB" in line for line in told)
    (copy,) = (board.cache / "bundles").iterdir()
    for path in bundle.iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes()


def test_a_connection_that_breaks_costs_nothing(board: Board, bundle: Path) -> None:
    hold = board.hold()
    call = Call(bundle, [board.address])
    board.started()
    board.cut()
    until(call.heard("the connection was lost"))
    hold.unlink()
    assert len(call.ended().records) == 2
    assert call.error is None
    assert sum("measuring fp32" in line for line in call.told) == 1
    assert board.measured() == 1
    assert nothing_is_left(board)


def test_a_board_that_is_gone_is_told_and_a_second_call_takes_up_its_work(board: Board, bundle: Path) -> None:
    hold = board.hold()
    call = Call(bundle, [board.address])
    board.started()
    board.stop()
    assert isinstance(call.ended().error, ConnectionLost)
    assert call.error.exit_code == 1
    assert "the same command picks it up" in str(call.error)
    board.start()
    call = Call(bundle, [board.address])
    until(call.heard("still runs; taking it up"))
    board.stop()
    assert isinstance(call.ended().error, ConnectionLost)
    hold.unlink()
    until(lambda: not list(mentioning("KDEDGE_JOB=")))
    board.start()
    call = Call(bundle, [board.address]).ended()
    assert call.heard("has ended; taking its result")()
    assert len(call.records) == 2
    assert board.measured() == 1
    assert nothing_is_left(board)
    assert len(Call(bundle, [board.address]).ended().records) == 2
    assert board.measured() == 2


def test_processes_that_go_their_own_way_end_too(board: Board, bundle: Path) -> None:
    board.does(stray=True)
    bench([bundle], "quick", on=[board.address])
    until(lambda: not Path("/proc", (board.home / "stray").read_text()).exists())
    assert nothing_is_left(board)


def test_ctrl_c_ends_the_work_of_the_board(board: Board, bundle: Path) -> None:
    board.hold()
    board.does(stray=True)

    def press() -> None:
        board.started()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        bench([bundle], "quick", on=[board.address])
    assert (board.home / "interrupted").exists()  # it could put back what it had changed
    until(lambda: not Path("/proc", (board.home / "stray").read_text()).exists())
    assert nothing_is_left(board)
    assert not (bundle.parent / "bench").exists()


def test_a_bundle_is_not_changed_while_it_is_measured(board: Board, bundle: Path) -> None:
    hold = board.hold()
    first = Call(bundle, [board.address])
    board.started()
    write_bundle(bundle, model=b"other" * 1000)
    second = Call(bundle, [board.address])
    until(second.heard("waiting for a measurement of this bundle as it was before"))
    (copy,) = (board.cache / "bundles").iterdir()
    assert (copy / "model.onnx").read_bytes() == b"float" * 1000
    hold.unlink()
    assert len(first.ended().records) == len(second.ended().records) == 2
    assert (copy / "model.onnx").read_bytes() == b"other" * 1000
    assert board.measured() == 2


def test_a_result_that_cannot_be_kept_here_stays_there(board: Board, bundle: Path) -> None:
    (bundle.parent / "bench").write_text("no folder")
    with pytest.raises(Exception, match="Cannot write"):
        bench([bundle], "quick", on=[board.address])
    (bundle.parent / "bench").unlink()
    assert len(bench([bundle], "quick", on=[board.address])) == 2
    assert board.measured() == 1


def test_a_shell_that_talks(board: Board, bundle: Path) -> None:
    board.python("print('Welcome to Ubuntu', flush=True)\nimport sys\nprint('kdedge-0 7', flush=True)")
    assert len(bench([bundle], "quick", on=[board.address])) == 2


def test_names_that_a_shell_would_run(board: Board, tmp_path: Path, bundle: Path) -> None:
    folder = tmp_path / "-rf $(touch hacked) `touch hacked`; touch hacked '\"\n\x1b[31m"
    folder.mkdir()
    bundle.rename(folder / "-bundle")
    assert len(bench([folder / "-bundle"], "quick", on=[board.address])) == 2
    assert not list(tmp_path.rglob("hacked"))
    assert not list(board.home.rglob("hacked"))
    with pytest.raises(DeviceError, match="cannot travel as"):
        run_remote(board.place, folder / "-bundle", ["eval"], extra={"../x": folder / "-bundle" / "model.onnx"})
