"""Fenced commands of a README, read and run as a reader would: from top to bottom, in one folder."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LANGUAGES", "Fence", "commands", "fences", "links", "programs", "tiny"]

ROOT = Path(__file__).resolve().parents[2]

LANGUAGES = {"console", "text", "yaml", "json", "python"}
"""What a fence may be. Commands are `console`; their output, if shown, is `text`."""

NEEDS = {"board", "gpu", "network", "many-processes", "desktop", "minutes"}
"""What a fence may say it needs, instead of being run."""

_FEW = " --set teacher.optim.total_steps=20 --set student.optim.total_steps=10 --set baseline.optim.total_steps=5"
_FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=ticks)\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(
    r"!?\[[^\]]*\]\(\s*<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)|<(?:img|a)\s[^>]*?(?:src|href)=\"([^\"]+)\""
)


@dataclass(frozen=True)
class Fence:
    file: Path
    line: int
    language: str
    needs: frozenset[str]
    body: str

    @property
    def name(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def fences(file: Path) -> Iterator[Fence]:
    text = file.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        language, *marks = match["info"].split() or [""]
        needs = frozenset(mark.removeprefix("needs:") for mark in marks if mark.startswith("needs:"))
        yield Fence(file, text[: match.start()].count("\n") + 1, language, needs, match["body"])


def commands(fence: Fence) -> list[str]:
    """The lines after `$ `, a trailing backslash joining the next one."""
    joined = fence.body.replace("\\\n", " ")
    return [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]


def tiny(command: str) -> str:
    """The same command at tiny size: the recipe `tiny` for every other one, fewer steps yet, and the quick effort."""
    command = command.replace("runs/mobilenet-", "runs/tiny-")
    if command.startswith("kdedge recipes copy"):  # trained further down
        return re.sub(r"^(kdedge recipes copy) \S+", r"\1 tiny", command)
    if command.startswith("kdedge train-recipe"):
        return re.sub(r"^(kdedge train-recipe) (?!-)(?!\S*\.yaml)\S+", r"\1 tiny", command) + _FEW
    if command.startswith("python -m kdedge_bench.seeds"):
        shrunk = re.sub(r"--seeds( \d+)+", "--seeds 0", re.sub(r"--recipe \S+", "--recipe tiny", command))
        return shrunk + _FEW + " --max-drop 100"  # a tiny student would have its layers weighed one by one
    if command.startswith("kdedge verdict"):
        shrunk = re.sub(r"--seeds \d+", "--seeds 1", re.sub(r"^(kdedge verdict) \S+", r"\1 tiny", command))
        return shrunk + _FEW + " --rows kd-fixmatch,fixmatch"
    if command.startswith("kdedge bench"):
        return re.sub(r" --effort \S+", "", command) + " --effort quick"
    if command.startswith("kdedge export"):  # the same
        command += " --max-drop 100" + (" --set qat.total_steps=20" if "--qat" in command else "")
    return command


def links(file: Path) -> list[str]:
    """Targets of links and pictures, outside fences and inline code."""
    text = _FENCE.sub("", file.read_text(encoding="utf-8"))
    text = re.sub(r"`[^`\n]*`(?!\])", "", text)
    return [match[1] or match[2] for match in _LINK.finditer(text)]


def programs(folder: Path) -> Path:
    """A folder for PATH in `folder`, with the kdedge and the python of these tests."""
    found = folder / ".bin"
    found.mkdir()
    for name, call in (("kdedge", "-m kdedge"), ("python", "")):
        (found / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n')
        (found / name).chmod(0o755)
    return found
