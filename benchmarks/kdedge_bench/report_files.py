"""The numbers of a report as files: report.json, report.md, and a CSV file for each table, all runs together."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdedge import __version__
from kdedge.errors import RunError
from kdedge.runs import read_json, write_bytes
from kdedge_bench.cells import escaped
from kdedge_bench.report_chapter import Chapter
from kdedge_bench.report_tables import Table, as_csv, as_markdown

__all__ = ["SCHEMA", "as_document", "write_tables"]

SCHEMA = 1


def as_document(chapters: Sequence[Chapter], pareto: Table) -> dict[str, Any]:
    """What report.json holds: of each run its sentences and every table as rows; and the points of the charts."""
    return {
        "schema": SCHEMA,
        "kdedge": __version__,
        "runs": [
            {
                "run": chapter.name,
                "headline": chapter.headline,
                "decision": chapter.decision,
                "notes": chapter.notes,
                "alarms": chapter.alarms,
                "missing": chapter.gaps,
                "tables": {key: list(table.rows) for key, table in chapter.tables.items()},
            }
            for chapter in chapters
        ],
        pareto.key: list(pareto.rows),
    }


def write_tables(folder: Path, chapters: Sequence[Chapter], pareto: Table) -> list[Path]:
    """Write them, and return their paths. RunError where one fails.

    A table that no run has anything for is no file, and one that an earlier report left there is removed.
    """
    text = {
        "report.json": json.dumps(as_document(chapters, pareto), indent=1, ensure_ascii=False) + "\n",
        "report.md": _markdown(chapters, pareto),
    }
    for key, rows in _rows(chapters).items():
        text[f"{key}.csv"] = as_csv(rows)
    if pareto:
        text[f"{pareto.key}.csv"] = as_csv(pareto.rows)
    for name in _of_before(folder) - text.keys():
        (folder / name).unlink(missing_ok=True)
    for name, content in text.items():
        write_bytes(folder / name, content.encode("utf-8"))
    return [folder / name for name in text]


def _of_before(folder: Path) -> set[str]:
    """The CSV files that the report.json which lies there tells of."""
    try:
        runs = read_json(folder / "report.json")["runs"]
        return {f"{key}.csv" for run in runs for key in run["tables"] if re.fullmatch(r"[a-z0-9_]+", key)} | {
            "pareto.csv"
        }
    except (RunError, OSError, LookupError, TypeError):
        return set()


def _rows(chapters: Sequence[Chapter]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for chapter in chapters:
        for key, table in chapter.tables.items():
            if table:
                found.setdefault(key, []).extend({"run": chapter.name, **row} for row in table.rows)
    return found


def _markdown(chapters: Sequence[Chapter], pareto: Table) -> str:
    parts = ["# kdedge report"]
    if pareto:
        parts += [f"## {pareto.title}", as_markdown(pareto)]
    for chapter in chapters:
        parts += [f"## {escaped(chapter.name)}", escaped(chapter.headline)]
        parts += [f"**Alarm.** {escaped(sentence)}" for sentence in chapter.alarms]
        for table in filter(None, chapter.tables.values()):
            parts += [f"### {escaped(table.title)}", as_markdown(table)]
            if table.key == "networks":
                said = filter(None, [" ".join(chapter.notes), chapter.decision, *chapter.gaps])
                parts += map(escaped, said)
    return "\n\n".join(parts) + "\n"
