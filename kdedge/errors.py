"""Everything that can go wrong and be told in one sentence.

    KdedgeError              the user can do something about it (exit code 2)
    ├── RecipeError          a recipe, a key or a value in it
    ├── DataError            images, labels, splits
    ├── RunError             a run folder: missing, locked, finished, of another recipe
    ├── ExportError          a model that cannot be exported or quantized
    ├── BundleError          a bundle that is incomplete, altered or too new
    ├── DeviceError          a runtime, a driver, a board
    ├── MissingPackage       an optional package that is not installed
    └── BudgetFailed         it ran, and a check or budget failed (exit code 1)

    BugError                 ours, not yours; not a KdedgeError, so that nothing swallows it

Form of a message: what happened, with the value; what was expected; how to fix it.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "BudgetFailed",
    "BugError",
    "BundleError",
    "DataError",
    "DeviceError",
    "ExportError",
    "KdedgeError",
    "MissingPackage",
    "RecipeError",
    "RunError",
    "did_you_mean",
]


class KdedgeError(Exception):
    """Printed without a traceback by the CLI, which exits with `exit_code`."""

    exit_code = 2


class RecipeError(KdedgeError):
    """A recipe, a key or a value in it."""


class DataError(KdedgeError):
    """Images, labels or splits."""


class RunError(KdedgeError):
    """A run folder: missing, locked, finished, or of another recipe."""


class ExportError(KdedgeError):
    """A model that cannot be exported or quantized."""


class BundleError(KdedgeError):
    """A bundle that is incomplete, altered or of a newer schema."""


class DeviceError(KdedgeError):
    """A runtime, a driver or a board."""


class MissingPackage(KdedgeError):
    """An optional package is not installed."""

    def __init__(self, package: str, feature: str, install: str) -> None:
        super().__init__(f"The package {package} is not installed; {feature} needs it. Install it with: {install}")


class BudgetFailed(KdedgeError):
    """The command ran, and a budget or check failed."""

    exit_code = 1


class BugError(Exception):
    """A state that only a mistake in kdedge can produce."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest of `known`, or an empty string where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
