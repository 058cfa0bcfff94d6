"""What is seen while a network trains: one live line on a terminal, plain lines everywhere else."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from kdedge.train.metrics import Display

__all__ = ["LiveDisplay", "PlainDisplay", "open_display"]

PLAIN_EVERY_S = 10.0
"""Seconds between two plain lines of one stage, so that a log stays readable."""


@contextmanager
def open_display() -> "Iterator[Display]":
    """Live where standard error is a terminal, else plain lines; both on standard error."""
    if not sys.stderr.isatty():
        yield PlainDisplay()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield LiveDisplay(progress)


class LiveDisplay:
    """One bar for each stage; those that are done stay."""

    def __init__(self, progress: "Progress") -> None:
        self.progress = progress
        self._task: TaskID | None = None

    def stage(self, name: str, total_steps: int) -> None:
        self._task = self.progress.add_task(name, total=total_steps, facts="")

    def step(self, record: Mapping[str, Any]) -> None:
        if self._task is None:
            return
        self.progress.update(self._task, completed=record["step"])
        if facts := _facts(record):  # a line of validation alone has none, and the last ones stay
            self.progress.update(self._task, facts=facts)

    def say(self, sentence: str) -> None:
        self.progress.console.print(sentence, highlight=False, markup=False)


class PlainDisplay:
    """A line when a stage begins, every ten seconds, and when it ends."""

    def __init__(self) -> None:
        self._stage = ""
        self._began_at_s = 0.0
        self._first_step = 0
        self._shown_at_s = 0.0

    def stage(self, name: str, total_steps: int) -> None:
        self._stage, self._began_at_s, self._first_step = name, time.monotonic(), -1
        self._shown_at_s = self._began_at_s
        self._print(f"{name}: {total_steps} steps" if total_steps > 1 else name)

    def step(self, record: Mapping[str, Any]) -> None:
        facts = _facts(record)
        if not facts:  # a line of validation, or of an alarm, which is said
            return
        now_s, step, total = time.monotonic(), record["step"], record["total_steps"]
        if self._first_step < 0:
            self._first_step = step
        if total == 1 or (step < total and now_s - self._shown_at_s < PLAIN_EVERY_S):
            return
        self._shown_at_s = now_s
        done = step - self._first_step
        left = (
            f", {_minutes((now_s - self._began_at_s) / done * (total - step))} left"
            if done > 0 and step < total
            else ""
        )
        self._print(f"{self._stage}: step {step} of {total}{left}, {facts}")

    def say(self, sentence: str) -> None:
        self._print(sentence)

    @staticmethod
    def _print(line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _facts(record: Mapping[str, Any]) -> str:
    """Speed, loss and kept share, as far as the record has them."""
    facts = []
    if record.get("images_per_second") is not None:
        facts.append(f"{record['images_per_second']:,.0f} images/s")
    if record.get("loss") is not None:
        facts.append(f"loss {record['loss']:.3f}")
    if record.get("kept_fraction") is not None:
        facts.append(f"kept {100 * record['kept_fraction']:.0f} %")
    return ", ".join(facts)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
