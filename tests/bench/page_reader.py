"""A report as a reader finds it: its tables, images and text."""

from html.parser import HTMLParser
from pathlib import Path

__all__ = ["Page"]

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tables as lists of rows of texts, images, links, ids and the text of the whole body."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.images: list[dict[str, str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.title = ""
        self.text = ""
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.text.replace("\xa0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag == "img":
            self.images.append({key: value or "" for key, value in attrs})
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        if tag in ("dt", "dd", "li", "p", "span", "pre", "summary"):
            self.text += " "

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        if self.open[-1:] == ["title"] and "svg" not in self.open:
            self.title += data
        elif "svg" not in self.open:
            self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data.replace("\xa0", " ")

    def table(self, *headings: str) -> list[list[str]]:
        """The rows below the headings of the only table that begins with these headings."""
        (found,) = [table for table in self.tables if tuple(table[0][: len(headings)]) == headings]
        return found[1:]
