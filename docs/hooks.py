"""What mkdocs does to our pages beside the usual: equations become MathML, a fence says what it needs, all such fences
are listed, and the keys of recipes are taken from the code that reads them.

Browsers draw MathML themselves, so that no script has to come from anywhere.
"""

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parent))

from recipe_keys import tables

__all__ = ["on_page_content", "on_page_markdown"]

_NEEDED = {
    "board": "a board",
    "gpu": "a GPU",
    "network": "a network",
    "many-processes": "several processes",
    "desktop": "a desktop",
    "minutes": "minutes",
}
PAGES = Path(__file__).parent / "pages"
_FENCE = re.compile(r"^```console((?: needs:[a-z-]+)+)$", re.MULTILINE)
_MARKED = re.compile(r"^```console((?: needs:[a-z-]+)+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_EQUATION = re.compile(r"\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\]", re.DOTALL)
_MATH = re.compile(r"<(?P<tag>span|div) class=\"arithmatex\">(?P<text>.*?)</(?P=tag)>", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A fence such as `console needs:gpu` gets a sentence before it, since no test runs it; marks become tables."""

    def told(match: re.Match[str]) -> str:
        return f"*Needs {_wanted(match[1])}; no test of ours runs it.*\n\n```console"

    text = _FENCE.sub(told, markdown)
    for mark, made in (("<!-- every key -->", tables), ("<!-- every command that no test runs -->", not_run)):
        if mark in text:
            text = text.replace(mark, made())
    return text


def _wanted(marks: str) -> str:
    return " and ".join(_NEEDED[word.removeprefix("needs:")] for word in marks.split())


def not_run() -> str:
    """Markdown: every command of these pages that is marked as needing something, with its page, and their number."""
    rows = []
    for path in sorted(PAGES.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        title = text.partition("\n")[0].removeprefix("# ")
        for marks, body in _MARKED.findall(text):
            commands = [line[2:] for line in body.replace("\\\n", " ").splitlines() if line.startswith("$ ")]
            link = f"[{title}]({path.relative_to(PAGES).as_posix()})"
            rows += [f"| {link} | {_wanted(marks)} | <code>{html.escape(each)}</code> |" for each in commands]
    return "\n".join([f"They are {len(rows)}:", "", "| page | needs | command |", "| --- | --- | --- |", *rows])


def on_page_content(content: str, **_: Any) -> str:
    """pymdownx.arithmatex marks the equations; here they are converted."""

    def drawn(match: re.Match[str]) -> str:
        found = _EQUATION.search(html.unescape(match["text"]))
        if found is None:
            raise ValueError(f"{match[0]} holds no equation")
        if found["inline"] is not None:
            return convert(found["inline"])
        return convert(found["block"].strip(), display="block")

    return _MATH.sub(drawn, content)
