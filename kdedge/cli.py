"""The command line: click in, one call out, and every error as a sentence.

The command modules import click and nothing heavy at their top (a test holds them to it), so `kdedge --help` is
instant; torch comes in with the first command that needs it.
"""

import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence

import click

from kdedge import __version__
from kdedge.cli_common import Interrupted, note
from kdedge.cli_data import data
from kdedge.cli_deploy import bench, compare, export, report
from kdedge.cli_doctor import doctor
from kdedge.cli_predict import evaluate, predict
from kdedge.cli_recipes import models, recipes
from kdedge.cli_study import study
from kdedge.cli_train import train_recipe
from kdedge.cli_verdict import verdict
from kdedge.errors import KdedgeError
from kdedge_device.failures import Failure

__all__ = ["cli", "main", "run"]

INTERRUPTED = 130
BROKEN_PIPE = 1  # click's own choice, where it notices first
_USER_CAN_FIX = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class _InOrder(click.Group):
    """Lists the commands as they are used, one after the other, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: kdedge train-recipe mobilenet, then: kdedge export --int8",
)
@click.version_option(__version__, prog_name="kdedge")
def cli() -> None:
    """From a folder of photos, a handful labelled, to a verified INT8 model and its measured latency."""


for command in (
    train_recipe,
    export,
    bench,
    report,
    compare,
    verdict,
    study,
    predict,
    evaluate,
    recipes,
    models,
    data,
    doctor,
):
    cli.add_command(command)


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Carry out one command; its exit code: 0 done, 1 a budget failed or a bug, 2 the user can fix it, 130 Ctrl-C."""
    flags = set(arguments[: list(arguments).index("--")] if "--" in arguments else arguments)
    try:
        status = cli.main(args=list(arguments), prog_name="kdedge", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        # `kdedge recipes list | head`: the reader has gone. Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        if "--debug" in flags:
            traceback.print_exc()
        message, code = _explain(error)
        note(message)
        if "--json" in flags:
            print(json.dumps({"error": message, "exit_code": code}, ensure_ascii=False))
        return code


def _explain(error: BaseException) -> tuple[str, int]:
    """What to tell the user, and the exit code."""
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "kdedge"
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            return error.format_message(), 2
        return f"{error.format_message()}\nTry: {where} --help", 2
    if isinstance(error, click.ClickException):
        return error.format_message(), 2
    if isinstance(error, Interrupted):
        return str(error), INTERRUPTED
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "Stopped by Ctrl-C. Nothing was left half-written; the same command starts over.", INTERRUPTED
    if isinstance(error, KdedgeError):
        return str(error), error.exit_code
    if isinstance(error, Failure):  # the device layer's own tree; its finer codes are those of run.pyz
        return str(error), min(error.exit_code, 2)
    if isinstance(error, OSError) and error.errno in _USER_CAN_FIX:
        what = error.filename or "a file of this command"
        return f"{error.strerror}: {what}. Free some space or choose another folder.", 2
    return (
        f"{type(error).__name__}: {error}\n"
        "This is our bug, not yours. The same command with --debug shows the traceback; please report it with that.",
        1,
    )
