"""A SimCLR study as one self-contained HTML page: answers, figures, every table. No scripts, nothing fetched."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from kdedge_bench import study_charts
from kdedge_bench.pages import environment
from kdedge_bench.study_text import answers, made, state, tables, title

__all__ = ["page"]


class Figure(NamedTuple):
    svg: str
    caption: str


def page(document: Mapping[str, Any]) -> str:
    """The page of study.json, of a study that is not complete too."""
    return (
        environment()
        .get_template("study.html.j2")
        .render(
            title=title(document),
            state=state(document),
            answers=[said.split("**") for said in answers(document)],
            figures=_figures(document),
            tables=tables(document),
            rules=[(name, found["rule"]) for name, found in document["hypotheses"].items()],
            made=made(document),
            command=document["command"],
        )
    )


def _figures(document: Mapping[str, Any]) -> list[Figure]:
    """Those that have something to show."""
    bars = "Bars are 95 % intervals over seeds (Student's t)."
    drawn = (
        (study_charts.fine_tuning(document, "labels"), f"Test accuracy against the number of labels. {bars}"),
        (
            study_charts.transfer_gain(document, "classes"),
            f"What pre-training on another set gives over scratch, with as many labels a class. {bars}",
        ),
        (study_charts.students(document, "students"), f"The students, by who taught them. {bars}"),
    )
    return [Figure(svg, caption) for svg, caption in drawn if svg is not None]
