"""Commands within sentences, `kdedge export --int8`: not run, but each is there and has these flags."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kdedge.cli import cli
from kdedge_device.__main__ import _parser as device
from tests.house.readmes import ROOT

_FENCE = re.compile(r"^```.*?^```\s*$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"(?<!`)`(?:python )?(kdedge|run\.pyz) ([a-z][^`]*)`(?!`)")


def inline(page: Path) -> Iterator[tuple[str, str]]:
    """("kdedge" or "run.pyz", its arguments) of each command that stands in a sentence."""
    for match in _COMMAND.finditer(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        yield match[1], " ".join(match[2].split())


PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "runs", "site", ".pytest_cache"} & set(path.relative_to(ROOT).parts)
)
TOLD = sorted({(program, command) for path in PAGES for program, command in inline(path)})


def test_they_are_found() -> None:
    assert {program for program, _ in TOLD} == {"kdedge", "run.pyz"}
    assert any("--calibrate" in command for _, command in TOLD), "docs/pages/how-to/own-model.md"


@pytest.mark.parametrize("command", [command for program, command in TOLD if program == "kdedge"])
def test_kdedge_has_them(command: str) -> None:
    words = shlex.split(command)
    found: click.Command = cli
    while isinstance(found, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        chosen = found.get_command(click.Context(found), name)
        assert chosen is not None, f"kdedge has no '{name}'"
        found = chosen
    known = {option for each in found.params for option in (*each.opts, *each.secondary_opts)} | {"--help"}
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("command", [command for program, command in TOLD if program == "run.pyz"])
def test_run_pyz_has_them(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *words = shlex.split(command)
    with pytest.raises(SystemExit):
        device().parse_args([name, "--help"])
    help_text = capsys.readouterr().out
    assert help_text, f"run.pyz has no '{name}'"
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", help_text))


def test_what_is_a_command(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    fence = "```console\n$ kdedge `no`\n```"
    page.write_text(f"Ask `kdedge bench\n--suite quick`.\n{fence}\nOr `python run.pyz info`.\n")
    assert list(inline(page)) == [("kdedge", "bench --suite quick"), ("run.pyz", "info")]
