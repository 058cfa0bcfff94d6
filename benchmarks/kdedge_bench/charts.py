"""The figures of the report. Each function returns an <svg> element, or None where the run has nothing to draw.

Colours are those of Okabe and Ito, which people with any common colour blindness tell apart.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kdedge_bench.facts import Facts
from kdedge_bench.formats import DASH, count, percent, unique_short
from kdedge_bench.svg import INK, MUTED, drawing, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "confusion",
    "curves",
    "fidelity",
    "kept_share",
    "learning_rate",
    "loss",
    "neighbours_accuracy",
    "precision_by_class",
    "pseudo_label_accuracy",
    "pseudo_label_classes",
    "sensitivity",
    "trusted",
    "validation_accuracy",
]

STAGES = {
    "baseline": ("baseline", "#8a949e"),
    "pretrain": ("pretraining", "#009E73"),
    "outer": ("outer (teacher)", "#D55E00"),
    "inner": ("inner (student)", "#0072B2"),
}
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
FILES = {"int8": ("INT8, ONNX Runtime", "#D55E00"), "trt": ("INT8, TensorRT (emulated)", "#009E73")}
LAYERS_SHOWN = 12
MAX_NAMED = 20  # classes; more names than this cannot be read on an axis of 3 inches
MAX_NUMBERED = 12  # classes; more numbers than this cannot be read in the cells
SMOOTH_FROM = 80  # points
BLUE, WHITE = (0.04, 0.33, 0.58), "#fefefe"  # of the confusion matrix; this white is not the page's, which may be dark

Curve = tuple[str, str, list[float], list[float]]  # name, colour, steps, values


def curves(facts: Facts, key: str) -> list[Curve]:
    """`key` of every stage that logged it: (name, colour, steps, values)."""
    found = []
    for stage, (name, colour) in STAGES.items():
        points = [
            (line["step"], line[key]) for line in facts.metrics if line.get("stage") == stage and _number(line.get(key))
        ]
        if points:
            steps, values = zip(*points, strict=True)
            found.append((name, colour, [float(step) for step in steps], [float(value) for value in values]))
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _lines(axes: "Axes", found: Sequence[Curve], noisy: bool = True) -> None:
    """One line a stage; a long noisy one is drawn pale with its running mean over it."""
    for name, colour, steps, values in found:
        marker = "o" if len(values) == 1 else None
        if len(values) < SMOOTH_FROM or not noisy:
            axes.plot(steps, values, color=colour, label=name, marker=marker, markersize=3.5)
            continue
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
        axes.plot(steps, _running_mean(values, len(values) // 40 * 2 + 1), color=colour, label=name)


def _running_mean(values: Sequence[float], window: int) -> npt.NDArray[np.float64]:
    """Centred mean of an odd `window`, of fewer values at the ends."""
    ones, array = np.ones(window), np.asarray(values, dtype=np.float64)
    return np.convolve(array, ones, "same") / np.convolve(np.ones_like(array), ones, "same")


def _steps_axis(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("Step of the stage")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))


def _log_axis(axis: Any) -> None:
    """Plain numbers, since powers of ten would be small superscripts; at 1, 2 and 5 where that is not too many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _over_time(
    facts: Facts, metric: str, key: str, title: str, label: str, finish: Callable[["Axes", list[Curve]], None]
) -> str | None:
    found = curves(facts, metric)
    if not found:
        return None
    with drawing() as (figure, axes):
        _lines(axes, found, noisy=metric != "lr")
        _steps_axis(axes)
        axes.set_ylabel(label)
        finish(axes, found)
        figure.legend(loc="outside upper left", ncols=3)
        last = "; ".join(f"{name}: {values[-1]:.3g} at step {steps[-1]:,.0f}" for name, _, steps, values in found)
        return to_svg(figure, key, title, f"{title}. Last logged values: {last}.")


def loss(facts: Facts, key: str) -> str | None:
    """Training loss of each stage."""

    def finish(axes: "Axes", found: list[Curve]) -> None:
        values = [value for curve in found for value in curve[3]]
        if min(values) > 0 and max(values) > 20 * min(values):
            _log_axis(axes.yaxis)
        else:
            axes.set_ylim(bottom=min(0.0, *values))

    return _over_time(facts, "loss", key, "Training loss over the steps of each stage", "Loss", finish)


def learning_rate(facts: Facts, key: str) -> str | None:
    def finish(axes: "Axes", _: list[Curve]) -> None:
        axes.set_ylim(bottom=0)

    return _over_time(facts, "lr", key, "Learning rate over the steps of each stage", "Learning rate", finish)


