"""The chart of accuracy against cost: drawn for the eye, with a mark to point or tab to for each file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kdedge_bench.formats import count, interval, milliseconds, percent, size
from kdedge_bench.pareto import Field, Point, beaten_by
from kdedge_bench.report_plot import LETTER_PX, WIDTH_PX, Scale, element, label, svg, ticks, x_axis
from kdedge_bench.table import Row

__all__ = ["COLOURS", "LATENCY", "SIZE", "Cost", "Plot", "Spot", "Swatch", "plot"]

HEIGHT_PX, LEFT_PX, TOP_PX, BOTTOM_PX = 284, 44, 22, 240
COLOURS = 6  # classes c1 to c6 of report.css; more runs begin again
OWN = {"fp32": 1, "int8": 2, "fp16": 3}  # colours of files where there is one run only
SHAPES = {"fp32": "circle", "int8": "square", "fp16": "diamond", "teacher": "plus", "baseline": "cross"}
LABEL_PX = 14  # from line to line


@dataclass(frozen=True)
class Cost:
    """What lies on the x axis. `show` makes the number's text, `axis` that of a tick, `unit` what follows either."""

    name: str
    title: str
    cheaper: str  # of a point with less of it
    equal: str  # of one with as much
    as_cheap: str
    show: Callable[[float], str]
    axis: Callable[[float], str]
    scale: float = 1.0  # from the point's cost to the number on the axis


LATENCY = Cost("latency", "Latency of one image (p90), ms", "faster", "no slower", "as fast",
               lambda ms: f"{milliseconds(ms)} ms", "{:g}".format)  # fmt: skip
SIZE = Cost("size", "Size of the file, MiB", "smaller", "no larger", "as small",
            lambda bytes_: size(round(bytes_)), "{:g}".format, 2.0**-20)  # fmt: skip


@dataclass(frozen=True)
class Spot:
    """A point that can be pointed at: its place in percent of the drawing, and its numbers as lines of text."""

    left: float
    top: float
    lines: tuple[str, ...]
    front: bool


@dataclass(frozen=True)
class Swatch:
    """A line of the legend: a tiny drawing and its words."""

    svg: str
    words: str


@dataclass(frozen=True)
class Plot:
    """`against`: the name of the cost. `legend` is empty where the marks have their names beside them."""

    against: str
    conditions: str
    title: str
    svg: str
    spots: tuple[Spot, ...]
    legend: tuple[Swatch, ...]
    caption: str


def plot(field: Field, cost: Cost, across: Sequence[Row] = ()) -> Plot:
    """The points of `field` with their intervals and the front; `across` are networks that have no such cost."""
    points, beaten = field.points, beaten_by(field.points)
    runs = list(dict.fromkeys(point.run for point in points))
    x, y = _scales(points, across, cost)
    drawn = [*x_axis(x, TOP_PX, BOTTOM_PX, cost.title, cost.axis), *_y_axis(y)]
    drawn += _lines_across(across, y)
    drawn.append(_front(points, beaten, x, y, cost))
    taken: list[tuple[float, float, float]] = []
    for point, other in zip(points, beaten, strict=True):
        faded = " faded" if other else ""
        drawn.append(f'<g class="c{_colour(point, runs)}{faded}">{_drawn(point, x, y, cost)}</g>')
    if len(runs) == 1:
        for point in points:
            drawn.append(_named(point, x, y, cost, taken))
    told = "; ".join(_sentence(point, other, cost) for point, other in zip(points, beaten, strict=True))
    spots = tuple(_spot(point, other, x, y, cost) for point, other in zip(points, beaten, strict=True))
    title = f"Test accuracy against {cost.name}"
    drawing = svg(HEIGHT_PX, title, told, drawn)
    return Plot(cost.name, field.conditions, title, drawing, spots, _legend(points, runs), _caption(field, cost))


