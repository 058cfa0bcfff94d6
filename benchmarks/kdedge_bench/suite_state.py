"""The rounds of a suite that are over, on disk until its records are written: one that was stopped goes on after them.

A round that was stopped in its middle is measured again as a whole: what is compared stays side by side.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

from kdedge.errors import RunError
from kdedge.runs import read_json, write_json
from kdedge_device.bench_rounds import Told

__all__ = ["Before", "Kept", "identity"]


def identity(what: Any) -> str:
    """Of a JSON document: rounds of anything else are not gone on with."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


@final
class Before(NamedTuple):
    """What each round told by job, why jobs failed, and in how many processes that was."""

    session: str | None
    rounds: list[dict[str, Told]]
    failed: dict[str, str]
    sittings: int


@final
@dataclass(frozen=True)
class Kept:
    """`folder` holds round-001.json and so on, of the suite with this identity; others that lie there are replaced."""

    folder: Path
    identity: str

    def begin(self) -> None:
        """RunError where nothing can be written here, before minutes are spent."""
        write_json(self.folder / "of.json", {"identity": self.identity})

    def read(self) -> Before:
        """Nothing, where it was another suite's."""
        session: str | None = None
        sittings: set[str] = set()
        rounds: list[dict[str, Told]] = []
        failed: dict[str, str] = {}
        while (path := self._path(len(rounds))).is_file():
            try:
                document = read_json(path)
            except RunError:
                break
            if document.get("identity") != self.identity or (session or document["session"]) != document["session"]:
                break
            session, failed = document["session"], document["failed"]
            sittings.add(document["sitting"])
            rounds.append({name: Told(each["record"], each["times_ns"]) for name, each in document["told"].items()})
        return Before(session, rounds, failed, len(sittings))

    def add(self, number: int, session: str, sitting: str, told: Mapping[str, Told], failed: Mapping[str, str]) -> None:
        """Round `number`, from 0, of which `sitting` is the process that measured it."""
        document = {
            "identity": self.identity,
            "session": session,
            "sitting": sitting,
            "told": {name: each._asdict() for name, each in told.items()},
            "failed": dict(failed),
        }
        write_json(self._path(number), document)

    def remove(self) -> None:
        """What stays is not gone on with: its session is that of the table."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number + 1:03d}.json"