def _share(axes: "Axes", _: list[Curve]) -> None:
    axes.set_ylim(0, 1.02)
    _percent_axis(axes.yaxis)


def kept_share(facts: Facts, key: str) -> str | None:
    """Share of unlabeled images whose pseudo label is confident enough to learn from."""
    title = "Share of unlabeled images kept by the confidence threshold"
    return _over_time(facts, "kept_fraction", key, title, "Kept, %", _share)


def pseudo_label_accuracy(facts: Facts, key: str) -> str | None:
    """Accuracy of the kept pseudo labels, where the true classes are known."""

    def finish(axes: "Axes", found: list[Curve]) -> None:
        lowest = min(value for curve in found for value in curve[3])
        axes.set_ylim(max(0.0, np.floor(lowest * 10) / 10 - 0.05), 1.01)
        _percent_axis(axes.yaxis)

    return _over_time(facts, "pseudo_label_accuracy", key, "Accuracy of the pseudo labels", "Right, %", finish)


def pseudo_label_classes(facts: Facts, classes: Sequence[str], key: str) -> str | None:
    """Which classes the kept pseudo labels are of, at the end of each stage."""
    title = "Kept pseudo labels of each class, at the end of each stage"
    return _by_class(facts, classes, key, ("pseudo_label_histogram",), title, "Of the kept labels, %")


def precision_by_class(facts: Facts, classes: Sequence[str], key: str) -> str | None:
    """Right share by the true classes at the end of each stage, else by those of the held-back labeled slice."""
    title = "Right share of the kept pseudo labels of each class, at the end of each stage"
    metrics = ("pseudo_label_precision", "val_pseudo_label_precision")
    return _by_class(facts, classes, key, metrics, title, "Right, %", _share)


def _by_class(
    facts: Facts,
    classes: Sequence[str],
    key: str,
    metrics: Sequence[str],
    title: str,
    label: str,
    finish: Callable[["Axes", list[Curve]], None] | None = None,
) -> str | None:
    """Bars [K] of the last logged line of each stage, of the first of `metrics` that it has; a dash for null."""
    found = [
        (name, colour, values)
        for stage, (name, colour) in STAGES.items()
        if (values := _last_by_class(facts, stage, metrics)) is not None
    ]
    if not found:
        return None
    with drawing() as (figure, axes):
        _percent_axis(axes.yaxis)
        width = 0.8 / len(found)
        for index, (name, colour, values) in enumerate(found):
            places = np.arange(len(values)) + (index - (len(found) - 1) / 2) * width
            axes.bar(places, [value or 0.0 for value in values], width, color=colour, label=name)
            for place, value in zip(places, values, strict=True):
                if value is None and len(values) <= MAX_NAMED:
                    axes.text(place, 0.01, DASH, ha="center", va="bottom", color=colour)
        axes.grid(axis="x", visible=False)
        if finish is not None:
            finish(axes, [])
        axes.set_ylabel(label)
        axes.set_xlabel("Class of the pseudo label")
        _class_names(axes, classes, len(found[0][2]))
        figure.legend(loc="outside upper left", ncols=3)
        known = [(name, [value for value in values if value is not None]) for name, _, values in found]
        ranges = "; ".join(f"{name}: {percent(min(some))} to {percent(max(some))}" for name, some in known if some)
        return to_svg(figure, key, title, f"{title}. From the lowest class to the highest: {ranges}.")


def _last_by_class(facts: Facts, stage: str, metrics: Sequence[str]) -> list[float | None] | None:
    for metric in metrics:
        lines = [line[metric] for line in facts.metrics if line.get("stage") == stage and line.get(metric)]
        if lines:
            last: list[float | None] = lines[-1]
            return last
    return None


def _class_names(axes: "Axes", classes: Sequence[str], bars: int) -> None:
    """Names below the bars where they can be read; else matplotlib's numbers."""
    if bars == len(classes) <= MAX_NAMED:
        names = unique_short(classes, 12)
        axes.set_xticks(range(bars), names, rotation=90 if max(map(len, names)) > 3 else 0)


def neighbours_accuracy(facts: Facts, key: str) -> str | None:
    return _over_time(facts, "knn_accuracy", key, "Accuracy of nearest neighbours on the features", "Right, %", _share)


def validation_accuracy(facts: Facts, key: str) -> str | None:
    return _over_time(facts, "val_accuracy", key, "Accuracy on the validation split", "Right, %", _share)


