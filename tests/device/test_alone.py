"""One measurement at a time on a machine."""

import fcntl
import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdedge_device import __main__ as program
from kdedge_device.alone import MARK, alone


@pytest.fixture(autouse=True)
def _on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are part of one measurement, so that none waits for what else runs on this machine; not these."""
    monkeypatch.delenv(MARK)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[str]:
    """As /tmp is."""
    path = tmp_path / "shared"
    path.mkdir()
    path.chmod(0o1777)
    yield str(path)
    assert MARK not in os.environ


def fail(text: str) -> None:
    pytest.fail(text)


def test_the_second_waits_and_says_for_what(folder: str) -> None:
    said: list[str] = []
    waits, ended = threading.Event(), threading.Event()

    def tell(text: str) -> None:
        said.append(text)
        waits.set()

    def second() -> None:
        with alone(tell, [folder]):
            ended.set()

    with alone(fail, [folder]):
        del os.environ[MARK]  # somebody else's
        other = threading.Thread(target=second)
        other.start()
        assert waits.wait(20)
        assert not ended.is_set()
        os.environ[MARK] = "1"
    other.join(20)
    assert ended.is_set()
    assert said == [f"Another measurement runs on this machine (process {os.getpid()}); waiting for it to end."]


def test_what_belongs_to_a_measurement_does_not_wait_for_it(folder: str) -> None:
    with alone(fail, [folder]), alone(fail, [folder]):
        assert os.environ[MARK]


def test_every_user_may_lock_the_file(folder: str) -> None:
    umask = os.umask(0o077)
    try:
        with alone(fail, [folder]):
            (file,) = Path(folder).iterdir()
    finally:
        os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666
    file.write_text("; rm -rf /")
    said: list[str] = []
    with file.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def release(text: str) -> None:
            said.append(text)
            fcntl.flock(held, fcntl.LOCK_UN)

        with alone(release, [folder]):
            assert file.read_text() == str(os.getpid())
    assert said == ["Another measurement runs on this machine; waiting for it to end."]


def test_no_link_is_followed_and_no_file_is_no_error(folder: str, tmp_path: Path) -> None:
    name = "kdedge-measuring.lock"
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (Path(folder) / name).symlink_to(mine)
    private = tmp_path / "private"
    private.mkdir(mode=0o755)
    with alone(fail, [folder, str(private), str(tmp_path / "absent")]):
        assert mine.read_text() == "precious"
        assert not any(private.iterdir()), "others could not make one there, and would take another"
    (Path(folder) / name).unlink()
    os.mkfifo(Path(folder) / name)
    with alone(fail, [folder]):
        pass


def test_a_machine_without_such_locks_measures_all_the_same(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdedge_device.alone.os.name", "nt")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with alone(fail, [folder]):
        assert not any(os.scandir(folder))


def test_bench_is_alone(bundle: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it measures the lock is held, and its children know."""
    monkeypatch.setattr("kdedge_device.alone.alone.__wrapped__.__defaults__", ([folder],))
    seen: list[str] = []

    def one(options: object, work: object) -> tuple[dict[str, object], str, int]:
        (file,) = Path(folder).iterdir()
        with file.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(os.environ[MARK])
        return {}, "", 0

    monkeypatch.setattr("kdedge_device.bench_command._one", one)
    assert program.main(["bench", str(bundle)]) == 0
    assert seen == ["1"]
