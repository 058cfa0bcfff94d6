"""Help is instant, because it imports click and our own thin modules alone (after click's tests/test_imports.py)."""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from kdedge.cli import cli

ALLOWED = {"click", "kdedge", "kdedge_device"}
OURS = ("kdedge.cli", "kdedge.errors", "kdedge_device.failures")
CHILD = """
import json, sys
before = set(sys.modules)
from kdedge.cli import run
status = run(sys.argv[1:])
sys.stderr.write(json.dumps([status, sorted(set(sys.modules) - before)]))
"""


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))


EVERY = list(commands(cli))


def test_the_commands_are_those_of_the_contract() -> None:
    words = {" ".join(path) for path in EVERY if path}
    assert words == {
        "train-recipe", "export", "bench", "report", "compare", "verdict", "predict", "eval", "models", "doctor",
        "study", "study simclr", "recipes", "recipes list", "recipes show", "recipes copy", "recipes validate",
        "data", "data check", "data pack",
    }  # fmt: skip


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_help_imports_only_what_is_allowed(path: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, *path, "--help"], capture_output=True, text=True, check=True)
    status, imported = json.loads(done.stderr)
    assert status == 0
    assert done.stdout.startswith(f"Usage: {' '.join(['kdedge', *path])} ")
    assert {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) <= ALLOWED
    ours = {name for name in imported if name.startswith("kdedge") and name not in {"kdedge", "kdedge_device"}}
    assert {name for name in ours if not name.startswith(OURS)} == set()


@pytest.mark.parametrize("path", [path for path in EVERY if path], ids=" ".join)
def test_every_command_says_what_it_does_and_takes_json(path: tuple[str, ...]) -> None:
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    assert command.get_short_help_str(60).endswith(".")
    if not isinstance(command, click.Group):
        assert {"as_json", "debug"} <= {option.name for option in command.params}


def test_help_takes_less_than_a_third_of_a_second() -> None:
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "kdedge", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Processor time, and the best of five: the machine may be busy with something else.
    assert min(cpu_seconds() for _ in range(5)) < 0.3
