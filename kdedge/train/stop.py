"""SIGTERM and Ctrl-C: inside the loop they wait for the end of the step, elsewhere they stop at once."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

__all__ = ["Stop", "stop_asked", "terminable"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AT_ONCE_S = 1.0  # schedulers and launchers signal a process twice in a moment, and mean it once


@final
class Stop:
    """Whether somebody asked the loop to stop."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def stop_asked() -> Iterator[Stop]:
    """Inside the block the first SIGINT or SIGTERM is only noted; one a second later raises KeyboardInterrupt at once.

    What was asked for and not done is raised where the block ends. Signals that are ignored (nohup, background jobs)
    stay so, and what was installed before is restored. Only the main thread hears signals; elsewhere nothing changes.
    """
    stop, first_at_s = Stop(), 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first_at_s
        now_s = time.monotonic()
        if not stop.asked:
            stop.asked, first_at_s = True, now_s
        elif now_s - first_at_s >= _AT_ONCE_S:
            raise KeyboardInterrupt

    with _handled(_SIGNALS, note):
        yield stop
    if stop.asked:
        raise KeyboardInterrupt


@contextmanager
def terminable() -> Iterator[None]:
    """Inside the block SIGTERM raises KeyboardInterrupt, as Ctrl-C does: what is open is closed, and all is told."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled((signal.SIGTERM,), interrupt):
        yield


@contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """The signals go to `handler` inside the block, but for those that are ignored or not Python's to restore."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in numbers}
        before = {number: known for number, known in found.items() if known not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)