def confusion(matrix: npt.NDArray[np.int64], classes: Sequence[str], key: str, artifact: str) -> str:
    """Counts [K true, K predicted]; a cell's colour is its share of the true class, so rare classes show too."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    many = len(classes)
    with drawing(height_in=4.0) as (figure, axes):
        axes.grid(False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(True)
        # Square root: one mistake in a hundred is still seen.
        # Of one colour, more or less see-through: the page shines through it, light or dark.
        blues = LinearSegmentedColormap.from_list("blues", [(*BLUE, 0.0), (*BLUE, 1.0)])
        axes.imshow(shares, cmap=blues, norm=PowerNorm(0.5, 0, 1), interpolation="none", aspect="equal")
        axes.set_xlabel("Predicted class")
        axes.set_ylabel("True class")
        if many <= MAX_NAMED:
            _class_ticks(axes, classes)
        if many <= MAX_NUMBERED:
            for (row, column), number in np.ndenumerate(matrix):
                if number:
                    colour = WHITE if shares[row, column] > 0.45 else INK
                    axes.text(column, row, f"{number}", ha="center", va="center", color=colour)
        right = int(np.trace(matrix))
        title = f"Confusion matrix of {artifact} on the test images"
        return to_svg(
            figure, key, title, f"{right} of {int(matrix.sum())} images lie on the diagonal of {many} classes."
        )


def _class_ticks(axes: "Axes", classes: Sequence[str]) -> None:
    names = unique_short(classes, 12)
    long = max(len(name) for name in names) > 3
    axes.set_xticks(range(len(names)), names, rotation=90 if long else 0)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)


def trusted(facts: Facts, classes: Sequence[str], key: str) -> str | None:
    """Size of the trusted set, class by class."""
    sizes = ((facts.result or {}).get("trusted") or {}).get("per_class")
    if not isinstance(sizes, list) or not sizes or not all(_number(size) for size in sizes):
        return None
    from matplotlib.ticker import MaxNLocator

    with drawing() as (figure, axes):
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.bar(range(len(sizes)), sizes, color=PALETTE[0], width=0.7)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("Trusted images")
        axes.set_xlabel("Class")
        _class_names(axes, classes, len(sizes))
        title = "Size of the trusted set by class"
        return to_svg(figure, key, title, f"From {count(min(sizes))} to {count(max(sizes))} images a class.")


def sensitivity(document: Mapping[str, Any] | None, key: str) -> str | None:
    """The layers that lose most by being INT8, each alone: mean KL to FP32's answers; those left in float are pale."""
    found = (document or {}).get("sensitivity") or []
    if not found:
        return None
    left = set(((document or {}).get("fallback") or {}).get("left_float") or [])
    shown = sorted(found, key=lambda each: -float(each["divergence"]))[:LAYERS_SHOWN]
    names = [str(each["layer"]).removeprefix("backbone.") for each in shown]
    with drawing(height_in=0.9 + 0.19 * len(shown)) as (figure, axes):
        places, values = range(len(shown)), [float(each["divergence"]) for each in shown]
        colours = [MUTED if each["layer"] in left else PALETTE[1] for each in shown]
        axes.barh(places, values, color=colours, height=0.7)
        axes.set_yticks(places, unique_short(names, 30))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("Divergence from FP32, nats")
        title = "Layers most sensitive to INT8"
        told = "; ".join(f"{name}: {value:.2g}" for name, value in zip(names[:5], values, strict=False))
        return to_svg(figure, key, title, f"{title}. {told}.")


def fidelity(proof: Mapping[str, Any] | None, key: str) -> str | None:
    """Signal over noise of each tensor from input to logits, of the INT8 files beside FP32."""
    layers = (proof or {}).get("layers") or {}
    lines = []
    for file, (name, colour) in FILES.items():
        values = [each["sqnr_db"] for each in (layers.get(file) or {}).get("layers", []) if _number(each["sqnr_db"])]
        lines += [(name, colour, values)] if values else []
    if not lines:
        return None
    with drawing() as (figure, axes):
        for name, colour, values in lines:
            axes.plot(np.linspace(0, 100, len(values)), values, color=colour, label=name)
        axes.set_xlabel("Way from input to logits, %")
        axes.set_ylabel("Signal over noise, dB")
        axes.set_ylim(bottom=min(0.0, *(value for _, _, values in lines for value in values)))
        figure.legend(loc="outside upper left", ncols=2)
        last = "; ".join(f"{name}: {values[-1]:.0f} dB at the logits" for name, _, values in lines)
        return to_svg(figure, key, "Signal over noise along the network", f"{last}.")
