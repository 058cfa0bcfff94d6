"""The documentation site builds with warnings as errors, names every command, and fetches nothing from elsewhere.

Its commands are run by test_readmes, as those of every other page.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import click
import pytest

from kdedge.cli import cli
from tests.house.readmes import commands as fenced
from tests.house.readmes import fences, programs, tiny

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "pages"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml", "-d", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def html(site: Path) -> dict[str, str]:
    return {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}


def test_every_page_is_built_and_can_be_reached(site: Path) -> None:
    pages = {path.relative_to(PAGES).with_suffix(".html").as_posix() for path in PAGES.rglob("*.md")}
    assert pages <= html(site).keys()
    navigation = (ROOT / "docs" / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert {path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md")} == {
        *re.findall(r"[\w/-]+\.md", navigation)
    }


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    fetched = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=\"(?:https?:)?//|<link[^>]*stylesheet[^>]*(?:https?:)?//")
    assert [name for name, page in html(site).items() if fetched.search(page)] == []


def test_equations_are_drawn(site: Path) -> None:
    pages = html(site)
    assert any("<math" in page for page in pages.values())
    assert [name for name, page in pages.items() if "arithmatex" in page or "<merror" in page] == []
    drawn = [(name, math) for name, page in pages.items() for math in re.findall(r"<math.*?</math>", page, re.DOTALL)]
    assert [(name, math) for name, math in drawn if "\\" in math] == []  # a command that the converter does not know


def test_no_page_shows_what_python_calls_its_own_things(site: Path) -> None:
    inner = re.compile(r"Sentinel\.|object at 0x|&lt;(?:class|function) ")
    assert [name for name, page in html(site).items() if inner.search(page)] == []
    assert "[default: local]" in html(site)["reference/commands.html"]


def test_what_no_test_runs_is_listed(site: Path) -> None:
    marked = [fence for path in PAGES.rglob("*.md") for fence in fences(path) if fence.needs]
    expected = sorted(command for fence in marked for command in fenced(fence))
    listed = html(site)["limits.html"]
    found = [unescape(text) for text in re.findall(r"<td><code>(.*?)</code></td>", listed)]
    assert sorted(found) == expected
    assert f"They are {len(expected)}:" in listed


def commands(group: click.Group, before: str) -> Iterator[str]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, f"{before} {name}")
        elif command is not None and not command.hidden:
            yield f"{before} {name}"


def test_every_command_is_in_the_reference(site: Path) -> None:
    found = set(re.findall(r"<h\d id=\"([\w-]+)\"", html(site)["reference/commands.html"]))
    assert [name for name in commands(cli, "kdedge") if name.replace(" ", "-") not in found] == []


def made_notebook() -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("docs_notebook", ROOT / "docs" / "notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    document: dict[str, Any] = module.notebook((PAGES / "tutorial.md").read_text())
    return document


def test_the_notebook_is_the_tutorial() -> None:
    found = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    assert found == made_notebook(), "run: python docs/notebook.py"


def test_the_notebook_runs(tmp_path: Path) -> None:
    # At tiny size; test_readmes leaves the tutorial to this.
    document, commands = made_notebook(), 0
    for cell in document["cells"]:
        if cell["cell_type"] == "code" and cell["source"][0] == "%%sh\n":
            lines = [tiny(line.rstrip("\n")) for line in cell["source"][1:]]
            cell["source"] = "\n".join(["%%sh", "set -e", *lines])
            commands += len(lines)
    assert commands == 13
    environment = os.environ | {"PATH": f"{programs(tmp_path)}{os.pathsep}{os.environ['PATH']}"}
    path = tmp_path / "tutorial.ipynb"
    path.write_text(json.dumps(document))
    done = subprocess.run(
        [sys.executable, "-m", "jupyter", "execute", "--inplace", path.name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(path.read_text())["cells"]
    printed = "".join(str(output.get("text", "")) for cell in told for output in cell.get("outputs", ()))
    assert "runs/tiny-images-40-s0" in printed
    assert (tmp_path / "runs" / "tiny-images-40-s0" / "report.html").is_file()
