"""Boards that cannot be reached, trusted or used: one sentence each, and what to type. With a real sshd."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kdedge.errors import BudgetFailed, BundleError, DeviceError, KdedgeError, RunError
from kdedge_bench import bench
from kdedge_bench.remote import Place, reach, run_remote

from .conftest import Board, Boards, able, record, write_bundle

pytestmark = pytest.mark.sshd


def refused(board: Board, bundle: Path) -> str:
    with pytest.raises(DeviceError) as caught:
        bench([bundle], "quick", on=[board.address])
    assert not (bundle.parent / "bench").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_host_key_stays_unknown(boards: Boards, bundle: Path) -> None:
    board = boards(known=False)
    config = board.folder.parent / "config"
    config.write_text(config.read_text() + "StrictHostKeyChecking no\n")  # not even where the user says so
    told = refused(board, bundle)
    assert "is not known here" in told
    assert f"by hand and compare its fingerprint: ssh -F '{config}' -p {board.port} " in told
    assert not (board.folder.parent / "known_hosts").exists()
    assert not (board.home / ".cache").exists()


def test_another_host_key_is_an_alarm(boards: Boards, bundle: Path) -> None:
    board = boards(start=False)
    (board.folder / "host_key").unlink()
    (board.folder / "host_key.pub").unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(board.folder / "host_key")], check=True)
    board.start()
    told = refused(board, bundle)
    assert "is not the one in known_hosts" in told
    known = board.folder.parent / "known_hosts"
    assert f"ssh-keygen -R '[127.0.0.1]:{board.port}' -f {known}, then" in told
    assert not (board.home / ".cache").exists()


def test_an_ssh_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It closed its output and gave no answer: told as a connection that broke, not as a bug."""
    stuck = tmp_path / "ssh"
    stuck.write_text('#!/bin/sh\n[ "$1" = -G ] && exit\nexec sleep 60 >&- 2>&-\n')
    stuck.chmod(0o755)
    monkeypatch.setenv("KDEDGE_SSH", str(stuck))
    monkeypatch.setattr("kdedge_bench.remote_link.ENDS_S", 0.1)
    with pytest.raises(DeviceError, match="ssh to orin gives no answer and does not end"):
        reach(Place.parse("ssh://orin"))


def test_a_key_that_is_not_accepted(board: Board, bundle: Path) -> None:
    (board.folder.parent / "id.pub").write_text("")  # its sshd reads this as the authorized keys
    told = refused(board, bundle)
    assert "accepts none of your keys" in told
    assert f"ssh-copy-id -p {board.port} " in told


def test_a_board_that_is_off(boards: Boards, bundle: Path) -> None:
    off = boards(start=False)
    assert "cannot be reached: ssh: connect to host 127.0.0.1" in refused(off, bundle)
    with pytest.raises(DeviceError, match="cannot be reached"):
        reach(off.place)
    off.start()
    reach(off.place)
    assert off.connections() == 1
    assert off.calls() == []


