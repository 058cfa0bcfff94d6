"""Clocks are held only on request, and given back whatever becomes of the processes. On programs that keep a state."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdedge_device
from kdedge_device import set_clocks
from kdedge_device.failures import Failure, RuntimeFailure
from kdedge_device.set_clocks import leftover, locked

from . import boards

# As the real one: --store refuses to write over a file, --restore wants one, and bare it goes to the highest.
_CLOCKS = """
echo "clocks $*" >> {root}/log
case "$1" in
  --store) [ -e "$2" ] && {{ echo "File $2 already exists."; exit 1; }}; cp {root}/clock "$2";;
  --restore) [ -e "$2" ] || exit 1; cp "$2" {root}/clock;;
  *) [ -e {root}/broken ] && {{ echo "cannot open emc"; exit 3; }}; echo highest > {root}/clock;;
esac
"""
_MODES = """
echo "nvpmodel $*" >> {root}/log
[ "$1" = -m ] && [ ! -e {root}/reboot ] && printf 'pmode:%04d\\n' "$2" > {root}/var/lib/nvpmodel/status
[ "$1" = -q ] || exit 0
id=$(sed 's/pmode:0*//' {root}/var/lib/nvpmodel/status)
echo "NV Power Mode: $(sed -n "s/< POWER_MODEL ID=${{id:-0}} NAME=\\(.*\\) >/\\1/p" {root}/etc/nvpmodel.conf)"
echo "${{id:-0}}"
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    boards.orin_nano(tmp_path)
    boards.put(tmp_path, {"/clock": "as it was\n", "/log": "", "/proc/sys/kernel/random/boot_id": "first\n"})
    boards.program(tmp_path, "/usr/bin/jetson_clocks", _CLOCKS.format(root=tmp_path))
    boards.program(tmp_path, "/usr/sbin/nvpmodel", _MODES.format(root=tmp_path))
    return tmp_path


@contextlib.contextmanager
def held(root: Path, mode: str | None = None) -> Iterator[list[str]]:
    said: list[str] = []
    with locked(str(root), said.append, mode, user=lambda: 0):
        yield said


def clock(root: Path) -> str:
    return (root / "clock").read_text(encoding="utf-8").strip()


def power_mode(root: Path) -> str:
    return (root / "var/lib/nvpmodel/status").read_text(encoding="utf-8").strip()


def eventually(root: Path, value: str, seconds: float = 15.0) -> bool:
    until = time.monotonic() + seconds
    while clock(root) != value and time.monotonic() < until:
        time.sleep(0.02)
    return clock(root) == value


def test_held_for_the_body_and_given_back(root: Path) -> None:
    with held(root) as said:
        assert clock(root) == "highest"
        assert said == ["Clocks are held at their highest."]
        assert leftover(str(root)) is None, "they are not left over while they are used"
    assert clock(root) == "as it was"
    assert said[1:] == ["Clocks are given back."]
    assert "nvpmodel -m" not in (root / "log").read_text(encoding="utf-8"), "the power mode was not asked for"


