"""What mkdocs does to our pages beside the usual: equations become MathML, a fence says what it needs, and the keys of
recipes are listed from the code that reads them.

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
_FENCE = re.compile(r"^```console((?: needs:[a-z-]+)+)$", re.MULTILINE)
_EQUATION = re.compile(r"\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\]", re.DOTALL)
_MATH = re.compile(r"<(?P<tag>span|div) class=\"arithmatex\">(?P<text>.*?)</(?P=tag)>", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A fence such as `console needs:gpu` gets a sentence before it, since no test runs it; recipes get their keys."""

    def told(match: re.Match[str]) -> str:
        needs = " and ".join(_NEEDED.get(word.removeprefix("needs:"), word) for word in match[1].split())
        return f"*Needs {needs}; no test of ours runs it.*\n\n```console"

    return _FENCE.sub(told, markdown).replace(
        "<!-- every key -->", tables() if "<!-- every key -->" in markdown else ""
    )


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