def _scales(points: Sequence[Point], across: Sequence[Row], cost: Cost) -> tuple[Scale, Scale]:
    costs = [value * cost.scale for point in points for value in (point.cost, point.low, point.high) if value]
    low, high = min(costs), max(costs)
    if high > 10 * low:
        x = Scale(low / 1.4, high * 1.8, LEFT_PX, WIDTH_PX - 12, log=True)
    else:
        x = Scale(0.0, high * 1.25, LEFT_PX, WIDTH_PX - 12)
    shares = [share for row in (*(point.row for point in points), *across) for share in _whiskers(row)]
    margin = max(0.01, 0.06 * (max(shares) - min(shares)))
    return x, Scale(max(0.0, min(shares) - margin), min(1.0, max(shares) + margin), BOTTOM_PX, TOP_PX)


def _whiskers(row: Row) -> tuple[float, ...]:
    return tuple(share for share in (row.accuracy, row.low, row.high) if share is not None)


def _y_axis(y: Scale) -> list[str]:
    drawn = []
    percents = Scale(100 * y.low, 100 * y.high, y.start, y.end)
    for value in ticks(percents, 6):
        drawn.append(
            element("line", class_="hair", x1=LEFT_PX, x2=WIDTH_PX - 12, y1=percents(value), y2=percents(value))
        )
        drawn.append(label(LEFT_PX - 7, percents(value) + 4, f"{value:g}", "end", "quiet"))
    drawn.append(label(0, 11, "Test accuracy, %"))
    return drawn


def _lines_across(rows: Sequence[Row], y: Scale) -> list[str]:
    drawn: list[str] = []
    for row in rows:
        if row.accuracy is not None:
            at = y(row.accuracy)
            drawn.append(element("line", class_="across", x1=LEFT_PX, x2=WIDTH_PX - 12, y1=at, y2=at))
            above = -5 if at > TOP_PX + 16 else 14
            drawn.append(label(WIDTH_PX - 14, at + above, row.name.split(",")[0], "end", "quiet"))
    return drawn


def _front(points: Sequence[Point], beaten: Sequence[Point | None], x: Scale, y: Scale, cost: Cost) -> str:
    """A staircase through what no other point beats: below and to the right of it nothing is worth having."""
    best = sorted(
        (point for point, other in zip(points, beaten, strict=True) if other is None), key=lambda point: point.cost
    )
    first = best[0]
    path = [f"M{x(first.cost * cost.scale)} {BOTTOM_PX}V{y(first.accuracy)}"]
    path += [f"H{x(point.cost * cost.scale)}V{y(point.accuracy)}" for point in best[1:]]
    return element("path", class_="front", d="".join([*path, f"H{WIDTH_PX - 12}"]))


def _colour(point: Point, runs: Sequence[str]) -> int:
    if len(runs) == 1:
        return OWN.get(point.row.key, 4 if point.row.key in ("teacher", "baseline") else 5)
    return runs.index(point.run) % COLOURS + 1


def _drawn(point: Point, x: Scale, y: Scale, cost: Cost) -> str:
    at, up = x(point.cost * cost.scale), y(point.accuracy)
    drawn = []
    if point.row.low is not None and point.row.high is not None:
        low, high = y(point.row.low), y(point.row.high)
        drawn.append(element("path", class_="whisker", d=f"M{at} {low}V{high}M{at - 3} {low}h6M{at - 3} {high}h6"))
    if point.low is not None and point.high is not None:
        low, high = x(point.low * cost.scale), x(point.high * cost.scale)
        drawn.append(element("path", class_="whisker", d=f"M{low} {up}H{high}M{low} {up - 3}v6M{high} {up - 3}v6"))
    return "".join([*drawn, _shape(point.row, at, up)])


def _shape(row: Row, x: float, y: float) -> str:
    kind = "mark ships" if row.shipped else "mark"
    shape = SHAPES.get(row.key, "triangle")
    if shape == "circle":
        return element("circle", class_=kind, cx=x, cy=y, r=5)
    paths = {
        "square": f"M{x - 4.5} {y - 4.5}h9v9h-9z",
        "diamond": f"M{x} {y - 6}l6 6l-6 6l-6 -6z",
        "triangle": f"M{x} {y - 6}l5.5 10h-11z",
        "plus": f"M{x - 5} {y}h10M{x} {y - 5}v10",
        "cross": f"M{x - 4} {y - 4}l8 8M{x - 4} {y + 4}l8 -8",
    }
    return element("path", class_=kind, d=paths[shape])


