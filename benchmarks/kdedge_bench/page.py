"""The report: one self-contained HTML page of one or several runs. No scripts, no fonts, nothing fetched."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kdedge.errors import RunError
from kdedge.runs import Run, write_bytes
from kdedge_bench import charts, formats
from kdedge_bench.facts import read_facts
from kdedge_bench.pages import environment
from kdedge_bench.pareto import Field, latency_fields, pareto_table, size_fields
from kdedge_bench.pareto_chart import LATENCY, SIZE, Cost, Plot, plot
from kdedge_bench.pictures import Load, opening
from kdedge_bench.report_chapter import Chapter, chapter
from kdedge_bench.report_files import write_tables
from kdedge_bench.report_tables import Table

__all__ = ["report"]


def report(
    runs: Sequence[Run | Path], out: Path | None = None, *, tables: Path | None = None, load: Load | None = None
) -> Path:
    """Write the page of `runs` and return its path: `out`, else report.html in the folder of the only run.

    `tables` is a folder for the same numbers as report.json, report.md and a CSV file a table. What a run lacks is told
    in one line where it would stand. RunError where a folder is no run, a file in it is damaged, or something cannot be
    written. `load` replaces how test images are opened.
    """
    named = [run if isinstance(run, Run) else Run(run) for run in runs]
    folders = list({run.path.resolve(): run for run in named}.values())  # one that is named twice is told once
    if not folders:
        raise RunError("No run was named; a report needs at least one. Make one with: kdedge train-recipe mobilenet")
    target = out or (folders[0].report_path if len(folders) == 1 else Path("report.html"))
    facts = [read_facts(run) for run in folders]
    names = _names(folders)
    load = load or opening()
    chapters = [
        chapter(each, name, f"run{index}", load) for index, (each, name) in enumerate(zip(facts, names, strict=True), 1)
    ]
    numbers = _pareto(chapters)
    page = _render(chapters, numbers).encode("utf-8")
    if tables is not None:  # first: where that folder cannot be written, there is no page either
        write_tables(tables, chapters, numbers)
    write_bytes(target, page)
    return target


def _names(runs: Sequence[Run]) -> list[str]:
    """What each is called: its folder, with as many of those above as tell it from the others."""
    parts = [run.path.resolve().parts for run in runs]
    depth = 1
    while len({each[-depth:] for each in parts}) < len(parts):
        depth += 1
    often = Counter(each[-1] for each in parts)
    return [each[-1] if often[each[-1]] == 1 else "/".join(each[-depth:]) for each in parts]


def _render(chapters: Sequence[Chapter], numbers: Table) -> str:
    templates = environment()
    templates.filters.update(percent=formats.percent, confidence=formats.confidence, count=formats.count)
    one = len(chapters) == 1
    return templates.get_template("report.html.j2").render(
        title=f"kdedge report: {chapters[0].name}" if one else f"kdedge report: {len(chapters)} runs",
        chapters=chapters,
        max_named=charts.MAX_NAMED,
        several=not one,
        overview=[] if one else _overview(chapters),
        pareto=numbers,
    )


def _fields_of(chapters: Sequence[Chapter]) -> list[tuple[Cost, Field]]:
    runs = [(each.facts, each.summary) for each in chapters]
    return [(LATENCY, field) for field in latency_fields(runs)] + [(SIZE, field) for field in size_fields(runs)]


def _overview(chapters: Sequence[Chapter]) -> list[Plot]:
    """All files of all runs that can be compared, in one chart each."""
    return [plot(field, cost) for cost, field in _fields_of(chapters)]


def _pareto(chapters: Sequence[Chapter]) -> Table:
    return pareto_table([(cost.name, field) for cost, field in _fields_of(chapters)])
