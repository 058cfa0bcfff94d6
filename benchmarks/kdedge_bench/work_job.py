"""One run of many: a row for one seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, final

__all__ = ["Job", "WorkRow", "run_name"]


class WorkRow(Protocol):
    """What is made once for each seed."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Sequence[str]:
        """Names of the rows whose runs it reads."""


SomeRow = TypeVar("SomeRow", bound=WorkRow, covariant=True)


@final
@dataclass(frozen=True)
class Job(Generic[SomeRow]):
    """One run to make."""

    row: SomeRow
    seed: int

    @property
    def name(self) -> str:
        """The run's folder inside the whole's."""
        return run_name(self.row.name, self.seed)

    @property
    def title(self) -> str:
        """What is said when it begins."""
        return f"{self.row.name}, seed {self.seed}"

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the runs that must be finished before this one begins."""
        return tuple(run_name(row, self.seed) for row in self.row.needs)


def run_name(row: str, seed: int) -> str:
    return f"{row}-s{seed}"
