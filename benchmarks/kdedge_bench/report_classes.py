"""What INT8 does to each class: right answers before and after on the same test images, with the paired interval."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdedge_bench.facts import Facts
from kdedge_bench.formats import count, percent, shorten
from kdedge_bench.report_plot import WIDTH_PX, Scale, element, label, svg, x_axis
from kdedge_bench.report_tables import Column, Table
from kdedge_bench.stats import paired_difference

__all__ = ["change", "changes", "points"]

SHOWN = 24  # classes in the chart; the table has all
ROW_PX, TOP_PX, LEFT_PX = 17, 8, 132


def points(value: float | None) -> str:
    """-0.5 -> "−0.50", with the sign that a change has."""
    return "–" if value is None else f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _span(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{points(low)} to {points(high)}"


def changes(facts: Facts) -> Table:
    """A row a class, the greatest loss first; no rows where the run has not scored both files on known classes."""
    labels, before, after = facts.test_labels, facts.logits("fp32"), facts.logits("int8")
    rows: list[dict[str, Any]] = []
    if labels is not None and before is not None and after is not None and len(labels) == len(before) == len(after):
        was, now = before.argmax(1) == labels, after.argmax(1) == labels
        for index, name in enumerate(facts.classes):
            mine = labels == index
            if mine.any():
                rows.append({"class": name, "number": index} | _row(was[mine], now[mine]))
    rows.sort(key=lambda row: (row["change_points"], row["number"]))
    columns = (
        Column("Class", ("class",), text=True),
        Column("Test images", ("images",), count),
        Column("FP32 right", ("fp32_right_fraction",), percent),
        Column("INT8 right", ("int8_right_fraction",), percent),
        Column("Lost", ("lost_images",), count),
        Column("Won", ("won_images",), count),
        Column("Change, points", ("change_points",), points),
        Column("95 % interval", ("change_low_points", "change_high_points"), _span),
    )
    return Table("int8_classes", "What INT8 does to each class", columns, tuple(rows))


def _row(was: Any, now: Any) -> dict[str, Any]:
    found = paired_difference(was, now)
    return {
        "images": found.images,
        "fp32_right_fraction": float(np.mean(was)),
        "int8_right_fraction": float(np.mean(now)),
        "lost_images": found.only_base,
        "won_images": found.only_new,
        "change_points": 100 * found.difference,
        "change_low_points": 100 * found.low,
        "change_high_points": 100 * found.high,
    }


def change(table: Table) -> tuple[str, str] | None:
    """(<svg>, caption): a dot and its interval for each class; None without rows, or where no answer changed."""
    moved = [row for row in table.rows if row["lost_images"] or row["won_images"]]
    if not moved:
        return None
    rows = _extremes(table.rows if len(table.rows) <= SHOWN else moved)
    reach = max(abs(row[key]) for row in rows for key in ("change_low_points", "change_high_points"))
    x = Scale(-1.05 * reach, 1.05 * reach, LEFT_PX, WIDTH_PX - 12)
    bottom = TOP_PX + ROW_PX * len(rows)
    drawn = x_axis(x, TOP_PX, bottom, "Change of the right answers, points of 100", _signed)
    drawn.append(element("line", class_="axis", x1=x(0), x2=x(0), y1=TOP_PX, y2=bottom))
    for index, row in enumerate(rows):
        drawn += _dot(row, x, TOP_PX + ROW_PX * (index + 0.5))
    told = "; ".join(f"{row['class']}: {points(row['change_points'])} points" for row in rows)
    chosen = "" if len(rows) == len(table.rows) else f" Of {count(len(table.rows))} classes those that change most."
    still = len(table.rows) - len(moved)
    same = (
        f" In {count(still)} of {count(len(table.rows))} classes no answer changes from right to wrong or back."
        if still
        else ""
    )
    caption = (
        "Right answers of INT8 minus those of FP32 on the same test images, with the 95 % interval of the difference "
        f"(Tango). An interval that holds 0 can be chance.{same}{chosen}"
    )
    return svg(bottom + 40, "What INT8 does to each class", told, drawn), caption


def _extremes(rows: Sequence[Any]) -> list[Any]:
    """At most `SHOWN`, from the greatest loss to the greatest gain."""
    kept = sorted(rows, key=lambda row: -abs(row["change_points"]))[:SHOWN]
    return sorted(kept, key=lambda row: (row["change_points"], row["number"]))


def _signed(value: float) -> str:
    return f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def _dot(row: Any, x: Scale, y: float) -> list[str]:
    # Only a loss or gain that chance does not explain is in colour.
    sure = row["change_high_points"] < 0 or row["change_low_points"] > 0
    colour = f"c{2 if row['change_points'] < 0 else 1}" if sure else "quiet"
    low, high = x(row["change_low_points"]), x(row["change_high_points"])
    return [
        label(LEFT_PX - 8, y + 4, shorten(str(row["class"]), 15), "end"),
        f'<g class="{colour}">',
        element("path", class_="whisker", d=f"M{low} {y}H{high}M{low} {y - 3}v6M{high} {y - 3}v6"),
        element("circle", class_="mark ships", cx=x(row["change_points"]), cy=y, r=4),
        "</g>",
    ]