def _named(point: Point, x: Scale, y: Scale, cost: Cost, taken: list[tuple[float, float, float]]) -> str:
    """The file's name beside its mark, further down where another name stands already."""
    name = point.row.name.removeprefix("Student ").split(",")[0]
    width = LETTER_PX * len(name) + 6
    right = x(point.cost * cost.scale) + 10 + width < WIDTH_PX
    left = x(point.cost * cost.scale) + 10 if right else x(point.cost * cost.scale) - 10 - width
    at = y(point.accuracy) - 7
    while any(abs(at - other) < LABEL_PX and left < end and begin < left + width for begin, end, other in taken):
        at += LABEL_PX
    taken.append((left, left + width, at))
    return label(left, at, name)


def _spot(point: Point, other: Point | None, x: Scale, y: Scale, cost: Cost) -> Spot:
    left = 100 * x(point.cost * cost.scale) / WIDTH_PX
    return Spot(
        round(left, 2), round(100 * y(point.accuracy) / HEIGHT_PX, 2), _lines(point, other, cost), other is None
    )


def _lines(point: Point, other: Point | None, cost: Cost) -> tuple[str, ...]:
    row = point.row
    sure = f" (95 % interval {interval(row.low, row.high)})" if row.low is not None else ""
    lines = [
        f"{point.run}: {row.name}{', ships' if row.shipped else ''}",
        f"{percent(row.accuracy)}{f' of {count(row.images)}' if row.images else ''} test images right{sure}",
    ]
    if cost is LATENCY:
        spread = ""
        if point.low is not None and point.high is not None:
            spread = f" ({milliseconds(point.low)} to {milliseconds(point.high)} in {point.rounds} rounds)"
        doubt = f"; {', '.join(row.flags)}" if row.flags else ""
        lines.append(f"{cost.show(point.cost)} an image, p90{spread}{doubt}; {size(row.bytes)}")
    else:
        lines.append(f"{size(row.bytes)}; {count(row.params)} parameters")
    return (*lines, _standing(point, other, cost))


def _standing(point: Point, other: Point | None, cost: Cost) -> str:
    if other is None:
        return "On the front: nothing here beats it."
    name = other.row.name if other.run == point.run else f"{other.run}, {other.row.name}"
    how = ["more accurate"] if other.accuracy > point.accuracy else ["as accurate"]
    how.append(cost.cheaper if other.cost < point.cost else cost.equal)
    return f"Beaten by {name}: {' and '.join(how)}."


def _sentence(point: Point, other: Point | None, cost: Cost) -> str:
    beaten = "" if other is None else ", beaten"
    return f"{point.run} {point.row.name}: {percent(point.accuracy)} at {cost.show(point.cost)}{beaten}"


def _legend(points: Sequence[Point], runs: Sequence[str]) -> tuple[Swatch, ...]:
    """Of several runs: which colour is which run, and which shape which file. One run's marks have their names."""
    if len(runs) == 1:
        return ()
    kinds = list({point.row.key: point.row for point in points}.values())
    dots = [Swatch(_tiny(f"c{index % COLOURS + 1}", element("circle", class_="mark ships", cx=8, cy=8, r=5)), run)
            for index, run in enumerate(runs)]  # fmt: skip
    plain = [Row(row.key, row.name) for row in kinds]
    return (*dots, *(Swatch(_tiny("quiet", _shape(row, 8, 8)), row.name) for row in plain))


def _tiny(class_: str, drawn: str) -> str:
    return f'<svg class="swatch" viewBox="0 0 16 16" aria-hidden="true"><g class="{class_}">{drawn}</g></svg>'


def _caption(field: Field, cost: Cost) -> str:
    rounds = " and across from the fastest round to the slowest" if any(point.low for point in field.points) else ""
    where = f" On {field.conditions}." if field.conditions else ""
    occasions = f" {field.occasions}" if field.occasions else ""
    return (
        f"Test accuracy against {cost.name}; up and to the left is better. Bars are the 95 % interval over the test "
        f"images{rounds}. Filled is what ships. Faded: another one here is as accurate and {cost.as_cheap} or better, "
        f"by the numbers as they stand; where intervals overlap, that can be chance.{where}{occasions}"
    )
