"""What a suite comes to: its records and its table, on disk and in the terminal, wherever it was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from kdedge.errors import DeviceError, RunError
from kdedge.runs import read_json, write_bytes, write_json
from kdedge_bench.cells import escaped
from kdedge_bench.records import Record, file_name
from kdedge_bench.rows import Row, ratio, row_of
from kdedge_bench.rows_table import as_csv, as_json, as_markdown, as_text
from kdedge_bench.suite import Found
from kdedge_bench.suite_models import Subject
from kdedge_bench.suite_plan import Combination, Planned, base_of, way
from kdedge_device.clock import told_effort

__all__ = ["Session", "SuiteResult", "completed", "finished"]

RANDOM = "random weights: speed only"


@final
@dataclass(frozen=True)
class SuiteResult:
    """`document`: what suite.json holds. `exit_code`: 1 where a combination that should run there failed."""

    rows: list[Row]
    records: list[Record]
    document: dict[str, Any]
    text: str
    exit_code: int


@final
@dataclass(frozen=True)
class Session:
    """What was to be measured, and how. `sittings`: processes that shared it; more than one where it was stopped."""

    found: Found
    models: Sequence[Subject]
    planned: Sequence[Planned]
    effort: str
    repeats: int
    sittings: int = 1

    def subject(self, row: Combination) -> Subject:
        return next(each for each in self.models if each.name == row.model)


def completed(session: Session, record: Record, row: Combination) -> Record:
    """`record` with what it does not know of the suite it belongs to.

    Its artifact is called as in any other record, by which two suites are compared; a bare file is so by its precision.
    """
    record["conditions"]["effort"] = told_effort(session.effort, session.repeats)
    bare = session.subject(row).bundle is None
    record["artifact"] |= {"precision": row.precision} | ({"name": row.precision} if bare else {})
    record["suite"] = {
        "name": session.found.name,
        "combination": asdict(row),
        "weights": "random" if session.subject(row).random else None,
        "sittings": session.sittings,
    }
    return record


def finished(session: Session, records: Mapping[str, Record], failed: Mapping[str, str], out: Path) -> SuiteResult:
    """Write `records`, by the combination's name, and the table; `failed`: why what was begun has no record.

    DeviceError where there is not a single record.
    """
    why = {each.combination.name: each.why for each in session.planned} | dict(failed)
    if not records:
        reasons = dict.fromkeys(each for each in why.values() if each)
        raise DeviceError(f"Nothing of the suite {session.found.name} could be measured. " + " ".join(reasons))
    run = {each.combination.runtime for each in session.planned if each.combination.name in records}
    usual = run.pop() if len(run) == 1 else None
    rows = [_row(session, each.combination, records, why[each.combination.name], usual) for each in session.planned]
    folder = out / "records"
    _write_records(folder, records)
    document = _document(session, rows, list(records.values()))
    told = _conditions(document)
    write_bytes(out / "suite.csv", as_csv(rows).encode())
    heading = f"# {escaped(session.found.name)}"
    write_bytes(out / "suite.md", f"{heading}\n\n{as_markdown(rows)}\n{escaped(told)}\n".encode())
    write_json(out / "suite.json", document)  # last: that this session is over is read from it
    text = f"{as_text(rows)}\n\n{told}\nRecords: {folder}"
    bad = bool(failed) or any(each.failed for each in session.planned)
    return SuiteResult(rows, list(records.values()), document, text, int(bad))


def _write_records(folder: Path, records: Mapping[str, Record]) -> None:
    """Those of another session leave: beside these they would be taken for some of them."""
    written = {file_name(record, name): record for name, record in records.items()}
    for name, record in written.items():
        write_json(folder / name, record)
    for path in folder.glob("*.json"):
        if path.name not in written and _of_a_suite(path):
            path.unlink()


def _of_a_suite(path: Path) -> bool:
    """Whatever else lies there, readable or not, is its owner's."""
    try:
        document = read_json(path)
    except RunError:
        return False
    return isinstance(document, dict) and "suite" in document


def _row(session: Session, row: Combination, records: Mapping[str, Record], why: str | None, usual: str | None) -> Row:
    suite = session.found.suite
    label = way(row, suite, usual)
    record = records.get(row.name)
    if record is None:
        known: dict[str, Any] = {"precision": row.precision, "runtime": row.runtime, "threads": row.threads}
        return Row(row.model, label, **known, batch=row.batch, mode=row.mode, why=why)
    base = base_of(row, suite)
    compared = None
    if base != row and base.name in records:
        compared = ratio(records[base.name], record, _base_label(base, row, suite.base.model))
    note = RANDOM if session.subject(row).random else None
    return row_of(record, row.model, label, speed=compared, note=note, record=file_name(record, row.name))


def _base_label(base: Combination, row: Combination, model: str | None) -> str:
    """What differs between the two: "FP32", or "resnet18 FP32"."""
    parts = [base.model] if model is not None else []
    parts += [base.precision.upper()] if base.precision != row.precision or not parts else []
    parts += [base.runtime] if base.runtime != row.runtime else []
    parts += [f"{base.threads} thread{'s' if base.threads > 1 else ''}"] if base.threads != row.threads else []
    return " ".join(parts)


def _document(session: Session, rows: list[Row], records: Sequence[Record]) -> dict[str, Any]:
    """Without a path of this machine. `sessions`: ratios are of rows of one."""
    record, suite = records[0], session.found.suite
    sessions = list(dict.fromkeys(each["session"] for each in records))
    return {
        "schema": 1,
        "suite": session.found.name,
        "settings": suite.model_dump(mode="json", by_alias=True, exclude={"models"}),
        "models": {each.name: each.model.model_dump(mode="json", exclude={"path"}) for each in session.models},
        "session": sessions[0] if len(sessions) == 1 else None,
        "sessions": sessions,
        "started_at": min(each["started_at"] for each in records),
        "machine": record["machine"],
        "effort": told_effort(session.effort, session.repeats),
        "repeats": session.repeats,
        "sittings": session.sittings,
        "load_average": record["conditions"].get("load_average"),
        "rows": as_json(rows),
    }


def _conditions(document: Mapping[str, Any]) -> str:
    """What a reader of the table has to know, in sentences."""
    machine = document["machine"]
    name = machine.get("gpu") or machine.get("cpu") or machine.get("model") or machine.get("name")
    sittings = f", stopped and gone on with {document['sittings'] - 1} times" if document["sittings"] > 1 else ""
    several = len(document["sessions"])
    where = "one session" if several == 1 else f"{several} sessions"
    repeats = document["repeats"]
    rounds = f"{repeats} round{'s' if repeats > 1 else ''} in turn, in {where}{sittings}"
    publish = " Not for publication: --effort standard is." if document["effort"] == "quick" else ""
    return (
        f"{name}, effort {document['effort']}, {rounds}; ratios are of rows of one session, round by round.{publish} "
        "p90 of computing, of all times; its interval is of the rounds' centre."
    )
