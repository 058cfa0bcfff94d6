"""Reading measurement records: one JSON file each, in the layout of the contract."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdedge.errors import RunError
from kdedge.runs import read_json
from kdedge_device.record import SCHEMA

__all__ = [
    "Record",
    "check_record",
    "file_name",
    "flags",
    "latency",
    "machine_name",
    "measured_under",
    "model_sha256",
    "one_image",
    "power_mode",
    "read_records",
    "record_files",
]

Record = dict[str, Any]


def record_files(folder: Path) -> list[Path]:
    """What `kdedge bench` wrote into `folder` and, with --suite, below it; `folder` may be a suite's own."""
    if (folder / "suite.json").is_file():
        folder = folder / "records"
    return [*sorted(folder.glob("*.json")), *sorted(folder.glob("*/records/*.json"))]


def read_records(folder: Path, bundle: Mapping[str, Any] | None) -> tuple[tuple[Record, ...], int]:
    """Records in `folder`, newest first, and how many were left out because their file has changed since.

    A latency belongs to the bytes that were timed: a record of a model that is not in the bundle is of an earlier
    export. RunError where a record is damaged or of a newer kdedge.
    """
    records = [check_record(read_json(path), path) for path in record_files(folder)]
    records.sort(key=lambda record: str(record.get("started_at") or ""), reverse=True)
    if bundle is None:
        return tuple(records), 0
    known = {str(entry.get("sha256")) for entry in (bundle.get("artifacts") or {}).values()}
    current = [record for record in records if model_sha256(record) in known]
    return tuple(current), len(records) - len(current)


def check_record(document: Any, path: Path) -> Record:
    """The document, if it is a record this version reads; else RunError."""
    if not isinstance(document, dict) or not isinstance(document.get("schema"), int):
        raise RunError(
            f"{path} is no measurement record: it has no integer 'schema'. Expected a file written by kdedge bench."
        )
    if document["schema"] > SCHEMA:
        raise RunError(f"{path} has schema {document['schema']}; this kdedge reads up to {SCHEMA}. Update kdedge.")
    for key in ("artifact", "machine", "conditions", "latency_ms"):
        if not isinstance(document.get(key), dict):
            raise RunError(f"{path} has no '{key}'; a measurement record was expected. Measure again: kdedge bench.")
    return document


def model_sha256(record: Record) -> str:
    """Of the ONNX file that was timed, or that the engine was built of which was timed."""
    artifact = record["artifact"]
    return str(artifact.get("onnx_sha256") or artifact.get("sha256"))


def one_image(record: Record) -> bool:
    """Whether its times are of one image at a time: those of a batch, or of batch after batch, are no such latency."""
    said = record["conditions"]
    return said.get("mode") != "offline" and (said.get("batch") or 1) == 1


def measured_under(record: Record) -> tuple[str, int | None, str]:
    """(machine, threads, power mode): what latencies have to share before one is told beside the other."""
    return machine_name(record), record["conditions"].get("threads"), power_mode(record) or ""


def latency(record: Record | None, part: str) -> dict[str, Any]:
    """`compute`, `with_copies` or `end_to_end` of a record; empty where it was not measured."""
    return ((record or {}).get("latency_ms") or {}).get(part) or {}


def machine_name(record: Record) -> str:
    """The machine in a few words: GPU, board or processor. Not its host name, which in a container is a number."""
    machine = record["machine"]
    arm = str(machine.get("architecture") or "").startswith(("aarch64", "arm"))
    order = ("gpu", "model", "cpu") if arm else ("gpu", "cpu", "model")
    return next((str(machine[key]) for key in (*order, "name") if machine.get(key)), "unnamed machine")


def power_mode(record: Record) -> str | None:
    """The power mode by its name, else its number; None where the machine has none, or it changed meanwhile."""
    mode = record["conditions"].get("power_mode")
    told = (
        next((mode[key] for key in ("name", "id") if mode.get(key) is not None), None)
        if isinstance(mode, dict)
        else mode
    )
    return None if told is None else str(told)


def flags(record: Record) -> list[str]:
    """Names of the warnings raised by the measurement, such as "unstable"."""
    found = record.get("flags") or {}
    return (
        [str(name) for name, raised in found.items() if raised]
        if isinstance(found, dict)
        else [str(name) for name in found]
    )


def file_name(record: Record, artifact: str) -> str:
    """<machine>-<artifact>.json in lower case letters, digits and dashes: measuring again replaces the file."""
    words = re.sub(r"\((r|tm)\)|@|\bcpu\b|\bprocessor\b", " ", machine_name(record).lower())
    machine = re.sub(r"[^a-z0-9]+", "-", words).strip("-")[:60].strip("-")
    return f"{machine or 'machine'}-{artifact}.json"
