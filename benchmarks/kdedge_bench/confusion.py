"""What is taken for what: counts over the test images, class by class."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from kdedge_bench.formats import DASH, count, percent
from kdedge_bench.report_tables import Column, Table

__all__ = ["ClassRow", "class_rows", "class_table", "confusion_matrix"]


@dataclass(frozen=True)
class ClassRow:
    """One class. `recall` is the share of its images found, `precision` the share of its guesses that are right."""

    number: int
    name: str
    images: int
    right: int
    recall: float | None
    precision: float | None
    taken_for: str | None  # the wrong class given most often
    taken_for_count: int


def confusion_matrix(
    labels: npt.NDArray[np.int64], guesses: npt.NDArray[np.int64], classes: int
) -> npt.NDArray[np.int64]:
    """Counts [K true, K predicted]; images of unknown class (label -1) are left out."""
    known = labels >= 0
    flat = labels[known] * classes + guesses[known]
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def class_rows(matrix: npt.NDArray[np.int64], names: Sequence[str]) -> list[ClassRow]:
    """One row a class, in the order of the logits."""
    rows = []
    for index, name in enumerate(names):
        images, guesses, right = int(matrix[index].sum()), int(matrix[:, index].sum()), int(matrix[index, index])
        wrong = matrix[index].copy()
        wrong[index] = 0
        most = int(wrong.argmax())
        rows.append(
            ClassRow(
                number=index,
                name=name,
                images=images,
                right=right,
                recall=right / images if images else None,
                precision=right / guesses if guesses else None,
                taken_for=names[most] if wrong[most] else None,
                taken_for_count=int(wrong[most]),
            )
        )
    return rows


def class_table(rows: Sequence[ClassRow], title: str, numbered: bool) -> Table:
    """The rows for a reader; `numbered` where the confusion matrix has numbers instead of names."""
    columns = (
        Column("Class", ("name",), text=True),
        *([Column("No.", ("number",))] if numbered else []),
        Column("Test images", ("images",), count),
        Column("Right", ("right",), count),
        Column("Recall", ("recall",), percent),
        Column("Precision", ("precision",), percent),
        Column("Most often taken for", ("taken_for", "taken_for_count"), _taken_for, text=True),
    )
    return Table("classes", title, columns, tuple(asdict(row) for row in rows))


def _taken_for(name: str | None, images: int) -> str:
    return DASH if name is None else f"{name} ({images}\N{MULTIPLICATION SIGN})"
