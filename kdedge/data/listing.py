"""A CSV with the columns path,label[,split]."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from kdedge.data.entries import Entry, build_source
from kdedge.data.source import PARTS, Source
from kdedge.data.words import first_few
from kdedge.errors import DataError, did_you_mean

__all__ = ["open_csv"]


def open_csv(path: Path, spec: str, max_unreadable_fraction: float) -> Source:
    """Images named in `path`, relative to its folder or absolute; an empty label means unlabeled.

    `split` is train (also when empty), unlabeled, val or test. DataError lists every bad line.
    """
    entries: list[Entry] = []
    problems: list[str] = []
    lines: dict[str, int] = {}
    for number, row in _rows(path):
        entry = _entry(path.parent, row)
        if isinstance(entry, str):
            problems.append(f"line {number}: {entry}")
        elif entry.id in lines:
            problems.append(f"line {number}: {entry.id} is there already, in line {lines[entry.id]}")
        else:
            lines[entry.id] = number
            entries.append(entry)
    if problems:
        raise DataError(f"{path} has {len(problems)} bad lines: {first_few(problems, 5)}. Correct them and try again.")
    if not entries:
        raise DataError(f"{path} has a header but no images. Expected lines such as: images/0001.jpg,daisy")
    return build_source(path.stem.replace(" ", "-"), spec, entries, max_unreadable_fraction)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row by lower-case column name); DataError where the header is not ours."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark in front
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}). Save it as CSV with UTF-8 encoding.") from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Expected a CSV with columns path,label[,split]."
        ) from None
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
    try:
        columns = [name.strip().lower() for name in reader.fieldnames or []]
        if not {"path", "label"} <= set(columns):
            hint = " Separate columns with commas." if len(columns) == 1 and any(c in columns[0] for c in ";\t") else ""
            raise DataError(
                f"{path} has the columns {', '.join(columns) or '(none)'}; path,label or path,label,split was "
                f"expected in its first line.{hint}"
            )
        reader.fieldnames = columns
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}. Expected comma-separated values.") from None


def _entry(folder: Path, row: dict[str, str]) -> Entry | str:
    """The image of one row, or what is wrong with it."""
    if None in row:
        return "it has more fields than the header (a path or label with a comma needs quotes)"
    name, label, split = (row.get(column, "").strip() for column in ("path", "label", "split"))
    if not name:
        return "its path is empty"
    if "\0" in name + label:
        return "its path or label holds a zero byte"
    if split and split not in PARTS:
        return f"split '{split}' is none of {', '.join(PARTS)}.{did_you_mean(split, PARTS)}"
    if split in ("val", "test") and not label:
        return f"split {split} needs a label"
    if split == "unlabeled" or not label:
        return Entry(_normal(name), folder / name, None, "unlabeled")
    return Entry(_normal(name), folder / name, label, split or "train")


def _normal(name: str) -> str:
    """One spelling for a path: ./a.jpg is a.jpg."""
    return PurePosixPath(name).as_posix()
