"""Clocks held at their highest for one measurement, on a Jetson, and given back whatever happens. Only on request.

`jetson_clocks` does both, and `nvpmodel` where another power mode was asked for. A process of its own, the keeper,
makes the changes and undoes them once the pipe to the measurement closes: at its end, on an error, on SIGTERM, on
kill -9. Before it changes anything it notes in a file what to undo: the next one does, where it was killed itself.
Nothing asks for a password: who is not root is told what to run. Python 3.8, standard library.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import IO, Any, Callable, Dict, Iterator, List, Optional

from kdedge_device.children import child
from kdedge_device.failures import Failure, RuntimeFailure
from kdedge_device.state import power_mode, power_modes, program
from kdedge_device.sysfs import at, read

__all__ = ["leftover", "locked"]

_FOLDER = "/var/lib/kdedge"
_NOTE = f"{_FOLDER}/clocks.json"  # what to undo; the keeper holds a lock on it
_STORED = f"{_FOLDER}/clocks.stored"  # of jetson_clocks --store
_BOOT = "/proc/sys/kernel/random/boot_id"
_SLOW_S = 120.0  # nvpmodel can take half a minute
_ENVIRONMENT = ("PATH", "HOME", "LD_LIBRARY_PATH")


@contextlib.contextmanager
def locked(
    root: str,
    log: Callable[[str], None],
    mode: Optional[str] = None,
    user: Callable[[], int] = os.geteuid,
) -> Iterator[None]:
    """Clocks held while the body runs, in power mode `mode` (a name; None: the present one).

    Failure: not a Jetson, not root, a mode that does not exist or wants a restart, or another measurement holds them.
    """
    _refuse(root, mode, user())
    command = child("set_clocks", root, str(os.getpid()), *([mode] if mode else []))
    keeper = subprocess.Popen(
        command,
        # Whoever clears up after a measurement knows its processes by marks in their environment; it must outlive them.
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,  # a signal to the group of the measurement must not reach it
    )
    try:
        _listen(keeper, log)
        yield
    finally:
        _dismiss(keeper, root, log)


def leftover(root: str = "/") -> Optional[str]:
    """A sentence where clocks are still held by a keeper that did not live to give them back; else None."""
    try:
        with open(at(root, _NOTE), "rb") as note:
            fcntl.flock(note, fcntl.LOCK_SH | fcntl.LOCK_NB)
            content = note.read()
    except OSError:  # there is none, or its keeper lives
        return None
    if not content:
        return None
    return (
        "The clocks or the power mode of this board are still those of an earlier measurement that was cut off. "
        "Run one with --set-clocks again, which gives them back, or restart the board."
    )


def _refuse(root: str, mode: Optional[str], user: int) -> None:
    if program(root, "jetson_clocks") is None:
        raise RuntimeFailure(
            "--set-clocks needs jetson_clocks, which comes with JetPack and is not on this machine. Leave it away."
        )
    if user != 0:
        raise Failure(
            "--set-clocks changes the clocks of the board, which only root may do. Run it as root: sudo python3 "
            "run.pyz bench --set-clocks ...; or hold them yourself with `sudo jetson_clocks --store`, then "
            "`sudo jetson_clocks`, run without --set-clocks, and give them back with `sudo jetson_clocks --restore`."
        )
    known = power_modes(root)
    if mode is not None and mode not in known:
        raise Failure(f"There is no power mode '{mode}' on this board; it has {', '.join(known) or 'none'}.")


def _listen(keeper: "subprocess.Popen[bytes]", log: Callable[[str], None]) -> None:
    """Until the clocks are held."""
    assert keeper.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([keeper.stdout], [], [], _SLOW_S)
        more = keeper.stdout.read(1) if ready else b""
        if not more:
            raise Failure("The clocks could not be held: the process that was to do it ended or hangs.")
        line += more
    document = json.loads(line.decode("utf-8"))
    if "error" in document:
        raise Failure(document["error"])
    log(document["said"])


def _dismiss(keeper: "subprocess.Popen[bytes]", root: str, log: Callable[[str], None]) -> None:
    """Until the clocks are given back."""
    try:
        told, _ = keeper.communicate(timeout=_SLOW_S)  # closes its input, which is what it waits for
    except subprocess.TimeoutExpired:
        return log("Giving the clocks back takes long; the process that does it goes on by itself.")
    for line in told.decode("utf-8", "replace").splitlines():
        log(json.loads(line).get("said", ""))
    held = leftover(root)
    if held is not None and keeper.returncode != 0:
        log(held)
    return None


class _Keeper:
    """In the other process: what was changed, in order, and its undoing."""

    def __init__(self, root: str, note: IO[str]) -> None:
        self._root = root
        self._note = note

    def hold(self, mode: Optional[str]) -> str:
        stored = at(self._root, _STORED)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(stored)  # jetson_clocks asks before it writes over one
        self._run("jetson_clocks", "--store", stored)
        before = power_mode(self._root) if mode is not None else None
        if mode is not None and before is None:
            raise Failure("The present power mode is not known (nvpmodel -q), so it could not be given back.")
        self._write({"boot": read(self._root, _BOOT), "mode": before})
        if mode is not None:
            self._run("nvpmodel", "-m", str(power_modes(self._root)[mode]))
            now = power_mode(self._root)
            if now is None or now["name"] != mode:
                raise Failure(f"The board is not in power mode {mode} after nvpmodel -m; it may want a restart first.")
        self._run("jetson_clocks")
        return "Clocks are held at their highest" + (f", in power mode {mode}." if mode else ".")

    def give_back(self) -> str:
        """What the note says; nothing where it is empty."""
        self._note.seek(0)
        try:
            note = json.loads(self._note.read())
        except ValueError:  # empty, or cut off while it was written, which is before anything is changed
            self._write(None)
            return ""
        if note["mode"] is not None:
            self._run("nvpmodel", "-m", str(note["mode"]["id"]))
        if note["boot"] == read(self._root, _BOOT):  # a restart gives the clocks back by itself, the mode not
            self._run("jetson_clocks", "--restore", at(self._root, _STORED))
        self._write(None)
        return "Clocks are given back."

    def _run(self, name: str, *arguments: str) -> None:
        path = program(self._root, name)
        if path is None:
            raise Failure(f"{name} is not on this machine.")
        command = [path, *arguments]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_SLOW_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Failure(f"{' '.join(command)} failed: {error}.") from None
        if done.returncode != 0:
            last = done.stdout.decode("utf-8", "replace").strip().splitlines()[-1:]
            raise Failure(f"{' '.join(command)} failed: {last[0] if last else f'exit code {done.returncode}'}.")

    def _write(self, note: Optional[Dict[str, Any]]) -> None:
        """On the disk before anything is changed: boards lose their power. In place: the lock is on this very file."""
        self._note.seek(0)
        self._note.truncate()
        if note is not None:
            json.dump(note, self._note)
        self._note.flush()
        os.fsync(self._note.fileno())


def _keep(root: str, parent: int, mode: Optional[str]) -> None:
    """The keeper's life: undo what an earlier one left, hold, wait, undo."""
    ended: List[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda signum, frame: ended.append(signum))  # then it gives back and ends
    try:
        os.makedirs(at(root, _FOLDER), exist_ok=True)
        note = open(at(root, _NOTE), "a+", encoding="utf-8")
        _lock(note)
    except BlockingIOError:
        return _tell(error="The clocks are held by another measurement; wait for its end.")
    except OSError as error:
        return _tell(error=f"Cannot write {at(root, _NOTE)}, which is to say what to undo: {error.strerror}.")
    keeper = _Keeper(root, note)
    try:
        keeper.give_back()
        said = keeper.hold(mode)
    except Failure as failure:
        with contextlib.suppress(Failure):
            keeper.give_back()
        return _tell(error=str(failure))
    _tell(said=said)
    while not ended and os.getppid() == parent and not select.select([sys.stdin], [], [], 0.5)[0]:
        pass
    try:
        _tell(said=keeper.give_back())
    except Failure as failure:
        _tell(said=f"Clocks could not be given back: {failure} The next --set-clocks, or a restart, does it.")
    return None


def _lock(note: IO[str]) -> None:
    """BlockingIOError where another keeper has it. `leftover` takes it for a moment, too."""
    for _ in range(4):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.1)
    fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return None


def _tell(**document: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(document).encode("utf-8") + b"\n")


if __name__ == "__main__":
    _keep(sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
