"""Signals: inside the loop they wait for the end of the step, elsewhere they stop at once."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from kdedge.train import stop
from kdedge.train.stop import stop_asked, terminable


@pytest.fixture(autouse=True)
def _python_defaults() -> Iterator[None]:
    """What a terminal gives a program; a background job would have SIGINT ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def in_the_loop(*signals: signal.Signals, error: Exception | None = None) -> list[bool]:
    """What `asked` was after each signal; the list is `heard`, so that it is there after an exception as well."""
    heard.clear()
    with stop_asked() as found:
        for number in signals:
            os.kill(os.getpid(), number)  # Python hears it before the next line
            heard.append(found.asked)
        if error is not None:
            raise error
    return heard


heard: list[bool] = []


def handlers_are_back() -> bool:
    return (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (
        signal.default_int_handler,
        signal.SIG_DFL,
    )


def test_without_a_signal_nothing_happens() -> None:
    in_the_loop()
    assert handlers_are_back()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_raised_at_the_end(number) -> None:
    with pytest.raises(KeyboardInterrupt):
        in_the_loop(number)
    assert heard == [True]
    assert handlers_are_back()


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(second, monkeypatch) -> None:
    monkeypatch.setattr(stop, "_AT_ONCE_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        in_the_loop(signal.SIGTERM, second, signal.SIGTERM)
    assert heard == [True]
    assert handlers_are_back()


def test_signals_that_come_together_are_one() -> None:
    """A scheduler signals every process of a group, and torchrun its workers once more."""
    with pytest.raises(KeyboardInterrupt):
        in_the_loop(signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
    assert heard == [True, True, True]


def test_another_error_is_the_one_that_is_told() -> None:
    with pytest.raises(ValueError, match="first"):
        in_the_loop(signal.SIGINT, error=ValueError("first"))
    assert handlers_are_back()


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert in_the_loop(signal.SIGINT) == [False]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with terminable():
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_is_ctrl_c_outside_the_loop_and_waits_inside() -> None:
    passed = []

    def run() -> None:
        with terminable():
            with pytest.raises(KeyboardInterrupt):
                in_the_loop(signal.SIGTERM)
            passed.append("loop")
            os.kill(os.getpid(), signal.SIGTERM)
            passed.append("not heard")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert passed == ["loop"]
    assert handlers_are_back()


def test_other_threads_change_no_handlers() -> None:
    found = []

    def work() -> None:
        with stop_asked() as asked:
            found.append((signal.getsignal(signal.SIGTERM), asked.asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(signal.SIG_DFL, False)]
