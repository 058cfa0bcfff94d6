"""Every command of every README runs (training at tiny size), or says what it needs and has its flags checked."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from kdedge.cli import cli
from kdedge_bench import seeds
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a reader works: with a few photographs, all and partly labelled, as the READMEs name them."""
    rng = np.random.default_rng(0)

    def picture(path: Path, tone: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 60, (40, 48, 3)) + tone
        Image.fromarray(noise.astype(np.uint8)).save(path)

    for tone, name in ((0, "daisy"), (90, "rose"), (190, "tulip")):
        for i in range(24):
            picture(tmp_path / "photos" / name / f"{i}.png", tone)
        for i in range(8):
            picture(tmp_path / "garden" / "labeled" / name / f"{i}.png", tone)
            picture(tmp_path / "garden" / "test" / name / f"{i}.png", tone)
            picture(tmp_path / "garden" / "unlabeled" / f"{name}{i}.png", tone)
    picture(tmp_path / "photo.jpg", 90)
    programs(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has who comes from the first page: `runs`, with one finished run."""
    folder = tmp_path_factory.mktemp("trained")
    subprocess.run(
        [sys.executable, "-m", "kdedge", "train-recipe", "tiny"], cwd=folder, check=True, capture_output=True
    )
    return folder / "runs"


@pytest.mark.parametrize("readme", RUN_HERE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_runs(readme: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    wanted = [command for fence in fences(readme) if not fence.needs for command in commands(fence)]
    if wanted and not any("train-recipe" in command or command.startswith("make") for command in wanted):
        shutil.copytree(request.getfixturevalue("trained"), folder / "runs")
    environment = os.environ | {"PATH": f"{folder / '.bin'}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "2"}
    for fence in fences(readme):
        if fence.needs or fence.language not in {"console", "python"}:
            continue
        lines = [fence.body] if fence.language == "python" else [tiny(command) for command in commands(fence)]
        for line in lines:
            if line.split()[0] in LEFT_TO_OTHERS:
                continue
            program = [sys.executable, "-c", line] if fence.language == "python" else ["sh", "-c", line]
            done = subprocess.run(
                program,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{fence.name}: {line}\n{done.stdout}{done.stderr}"


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
