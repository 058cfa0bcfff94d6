"""Several boards at once, and a real run.pyz on a real one."""

import os
import signal
import threading
from pathlib import Path

import pytest

from kdedge.runs import sha256_file
from kdedge_bench import bench
from kdedge_bench.latency import BoardsFailed, target_of
from kdedge_bench.remote_bench import measure_remote

from ..test_latency import tiny_model
from .conftest import Board, Boards
from .test_one_board import Call

pytestmark = pytest.mark.sshd


def test_two_boards_at_once(boards: Boards, bundle: Path) -> None:
    two = [boards(), boards()]
    holds = [board.hold() for board in two]
    call = Call(bundle, [board.address for board in two], clean=True)
    for board in two:
        board.started()  # either is measured while the other one is
    for hold in holds:
        hold.unlink()
    assert [record["artifact"]["name"] for record in call.ended().records] == ["fp32", "int8"] * 2
    orin = "nvidia-jetson-orin-nano-developer-kit"
    names = sorted(path.name for path in (bundle.parent / "bench").iterdir())
    assert not any(board.cache.exists() for board in two)
    assert names == [f"{orin}-2-fp32.json", f"{orin}-2-int8.json", f"{orin}-fp32.json", f"{orin}-int8.json"]


def test_one_of_two_fails(boards: Boards, bundle: Path) -> None:
    good, unknown = boards(), boards(known=False)
    told: list[str] = []
    with pytest.raises(BoardsFailed, match="1 of 2 machines did not measure everything; 2 records") as caught:
        bench([bundle], "quick", on=[unknown.address, good.address], say=told.append)
    assert sum("The host key of" in line for line in told) == 1
    assert len(caught.value.records) == len(list((bundle.parent / "bench").iterdir())) == 2
    assert list(caught.value.failures) == [unknown.address]
    assert "host key" in caught.value.failures[unknown.address]
    assert caught.value.exit_code == 2
    good.does(signal=9)
    unknown.stop()
    with pytest.raises(BoardsFailed, match="2 of 2 machines") as caught:
        bench([bundle], "quick", on=[unknown.address, good.address])
    assert caught.value.exit_code == 1  # the program that was killed is nothing to be fixed in the call


def test_ctrl_c_ends_the_work_of_all(boards: Boards, bundle: Path) -> None:
    two = [boards(), boards()]
    for board in two:
        board.hold()

    def press() -> None:
        for board in two:
            board.started()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        bench([bundle], "quick", on=[board.address for board in two])
    for board in two:
        assert (board.home / "interrupted").exists()
        assert not list((board.cache / "jobs").iterdir())


def test_a_bare_model_with_the_real_program(board: Board, tmp_path: Path) -> None:
    board.python(site=True)
    model = tiny_model(tmp_path / "-my model.onnx")
    arguments = ["--seconds", "0.01", "--runs", "5"]
    (record,) = measure_remote(board.place, target_of(model, tmp_path / "out"), arguments)
    assert record["latency_ms"]["compute"]["count"] >= 5
    assert record["artifact"]["sha256"] == sha256_file(model)
    assert record["artifact"]["file"] == model.name
    assert len(list((tmp_path / "out").glob("*--my model.json"))) == 1
