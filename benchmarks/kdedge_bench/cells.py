"""Texts of tables as they stand, whatever they hold: a class or a folder may be called *a|b* or =1+1."""

import re
from typing import Any

__all__ = ["csv_cell", "escaped"]


def escaped(text: str) -> str:
    """In Markdown, on one line; no tag, link or other cell comes of it."""
    return re.sub(r"([\\|*_`\[\]<>#])", r"\\\1", " ".join(text.split("\n")))


def csv_cell(value: Any) -> Any:
    """A number as it is, a list with semicolons between its items, and no text that a spreadsheet takes for a formula.

    Such a text gets an apostrophe before it, which spreadsheets take for "as text".
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    text = ";".join(map(str, value)) if isinstance(value, list | tuple) else value
    return f"'{text}" if isinstance(text, str) and text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
