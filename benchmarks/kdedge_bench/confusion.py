"""What is taken for what: counts over the test images, class by class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ClassRow", "class_rows", "confusion_matrix"]


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
