"""What a measurement tells becomes records on disk, wherever it ran."""

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdedge.errors import DeviceError, KdedgeError, RunError
from kdedge.runs import write_json
from kdedge_bench.records import Record, check_record, file_name
from kdedge_bench.remote_place import shown

__all__ = ["Names", "Outcome", "Target", "reasons", "unmeasured", "written"]


@dataclass(frozen=True)
class Target:
    """A bundle folder or a model file, and where its records go. `name`: a model's in them, None for a bundle."""

    path: Path
    name: str | None
    out: Path


@dataclass
class Outcome:
    """What came of one machine: what was measured and written, and what went wrong."""

    records: list[Record] = field(default_factory=list)
    errors: list[KdedgeError] = field(default_factory=list)


class Names:
    """File names of records. Two machines of one model, measured in one call, do not replace each other's."""

    def __init__(self) -> None:
        self._places: dict[tuple[Path, str], list[str]] = {}
        self._lock = threading.Lock()

    def path(self, place: str, out: Path, record: Record, artifact: str) -> Path:
        """<machine>-<artifact>.json, and <machine>-2-<artifact>.json for the second such machine."""
        machine = file_name(record, artifact).removesuffix(f"-{artifact}.json")
        with self._lock:
            places = self._places.setdefault((out, machine), [])
            if place not in places:
                places.append(place)
            number = places.index(place) + 1
        return out / (f"{machine}-{artifact}.json" if number == 1 else f"{machine}-{number}-{artifact}.json")


def written(document: Mapping[str, Any], target: Target, place: str, names: Names) -> list[Record]:
    """The records in what `run.pyz bench` told, each in its file. DeviceError where they are none."""
    found = document.get("records", [document])
    records = [_checked(each, target, place) for each in found] if isinstance(found, list) else []
    for record in records:
        write_json(names.path(place, target.out, record, record["artifact"]["name"]), record)
    return records


def unmeasured(document: Mapping[str, Any], place: str) -> list[KdedgeError]:
    """An error for each artifact that could not be measured beside those that were."""
    errors: list[KdedgeError] = [DeviceError(f"{place}: {why}") for why in reasons(document, "failed")]
    for error in errors:
        error.exit_code = 1
    return errors


def reasons(document: Mapping[str, Any], *groups: str) -> list[str]:
    """Why artifacts have no record: those that "failed", and those that were "not_run", since not for this machine."""
    found = [(group, document.get(group)) for group in groups]
    return [
        f"{shown(str(artifact))} {'was not measured' if group == 'failed' else 'is not run'}: {shown(str(why), 2000)}"
        for group, each in found
        if isinstance(each, dict)
        for artifact, why in each.items()
    ]


def _checked(document: Any, target: Target, place: str) -> Record:
    """A record as this kdedge reads them; its artifact's name becomes part of a file's name."""
    try:
        record = check_record(document, Path(f"What was measured on {place}"))
    except RunError as error:
        raise DeviceError(str(error)) from error
    name = target.name or record["artifact"].get("name") or record["artifact"].get("precision")
    if not target.name and not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,40}", str(name)):
        raise DeviceError(f"{place} told of an artifact named {name!r}; a name such as int8 was expected.")
    record["artifact"]["name"] = name
    if target.name:
        record["artifact"]["file"] = target.path.name  # a board knows it by another one
    return record
