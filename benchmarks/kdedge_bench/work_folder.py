"""A folder of many runs that belong together: the plan it was begun with, and the locks that let processes share it.

plan.json               what was asked for, before the first run
<kind>.json, <kind>.md  the tables so far, written anew after every run
<run>/                  one ordinary run folder each
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdedge.errors import RunError
from kdedge.runs import Run, read_json, write_json

__all__ = ["WorkFolder", "flat"]


@dataclass(frozen=True)
class WorkFolder:
    path: Path
    kind: str  # "verdict" or "study": what the files and the messages call it

    @property
    def plan_path(self) -> Path:
        return self.path / "plan.json"

    @property
    def json_path(self) -> Path:
        return self.path / f"{self.kind}.json"

    @property
    def text_path(self) -> Path:
        return self.path / f"{self.kind}.md"

    def run(self, name: str) -> Run:
        return Run(self.path / name)

    def begin(
        self,
        plan: dict[str, Any],
        spellings: Collection[str] = (),
        as_now: Callable[[dict[str, Any]], dict[str, Any]] = lambda before: before,
    ) -> None:
        """Write the plan, or hold it against the one there is; RunError with every difference.

        `spellings` are keys that may differ: how something was named that other keys say in full. `as_now` says a plan
        that an earlier kdedge wrote in the keys of today.
        """
        used = self.path.exists() and (not self.path.is_dir() or any(map(_is_content, self.path.iterdir())))
        # Asked in this order: what another process writes here comes after its plan.
        if used and not self.plan_path.is_file():
            raise RunError(f"{self.path} exists and is no {self.kind}. It was not touched; choose another --out.")
        with self.lock("plan"):
            if not self.plan_path.is_file():
                write_json(self.plan_path, plan)
                return
        before, now = flat(as_now(read_json(self.plan_path))), flat(plan)
        keys = sorted((before.keys() | now.keys()) - set(spellings))
        differs = [f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in keys if before.get(k) != now.get(k)]
        if differs:
            raise RunError(
                f"The {self.kind} in {self.path} was planned otherwise: {'; '.join(differs)}. "
                "Go on with it as it was planned, or choose another --out."
            )

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this process may make the run now; False where another is at it. Freed when the process dies."""
        import fcntl

        with self._lock_file(name) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Waits for its turn: what is held is a moment's work."""
        import fcntl

        with self._lock_file(name) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _lock_file(self, name: str) -> Any:
        locks = self.path / ".locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
            return (locks / name).open("w")
        except OSError as error:
            raise RunError(
                f"Cannot write in {locks}: {error.strerror}. Free some space or choose another folder with --out."
            ) from error


def _is_content(path: Path) -> bool:
    """Not the locks, nor a plan that another process is just writing."""
    return not path.name.startswith(".")


def flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; of the recipe as asked for the keys alone, as a recipe spells them."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = f"{prefix}{key}"
        found |= flat(value, "" if name == "asked" else f"{name}.") if isinstance(value, dict) else {name: value}
    return found
