"""Every command of every README runs (training at tiny size), or says what it needs and has its flags checked.

Pages begin alike, and a command is run once: where another page has it, in a folder with the same bytes, what it left
there is copied. What costs seconds of imports is forked from a process that has them; the journey of test_road and the
notebook of test_docs start the same commands as a reader does.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from kdedge.cli import cli
from kdedge_bench import seeds
from kdedge_bench.faults_process import start
from kdedge_device.__main__ import _parser as device
from tests.house.readmes import LANGUAGES, NEEDS, ROOT, Fence, commands, fences, links, programs, tiny

READMES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "runs", "site", ".pytest_cache"} & set(path.relative_to(ROOT).parts)
    and path.name != "CHANGELOG.md"
)
RUN_HERE = [path for path in READMES if path.name != "tutorial.md"]  # that one as a notebook: test_docs.py
FENCES = [fence for readme in READMES for fence in fences(readme)]
CONSOLE = [fence for fence in FENCES if fence.language == "console"]
NEEDING = [fence for fence in CONSOLE if fence.needs]
FORKED = ("kdedge train-recipe ", "kdedge export ")
LEFT_TO_OTHERS = {"make": "the Makefile's targets", "git": "git", "cd": "the shell"}


def test_the_readmes_are_found() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in READMES}
    assert names >= {"README.md", "CONTRIBUTING.md", "recipes/README.md", "export/README.md", "benchmarks/README.md"}


def test_every_fence_is_of_a_known_kind() -> None:
    assert [fence.name for fence in FENCES if fence.language not in LANGUAGES] == []
    assert [fence.name for fence in FENCES if fence.needs - NEEDS] == []
    assert [fence.name for fence in FENCES if fence.needs and fence.language != "console"] == []
    assert [fence.name for fence in CONSOLE if not commands(fence)] == []


def test_the_fences_that_are_not_run_are_counted() -> None:
    # A new one is a decision: it is not run by any test.
    counted = Counter(fence.name.partition(":")[0] for fence in NEEDING)
    assert counted == {
        "README.md": 2,
        "benchmarks/README.md": 1,
        "export/JETSON.md": 5,
        "docs/pages/how-to/engine-will-not-load.md": 1,
        "docs/pages/how-to/jetson.md": 1,
        "docs/pages/how-to/many-gpus.md": 2,
        "docs/pages/how-to/own-model.md": 1,
        "docs/pages/how-to/own-teacher.md": 1,
        "docs/pages/methods/kd-fixmatch.md": 1,
        "docs/pages/methods/latency.md": 2,
        "docs/pages/methods/simclr.md": 1,
        "docs/pages/tutorial.md": 1,
    }


@pytest.mark.parametrize("fence", CONSOLE, ids=lambda fence: fence.name)
def test_commands_and_flags_exist(fence: Fence) -> None:
    for command in commands(fence):
        words = shlex.split(command, comments=True)
        if words[0] == "kdedge":
            parse(words[1:])
        elif words[:3] == ["python", "-m", "kdedge_bench.seeds"]:
            options, extra = seeds.parser().parse_known_args(words[3:])
            parse(["train-recipe", options.recipe, *extra])
        elif any(word.endswith("run.pyz") for word in words):
            place = next(i for i, word in enumerate(words) if word.endswith("run.pyz"))
            device().parse_args(words[place + 1 :])
        elif words[0] == "make":
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(words[1:]) <= {*targets} | {word for word in words if "=" in word}, command


def parse(arguments: list[str]) -> None:
    """As click does before it calls the command; a usage error fails the test."""
    context = click.Context(cli, info_name="kdedge")
    command: click.Command = cli
    while isinstance(command, click.Group):
        name, found, arguments = command.resolve_command(context, arguments)
        assert found is not None
        command = found
        context = click.Context(command, info_name=name, parent=context)
    command.make_context(context.info_name, list(arguments), parent=context.parent)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reader's folder as commands left it, named by `before`."""
    return tmp_path_factory.mktemp("left")


def before(folder: Path, line: str) -> str:
    """A name for the command `line` in what `folder` holds."""
    digest = hashlib.sha256(line.encode())
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        digest.update(f"\n{path.relative_to(folder)}\n{content}".encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One path for every page, because runs may name it."""
    return tmp_path_factory.mktemp("reader") / "work"


@pytest.fixture
def folder(place: Path) -> Iterator[Path]:
    """Where a reader works: with a few photographs, all and partly labelled, as the READMEs name them."""
    place.mkdir()
    rng = np.random.default_rng(0)

    def picture(path: Path, tone: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 60, (40, 48, 3)) + tone
        Image.fromarray(noise.astype(np.uint8)).save(path)

    for tone, name in ((0, "daisy"), (90, "rose"), (190, "tulip")):
        for i in range(24):
            picture(place / "photos" / name / f"{i}.png", tone)
        for i in range(8):
            picture(place / "garden" / "labeled" / name / f"{i}.png", tone)
            picture(place / "garden" / "test" / name / f"{i}.png", tone)
            picture(place / "garden" / "unlabeled" / f"{name}{i}.png", tone)
    picture(place / "photo.jpg", 90)
    programs(place)
    yield place
    shutil.rmtree(place)


def lines(readme: Path) -> Iterator[tuple[Fence, str]]:
    """What is run of a page, with the fence it stands in: a command, or a whole fence of Python."""
    for fence in fences(readme):
        if fence.language == "python":
            yield fence, fence.body
        for command in commands(fence) if fence.language == "console" and not fence.needs else ():
            if command.split()[0] not in LEFT_TO_OTHERS:
                yield fence, tiny(command)


@pytest.mark.parametrize("readme", RUN_HERE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_runs(readme: Path, folder: Path, left: Path) -> None:
    wanted = list(lines(readme))
    if wanted and not any("train-recipe" in line for _, line in wanted):
        wanted.insert(0, (wanted[0][0], tiny("kdedge train-recipe mobilenet")))  # a reader comes from the first page
    for fence, line in wanted:
        after = left / before(folder, line)
        if after.exists():
            shutil.rmtree(folder)
            shutil.copytree(after, folder, symlinks=True)
            continue
        code, told = run(fence, line, folder)
        assert code == 0, f"{fence.name}: {line}\n{told}"
        shutil.copytree(folder, after, symlinks=True)


def run(fence: Fence, line: str, folder: Path) -> tuple[int | None, str]:
    """Its exit code, and what it said."""
    if line.startswith(FORKED):
        told = folder.parent / "told.txt"
        told.unlink(missing_ok=True)
        process = start(shlex.split(line, comments=True)[1:], folder, told)
        try:
            process.join()
        finally:
            process.kill()  # where the time of the test is over
        return process.exitcode, told.read_text()
    done = subprocess.run(
        [sys.executable, "-c", line] if fence.language == "python" else ["sh", "-c", line],
        cwd=folder,
        env=os.environ | {"PATH": f"{folder / '.bin'}{os.pathsep}{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_resolves(readme: Path) -> None:
    broken = []
    for target in links(readme):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (readme.parent / name) if name else readme
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def anchors(file: Path) -> set[str]:
    """Headings as their anchors: lower case, punctuation dropped, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
