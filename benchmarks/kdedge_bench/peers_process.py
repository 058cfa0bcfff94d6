"""Other programs as processes that may fail in any way: held to a time and a memory, and asked for logits and times.

Peaks are those of a process of its own and of what it started. A program started straight from here would inherit this
process's peak as its own least: it is exchanged for the other program only after it has been a copy of this one.
"""

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, final

import numpy as np
import numpy.typing as npt

__all__ = ["Done", "PeerFailed", "Served", "measured"]

WATCH = Path(__file__).resolve().parent / "peers" / "watch.py"


class PeerFailed(Exception):
    """What a peer did instead of what it was asked; the row says it."""


@final
@dataclass(frozen=True)
class Done:
    """How a command ended. `told`: the last line of its standard output; `peak_mib` of its largest process; `cpu_s` of
    all of them."""

    returncode: int
    told: str
    last_error: str
    peak_mib: float
    cpu_s: float
    killed: str | None

    @property
    def failure(self) -> str | None:
        if self.killed is not None:
            return self.killed
        return f"exit code {self.returncode}: {self.last_error[:300]}" if self.returncode else None


def measured(command: Sequence[str], *, limit_s: float, limit_mib: float) -> Done:
    """Run `command` to its end; past either limit it is killed with all it has started, and `killed` says why."""
    watcher = [sys.executable, "-I", str(WATCH), str(limit_s), str(limit_mib), *command]
    # No time limit here: the watcher keeps one.
    done = subprocess.run(watcher, stdout=subprocess.PIPE, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return Done(**json.loads(done.stdout))


@final
class Served:
    """A peer's runtime with one of its files open, as peers/peer.py has it. PeerFailed where it answers otherwise."""

    def __init__(self, python: str, adapter: str, file: Path, limit_s: float) -> None:
        self.command = [python, adapter, "--serve", str(file)]
        self.limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._unread = b""

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            if self._answer() != {"ready": True}:
                raise PeerFailed("the runtime did not say that it is ready")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def logits(self, images: Path, out: Path) -> npt.NDArray[np.float32]:
        """float32 [N, K] of the float32 [N, C, H, W] in `images`."""
        count = len(np.load(images, mmap_mode="r"))
        self._ask({"logits": str(images), "out": str(out)})
        try:
            found: npt.NDArray[np.float32] = np.load(out, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise PeerFailed(f"its logits cannot be read: {error}") from None
        if found.ndim != 2 or len(found) != count or not np.issubdtype(found.dtype, np.floating):
            raise PeerFailed(f"it gave {found.dtype} {list(found.shape)} for {count} images; one row each was expected")
        if not np.isfinite(found).all():
            raise PeerFailed("it gave logits that are no finite numbers")
        return found

    def times_ms(self, images: Path, queries: int) -> npt.NDArray[np.float64]:
        told = self._ask({"time": str(images), "queries": queries}).get("ms")
        try:
            found = np.asarray(told, np.float64)
        except (TypeError, ValueError):
            found = np.zeros(0)
        if found.shape != (queries,) or not (np.isfinite(found) & (found > 0)).all():
            raise PeerFailed(f"it gave no {queries} times")
        return found

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """The next line; libraries' own output does not come this way."""
        assert self._process is not None
        assert self._process.stdout is not None
        until = time.monotonic() + self.limit_s
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not waiting.select(max(0.0, until - time.monotonic())):
                    raise PeerFailed(f"the runtime did not answer within {self.limit_s:.0f} s")
                content = os.read(self._process.stdout.fileno(), 1 << 16)
                if not content:
                    raise self._ended()
                self._unread += content
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise PeerFailed(f"the runtime answered {line[:80]!r}; a JSON object was expected")
        return answer

    def _ended(self) -> PeerFailed:
        assert self._process is not None
        assert self._errors is not None
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        return PeerFailed(f"the runtime ended with exit code {code}: {said[:300] or 'no message'}")

    def _end(self) -> None:
        if self._errors is not None:
            self._errors.close()
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