def test_no_ssh(board: Board, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDEDGE_SSH", "no-such-ssh")
    assert "sudo apt install openssh-client" in refused(board, bundle)


def test_no_python(board: Board, bundle: Path) -> None:
    (board.programs / "python3").unlink()
    assert "has no python3. Install Python 3.8 or newer there" in refused(board, bundle)


OLD = "import sys\nsys.version_info = (3, 6, 9)\nsys.version = '3.6.9 (default)'\n"
TEGRA = (
    "import builtins, io, os\nreal, exists = open, os.path.exists\n"
    "release = '# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref'\n"
    "os.path.exists = lambda path: path == '/etc/nv_tegra_release' or exists(path)\n"
    "builtins.open = lambda path, *more: io.StringIO(release) if 'tegra' in str(path) else real(path, *more)\n"
)


def test_an_old_python(board: Board, bundle: Path) -> None:
    board.python(OLD)
    assert "has Python 3.6.9; kdedge needs 3.8 or newer" in refused(board, bundle)
    board.python(OLD + TEGRA)
    assert "runs JetPack 4 or older (L4T R32, Python 3.6.9); kdedge needs JetPack 5" in refused(board, bundle)
    assert not (board.home / ".cache").exists()


def test_nothing_but_python(board: Board, bundle: Path) -> None:
    missing = {"numpy": None, "onnxruntime": None, "tensorrt": None}
    problems = dict.fromkeys(missing, "it is not installed")
    info = able(can={"bench": "It needs numpy: ..."}, runtimes=missing, problems=problems, board={"l4t": None})
    board.does(info=info, exit_code=6, document={"error": "numpy cannot be loaded", "exit_code": 6})
    told = refused(board, bundle)
    assert "but no numpy and ONNX Runtime or TensorRT, so it cannot bench. Install there: " in told
    assert told.endswith((" -m pip install numpy onnxruntime", " -m pip install --user numpy onnxruntime"))
    assert board.calls() == [board.calls()[0], "info --json"]
    assert not list((board.cache / "jobs").iterdir())


NONSENSE = (
    "import json, sys\nsent = sys.stdin.buffer\nsent.read(int(sent.readline()))\n"
    "print('\\nkdedge-%s 3\\n{{{' % json.loads(sent.readline())['mark'])\nsys.exit()\n"
)


def test_a_board_that_answers_nonsense(board: Board, bundle: Path) -> None:
    board.python(NONSENSE)
    assert "answers what is no JSON" in refused(board, bundle)
    board.python("print('x' * (1 << 20))\nimport sys\nsys.exit(3)")
    assert "answers, but not as a board should (exit code 3)" in refused(board, bundle)


def test_an_environment_for_kdedge_is_used(board: Board, bundle: Path) -> None:
    own = board.home / ".kdedge" / "venv" / "bin" / "python3"
    own.parent.mkdir(parents=True)
    own.write_text(f'#!/bin/sh\necho >"{board.home}/own"\nexec "{sys.executable}" -S "$@"\n')
    own.chmod(0o755)
    bench([bundle], "quick", on=[board.address])
    assert (board.home / "own").exists()


FULL = (
    # What is written to /dev/full fails as on a full disk.
    "import pathlib\nreal = pathlib.Path.open\n"
    "pathlib.Path.open = lambda path, mode='r', *more, **named: "
    "real(pathlib.Path('/dev/full') if mode == 'ab' and 'incoming' in str(path) else path, mode, *more, **named)\n"
    "unlink = pathlib.Path.unlink\n"
    "pathlib.Path.unlink = lambda path, *more, **named: path.exists() and unlink(path, *more, **named)\n"
)


def test_a_full_disk(board: Board, bundle: Path) -> None:
    board.python(FULL)
    assert "is full" in refused(board, bundle)
    assert not list((board.cache / "incoming").iterdir())
    small = "shutil.disk_usage = lambda path: type('Usage', (), {'free': 100})\n"
    board.python(f"import shutil\n{small}")
    assert "have to go to" in refused(board, bundle)
    assert not list((board.cache / "incoming").iterdir())
    assert board.calls() == []


def test_a_home_that_is_read_only(boards: Boards, bundle: Path) -> None:
    board = boards(start=False)
    board.start(home=Path("/proc/self"))
    told: list[str] = []
    assert len(bench([bundle], "quick", on=[board.address], say=told.append)) == 2
    assert any(f"{board.temporary}/kdedge-" in line for line in told)
    assert not list(board.temporary.iterdir())  # what cannot be kept is not left either
    cache = (board.home / "begun").read_text()  # of the program: the key of its engines, above all
    assert cache == f"{board.temporary}/kdedge-{os.getuid()}"
    elsewhere = board.folder / "elsewhere"
    elsewhere.mkdir()
    (board.temporary / f"kdedge-{os.getuid()}").symlink_to(elsewhere)
    (bundle.parent / "bench").rename(bundle.parent / "before")
    assert "cannot keep files" in refused(board, bundle)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    ("behaviour", "error", "code", "words"),
    [
        ({"exit_code": 5, "document": {"error": "It was altered."}}, BundleError, 2, "It was altered."),
        ({"exit_code": 1, "document": {"error": "The golden images differ."}}, BudgetFailed, 1, "images differ."),
        (
            {"exit_code": 4, "document": {"error": "Of \x1b[31manother GPU."}},
            DeviceError,
            2,
            r": Of \[31manother GPU\.",
        ),
        ({"signal": int(signal.SIGKILL)}, DeviceError, 1, "was ended by SIGKILL, most likely for lack of memory."),
        (
            {"exit_code": 3, "stdout": "no JSON"},
            DeviceError,
            1,
            r"ended with code 3 and no result. It said: .*\[clocks",
        ),
        (
            {"exit_code": 6, "document": {"not_run": {"fp32": "No runtime."}}},
            DeviceError,
            2,
            "fp32 is not run: No runt",
        ),
        ({"stdout": '{"records": [NaN]}'}, DeviceError, 1, "ended with code 0 and no result"),
        ({"document": {"records": [{"schema": 1}]}}, DeviceError, 2, "has no 'artifact'"),
        ({"document": {"records": [record("../../x")]}}, DeviceError, 2, "'../../x'; a name such as int8 was"),
        (
            {"document": {"records": [], "failed": {"fp32": "No room."}}},
            DeviceError,
            1,
            "fp32 was not measured: No room.",
        ),
    ],
)
def test_what_a_program_may_say(
    board: Board, bundle: Path, behaviour: dict[str, Any], error: type[KdedgeError], code: int, words: str
) -> None:
    board.does(**behaviour)
    with pytest.raises(error, match=words) as caught:
        bench([bundle], "quick", on=[board.address])
    assert caught.value.exit_code == code
    assert not list((bundle.parent).glob("bench/*"))
    assert not list((board.cache / "jobs").iterdir())


def test_a_bundle_that_was_altered_stays_here(board: Board, bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match="1 bytes"):
        bench([bundle], "quick", on=[board.address])
    write_bundle(bundle)
    document = json.loads((bundle / "manifest.json").read_text())
    del document["files"]["run.pyz"]
    (bundle / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"has no run\.pyz"):
        run_remote(board.place, bundle, ["check"])
    assert not board.cache.exists()


def test_files_that_no_board_can_use(board: Board, tmp_path: Path) -> None:
    (tmp_path / "mine.engine").write_bytes(b"native code")
    with pytest.raises(DeviceError, match="fits no other"):
        bench([tmp_path / "mine.engine"], "quick", on=[board.address])
    (tmp_path / "mine.onnx").write_bytes(b"nothing of this kind")
    with pytest.raises(RunError, match="cannot be read as an ONNX file"):
        bench([tmp_path / "mine.onnx"], "quick", on=[board.address])
