"""The tutorial as a notebook: `python docs/notebook.py` writes docs/tutorial.ipynb from pages/tutorial.md.

One source for both, so that they cannot differ; a test holds the file to it and runs every cell.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

__all__ = ["NOTEBOOK", "PAGE", "notebook"]

PAGE = Path(__file__).parent / "pages" / "tutorial.md"
NOTEBOOK = Path(__file__).parent / "tutorial.ipynb"

_FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def notebook(page: str) -> dict[str, Any]:
    """Cells in the order of `page`. A fence that needs what the reader may not have stays text."""
    cells, at = [], 0
    for match in _FENCE.finditer(page):
        if match["info"] not in {"python", "console"}:
            continue
        cells.append(_cell("markdown", page[at : match.start()], len(cells)))
        code = match["body"]
        if match["info"] == "console":  # %%sh, unlike !, fails where a command does
            commands = [line.removeprefix("$ ") for line in code.splitlines(keepends=True)]
            code = "%%sh\n" + "".join(commands)
        cells.append(_cell("code", code, len(cells)))
        at = match.end()
    cells.append(_cell("markdown", page[at:], len(cells)))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _cell(kind: str, text: str, number: int) -> dict[str, Any]:
    # Links of the page lead to pages beside it; from here those are a folder away.
    text = re.sub(r"\]\((?=[\w/-]+\.md)", "](pages/", text.strip()) if kind == "markdown" else text.strip()
    cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def _main() -> None:
    NOTEBOOK.write_text(json.dumps(notebook(PAGE.read_text()), indent=1, ensure_ascii=False) + "\n")
    print(f"Wrote {NOTEBOOK}.", file=sys.stderr)


if __name__ == "__main__":
    _main()
