"""SIGTERM and Ctrl-C: inside the loop they wait for the end of the step, elsewhere they stop at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

__all__ = ["Stop", "stop_asked", "terminable"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@final
class Stop:
    """Whether somebody asked the loop to stop."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def stop_asked() -> Iterator[Stop]:
    """Inside the block the first SIGINT or SIGTERM is only noted, and the second raises KeyboardInterrupt at once.

    What was asked for and not done is raised where the block ends. Signals that are ignored (nohup, background jobs)
    stay so, and what was installed before is restored. Only the main thread hears signals; elsewhere nothing changes.
    """
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

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
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)
