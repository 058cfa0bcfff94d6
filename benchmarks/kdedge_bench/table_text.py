"""Cells and lines of Markdown tables of accuracies over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["DASH", "accuracy", "difference", "line"]

DASH = "-"


def accuracy(found: Mapping[str, Any] | None) -> str:
    """`96.2 ± 0.8`, in percent."""
    if found is None:
        return DASH
    half = found["half_width_95"]
    return f"{100 * found['mean']:.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def difference(found: Mapping[str, Any] | None) -> str:
    """`+1.23 ± 0.51`, in points."""
    if found is None or found["mean"] is None:
        return DASH
    half = found["half_width_95"]
    width = " (no interval)" if half is None else f" ± {100 * half:.2f}"
    return f"{100 * found['mean']:+.2f}{width}"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
