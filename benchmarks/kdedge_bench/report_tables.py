"""Tables of the report: raw values once, from which the page, CSV, JSON and Markdown are all written."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kdedge_bench.cells import csv_cell, escaped
from kdedge_bench.formats import DASH

__all__ = ["Column", "Table", "as_csv", "as_markdown", "words"]


def words(value: object) -> str:
    """A value that is words already, or a number that is a name; a dash for what is not known."""
    return DASH if value is None or value == "" else str(value)


class Column(NamedTuple):
    """`show` makes the cell's text of the values of a row under `keys`, in this order."""

    heading: str
    keys: tuple[str, ...]
    show: Callable[..., str] = words
    text: bool = False  # words, which stand on the left


@dataclass(frozen=True)
class Table:
    """`rows` hold numbers as measured, with their units in the names; None is not measured, or does not apply.

    A row may hold more than its columns show; CSV and JSON have it all.
    """

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]

    def texts(self) -> list[tuple[str, ...]]:
        """The cells as a reader wants them, one tuple a row."""
        return [tuple(column.show(*(row[key] for key in column.keys)) for column in self.columns) for row in self.rows]

    def __bool__(self) -> bool:
        return bool(self.rows)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Full numbers, empty where there is none; `csv_cell` says how texts and lists stand."""
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(keys)
    writer.writerows([csv_cell(row.get(key)) for key in keys] for row in rows)
    return text.getvalue()


def as_markdown(table: Table) -> str:
    """A pipe table of the texts; numbers stand on the right."""
    heads = [escaped(column.heading) for column in table.columns]
    rule = ["---" if column.text else "--:" for column in table.columns]
    lines = [heads, rule, *([escaped(text) for text in texts] for texts in table.texts())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
