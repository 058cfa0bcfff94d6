"""What the commands share: --json and --debug, printing, and finding the run that was left out."""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kdedge.runs import Run

__all__ = ["Interrupted", "Reply", "columns", "command_output", "finished_run", "note"]


class Interrupted(Exception):
    """Ctrl-C, with a sentence on what is kept and how to go on."""


@dataclass(frozen=True)
class Reply:
    """What a command has to say: `document` for --json (None: nothing at all), `text` for a person, how it exits."""

    document: Any
    text: str = ""
    exit_code: int = 0


def note(message: str) -> None:
    """Progress, remarks and errors go to standard error; standard output holds the result alone."""
    print(message, file=sys.stderr, flush=True)


def command_output(function: Callable[..., Reply]) -> Callable[..., int]:
    """Give a command --json and --debug, and print its reply: one document, or the text.

    What libraries print while it runs goes to standard error, so that --json is one document whatever they say.
    """

    @click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def command(*args: Any, as_json: bool, debug: bool, **options: Any) -> int:
        with contextlib.redirect_stdout(sys.stderr):
            reply = function(*args, **options)
        text = reply.text
        if as_json and reply.document is not None:
            text = json.dumps(reply.document, indent=1, allow_nan=False, ensure_ascii=False)
        if text:
            print(text.rstrip("\n"))
        return reply.exit_code

    return command


def finished_run(path: Path | None) -> "Run":
    """The run named, or the latest finished one, and then it is said which."""
    from kdedge.runs import open_finished

    run = open_finished(path)
    if path is None:
        note(f"Using the latest finished run: {run.path}")
    return run


def columns(rows: Sequence[Sequence[str]], indent: int = 0) -> str:
    """Rows as aligned text; the last column is left ragged."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(" " * indent + line for line in lines)
