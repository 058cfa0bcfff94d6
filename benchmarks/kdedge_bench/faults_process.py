"""A `kdedge train-recipe` in a process of its own that dies, or whose disk is full, at its k-th write.

What counts as a write: creating a file, the middle of its content, renaming, removing, making a folder. A kill leaves
the same bytes on disk before and after an fsync, so that syncing does not count.
"""

import builtins
import errno
import io
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, final

__all__ = ["Fault", "start"]

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
_NEEDS_SPACE = {"open", "os.mkdir", "write"}
# Imported once, before the first run is started: otherwise every run pays seconds for it.
_WARM = (
    "kdedge_bench.faults_process",
    "kdedge.cli",
    "kdedge.cli_display",
    "kdedge.models.wide_resnet",
    "kdedge.pipeline",
    "kdedge_recipes",
    "PIL.PngImagePlugin",
    "safetensors.torch",
    "sklearn.cluster",
    "torch._dynamo",
    "torch.utils.flop_counter",
    "torchvision.models",
)


@dataclass(frozen=True)
class Fault:
    """What happens at the `at`-th write (from 1) and, where the disk is full, at every later one that needs space.

    "count" lets the run end. "hold" waits there until the file `go` exists. `heard` gets a line for each write.
    """

    how: Literal["count", "kill", "full", "hold"]
    at: int = 0
    heard: Path | None = None
    go: Path | None = None


def start(arguments: Sequence[str], place: Path, told: Path, fault: Fault | None = None) -> BaseProcess:
    """Begin `kdedge ARGUMENTS` in the folder `place`, its output added to the file `told`.

    The process is forked from one that has everything imported and has computed nothing yet.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_WARM))
    process = context.Process(target=_run, args=(list(arguments), place, told, fault))
    process.start()
    return process


def _run(arguments: list[str], place: Path, told: Path, fault: Fault | None) -> None:
    os.chdir(place)
    output = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if fault is not None:
        _arm(_Writes(place, fault))
    sys.argv = ["kdedge", *arguments]
    runpy.run_module("kdedge", run_name="__main__")


@final
class _Writes:
    """Counts the writes in one folder, and does at the k-th what it was told to."""

    def __init__(self, folder: Path, fault: Fault) -> None:
        self.folder, self.fault = str(folder.resolve()) + os.sep, fault
        self.count, self.lock = 0, threading.Lock()
        self.heard = None if fault.heard is None else os.open(fault.heard, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def inside(self, path: Any) -> bool:
        """A relative path is: the process works in the folder, and rmtree names files by their folder's number."""
        if not isinstance(path, str | os.PathLike):
            return False
        name = os.fspath(path)
        return isinstance(name, str) and (not name.startswith(os.sep) or name.startswith(self.folder))

    def step(self, what: str, name: object) -> None:
        with self.lock:  # checkpoints are written by a thread of their own
            self.count += 1
            if self.heard is not None:
                os.write(self.heard, f"{what} {name}\n".encode())
            if self.fault.how == "kill" and self.count == self.fault.at:
                os.kill(os.getpid(), signal.SIGKILL)
            while self.fault.go and self.count == self.fault.at and not self.fault.go.exists():
                time.sleep(0.005)
        if self.fault.how == "full" and self.count >= self.fault.at and what in _NEEDS_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(name))


def _arm(writes: _Writes) -> None:
    """Listen to every change of a file, whichever function of the library makes it."""

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR) and writes.inside(path):
                writes.step("open", os.fspath(path))
        elif event == "os.mkdir" and Path(arguments[0]).is_dir():
            pass  # asked for, but there already
        elif event in _CHANGES and writes.inside(arguments[0]):
            writes.step(event, os.fspath(arguments[0]))

    def opening(real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            found = real(file, mode, *args, **kwargs)
            if mode.strip("bt") == "r" or not (isinstance(file, int) or writes.inside(file)):
                return found
            return _Halved(found, writes)

        return opened

    io.open = builtins.open = opening(io.open)  # pathlib and os.fdopen take the first, numpy the second
    sys.addaudithook(listen)


@final
class _Halved:
    """A file that writes everything in two halves, with a step between them."""

    def __init__(self, file: Any, writes: _Writes) -> None:
        self._file, self._writes = file, writes

    def write(self, content: Any) -> int:
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._writes.step("write", self._file.name)
        self._file.write(content[half:])
        return len(content)

    def __enter__(self) -> "_Halved":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
