"""The figures of a SimCLR study: each an <svg> element, or None where no run of it is finished."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdedge_bench.study_rows import DISTILLATION, FINE_TUNING, FIRST_LAYER, LINEAR, SCRATCH, TRANSFER, TUNED
from kdedge_bench.study_text import TEACHERS, WAY_TITLES
from kdedge_bench.svg import MUTED, drawing, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["fine_tuning", "students", "transfer_gain"]

# Okabe and Ito's, as in the report.
BLUE = "#0072B2"
COLOURS = {LINEAR: BLUE, TUNED: "#009E73", FIRST_LAYER: "#D55E00", SCRATCH: "#8a949e"}
MARKS = {LINEAR: "o", TUNED: "^", FIRST_LAYER: "s", SCRATCH: "D"}

Point = tuple[float, Mapping[str, Any]]  # place, mean and half width


def fine_tuning(document: Mapping[str, Any], key: str) -> str | None:
    """Test accuracy against the number of labels, a line for each way."""
    entries, rows = document["analyses"].get(FINE_TUNING) or [], document["rows"]
    lines = {
        way: [(e["labels"], found) for e in entries if (found := rows[e["rows"][way]]["test_accuracy"])]
        for way in WAY_TITLES
    }
    title = "Test accuracy against the number of labels"
    return _lines(lines, key, title, "Labels", "Right, %", [entry["labels"] for entry in entries])


def transfer_gain(document: Mapping[str, Any], key: str) -> str | None:
    """What pre-training gives over scratch, against the number of classes."""
    analysis = document["analyses"].get(TRANSFER) or {"subsets": []}
    entries = analysis["subsets"]
    lines = {
        way: [(entry["classes"], entry["gains"][way]) for entry in entries if entry["gains"][way]["differences"]]
        for way in (LINEAR, TUNED)
    }
    title = "Gain over scratch against the number of classes"
    places = [entry["classes"] for entry in entries]
    return _lines(lines, key, title, "Classes", "Minus from scratch, points", places, zero=True)


def students(document: Mapping[str, Any], key: str) -> str | None:
    """Each student's test accuracy with its interval, one below the other."""
    analysis = document["analyses"].get(DISTILLATION)
    named: Mapping[str, str] = analysis["students"] if analysis else {}
    accuracies = {_student_name(said): document["rows"][row]["test_accuracy"] for said, row in named.items()}
    points = [(name, found) for name, found in accuracies.items() if found]
    if not points:
        return None
    title = "Test accuracy of the students"
    with drawing(height_in=0.8 + 0.26 * len(points)) as (figure, axes):
        for place, (_, found) in enumerate(points):
            half = 100 * (found["half_width_95"] or 0.0)
            axes.errorbar([100 * found["mean"]], [place], xerr=[half], fmt="o", color=BLUE, capsize=3, markersize=5)
        axes.set_yticks(range(len(points)), [name for name, _ in points])
        axes.set_ylim(len(points) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("Right, %")
        return to_svg(figure, key, title, f"{title}. {_told(points)}.")


def _student_name(said: str) -> str:
    """`same with labels` -> `same family, with labels`, short enough for an axis."""
    who, _, how = said.partition(" ")
    return f"{TEACHERS[who].partition(' (')[0]}, {how}" if who in TEACHERS else said


def _told(points: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    return "; ".join(f"{name}: {100 * found['mean']:.1f}" for name, found in points)


def _lines(
    lines: Mapping[str, Sequence[Point]],
    key: str,
    title: str,
    x_label: str,
    y_label: str,
    places: Sequence[float],
    zero: bool = False,
) -> str | None:
    """One line a way with 95 % bars, over a logarithmic axis that is marked where there are points."""
    if not any(lines.values()):
        return None
    with drawing() as (figure, axes):
        if zero:
            axes.axhline(0, color=MUTED, linewidth=1)
        for number, (way, points) in enumerate((way, points) for way, points in lines.items() if points):
            # A little apart, so that bars at one place do not hide each other.
            at = [place * 1.03 ** (number - 1) for place, _ in points]
            means = [100 * found["mean"] for _, found in points]
            halves = [100 * (found["half_width_95"] or 0.0) for _, found in points]
            axes.errorbar(
                at, means, yerr=halves, color=COLOURS[way], fmt=f"{MARKS[way]}-", capsize=3, markersize=5,
                label=WAY_TITLES[way],
            )  # fmt: skip
        _marked(axes, places)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.legend(loc="outside upper left", ncols=2)
        told = "; ".join(f"{WAY_TITLES[way]}: {_each(points)}" for way, points in lines.items() if points)
        return to_svg(figure, key, title, f"{title}. {told}.")


def _each(points: Sequence[Point]) -> str:
    return ", ".join(f"{100 * found['mean']:.1f} at {place:g}" for place, found in points)


def _marked(axes: "Axes", places: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xlim(min(places) / 1.3, max(places) * 1.3)
    axes.set_xticks(list(places), [f"{place:,g}" for place in places])
    axes.xaxis.set_minor_locator(NullLocator())