def test_given_back_after_an_error(root: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(root):
        raise ZeroDivisionError
    assert clock(root) == "as it was"


def test_twice_in_a_row(root: Path) -> None:
    for _ in range(2):
        with held(root):
            assert clock(root) == "highest"
    assert clock(root) == "as it was"


def test_a_power_mode_by_its_name(root: Path) -> None:
    with held(root, "25W") as said:
        assert power_mode(root) == "pmode:0001"
        assert said == ["Clocks are held at their highest, in power mode 25W."]
    assert (power_mode(root), clock(root)) == ("pmode:0002", "as it was")
    calls = [line for line in (root / "log").read_text(encoding="utf-8").splitlines() if " -q" not in line]
    assert [call.split(" /")[0] for call in calls] == [
        "clocks --store",
        "nvpmodel -m 1",
        "clocks ",
        "nvpmodel -m 2",
        "clocks --restore",
    ], "the limits that were stored belong to the mode that was"


def test_a_mode_that_wants_a_restart(root: Path) -> None:
    (root / "reboot").touch()
    with pytest.raises(Failure, match="not in power mode 7W"), held(root, "7W"):
        pass
    assert clock(root) == "as it was"
    assert leftover(str(root)) is None


def test_a_mode_that_does_not_exist(root: Path) -> None:
    with pytest.raises(Failure, match=r"no power mode 'MAXN'.*15W, 25W, MAXN_SUPER, 7W"), held(root, "MAXN"):
        pass
    assert (root / "log").read_text(encoding="utf-8") == ""


def test_clocks_that_cannot_be_held_are_given_back(root: Path) -> None:
    (root / "broken").touch()
    with pytest.raises(Failure, match="cannot open emc"), held(root):
        pass
    assert (clock(root), leftover(str(root))) == ("as it was", None)


def test_who_is_not_root_is_told_what_to_run(root: Path) -> None:
    with (
        pytest.raises(Failure, match=r"sudo python3 run\.pyz.*sudo jetson_clocks"),
        locked(str(root), print, user=lambda: 1000),
    ):
        pass
    assert (root / "log").read_text(encoding="utf-8") == "", "nothing was tried, and nobody was asked"


def test_a_machine_without_jetson_clocks(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match="comes with JetPack"), held(boards.raspberry_pi(tmp_path)):
        pass


def test_two_at_once(root: Path) -> None:
    with held(root):
        with pytest.raises(Failure, match="held by another measurement"), held(root):
            pass
        assert clock(root) == "highest", "the second one changed nothing"
    assert clock(root) == "as it was"


PARENT = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has the tests ignore it
sys.path.insert(0, {package!r})
from kdedge_device.set_clocks import locked
with locked({root!r}, lambda text: print(text, flush=True), {mode!r}, user=lambda: 0):
    time.sleep(60)
"""


@contextlib.contextmanager
def measurement(root: Path, mode: str | None = None) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the clocks, as a measurement would."""
    package = str(Path(kdedge_device.__file__).parents[1])
    lines = PARENT.format(package=package, root=str(root), mode=mode)
    command, quiet = [sys.executable, "-c", lines], subprocess.DEVNULL
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Clocks are held")
        assert clock(root) == "highest"
        try:
            yield process
        finally:
            process.kill()


def keeper_of(process: "subprocess.Popen[str]") -> int:
    told = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    assert len(told) == 1
    return int(told[0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_given_back_where_the_measurement_is_killed(root: Path, number: signal.Signals) -> None:
    with measurement(root) as process:
        process.send_signal(number)
        process.wait(10)
        assert eventually(root, "as it was")
    assert leftover(str(root)) is None


def test_given_back_where_the_whole_group_is_told_to_end(root: Path) -> None:
    """A lost ssh connection, or Ctrl-C in a terminal."""
    with measurement(root, "25W") as process:
        os.killpg(process.pid, signal.SIGHUP)
        process.wait(10)
        assert eventually(root, "as it was")
        assert power_mode(root) == "pmode:0002"


def test_the_keeper_is_not_cleared_up_with_the_measurement(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remote measurement's processes are killed by a mark in their environment, after it ended, however it ended."""
    monkeypatch.setenv("KDEDGE_JOB", "a-job")
    with measurement(root) as process:
        assert b"KDEDGE_JOB" in Path(f"/proc/{process.pid}/environ").read_bytes()
        assert b"KDEDGE_JOB" not in Path(f"/proc/{keeper_of(process)}/environ").read_bytes()


def test_given_back_where_the_keeper_itself_is_told_to_end(root: Path) -> None:
    with measurement(root) as process:
        os.kill(keeper_of(process), signal.SIGTERM)
        assert eventually(root, "as it was")


def test_the_next_one_undoes_what_a_killed_keeper_left(root: Path) -> None:
    with measurement(root, "25W") as process:
        os.kill(keeper_of(process), signal.SIGKILL)
        process.kill()
        process.wait(10)
    assert (clock(root), power_mode(root)) == ("highest", "pmode:0001")
    until = time.monotonic() + 15.0
    while (told := leftover(str(root))) is None and time.monotonic() < until:
        time.sleep(0.02)  # the keeper's end takes a moment
    assert told is not None
    assert "--set-clocks again" in told
    with held(root):
        assert power_mode(root) == "pmode:0002", "the mode from before is back before anything is held"
    assert (clock(root), leftover(str(root))) == ("as it was", None)


def test_a_restart_gives_back_the_clocks_and_not_the_mode(root: Path) -> None:
    with measurement(root, "25W") as process:
        os.kill(keeper_of(process), signal.SIGKILL)
        process.kill()
        process.wait(10)
    boards.put(root, {"/proc/sys/kernel/random/boot_id": "second\n", "/clock": "of the restart\n", "/log": ""})
    with held(root):
        pass
    assert (clock(root), power_mode(root)) == ("of the restart", "pmode:0002")


def test_a_note_that_was_cut_off_stops_nobody(root: Path) -> None:
    boards.put(root, {"/var/lib/kdedge/clocks.json": '{"boot": "first", "mo'})
    with held(root):
        assert clock(root) == "highest"
    assert (clock(root), leftover(str(root))) == ("as it was", None)


def test_the_measurement_is_told_where_its_keeper_died(root: Path) -> None:
    said: list[str] = []
    with locked(str(root), said.append, user=lambda: 0):
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text(encoding="utf-8").split()
        keepers = [pid for pid in children if b"set_clocks" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(keepers) == 1
        os.kill(int(keepers[0]), signal.SIGKILL)
    assert "was cut off" in said[-1]


def test_nothing_is_changed_before_the_note_is_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    note = (root / "note").open("w+", encoding="utf-8")
    keeper = set_clocks._Keeper(str(root), note)
    (root / "var/lib/kdedge").mkdir(parents=True)
    run = keeper._run

    def spy(name: str, *arguments: str) -> None:
        calls.append(" ".join((name, *arguments[:1])) + (" noted" if (root / "note").stat().st_size else ""))
        run(name, *arguments)

    monkeypatch.setattr(keeper, "_run", spy)
    with note:
        keeper.hold("25W")
        assert json.loads((root / "note").read_text(encoding="utf-8")) == {
            "boot": "first",
            "mode": {"id": 2, "name": "MAXN_SUPER"},
        }
    assert calls == ["jetson_clocks --store", "nvpmodel -m noted", "jetson_clocks noted"]
