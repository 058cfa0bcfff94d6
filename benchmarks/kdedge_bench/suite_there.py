"""A suite on a board: `run.pyz bench` of each model, once for each number of threads, batch and mode.

The files of one call take turns there, in a session of their own, so that precisions have ratios and threads have none.
Stopped, it begins anew, but for the call that runs there, which goes on.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from kdedge.errors import KdedgeError
from kdedge_bench.accuracy_there import score_there
from kdedge_bench.measured import Names, Target, written
from kdedge_bench.records import Record
from kdedge_bench.remote import ConnectionLost, Place, finished_on
from kdedge_bench.remote_place import shown
from kdedge_bench.suite import Found
from kdedge_bench.suite_models import Subject
from kdedge_bench.suite_plan import Combination, Planned, combinations
from kdedge_bench.suite_result import Session, SuiteResult, completed, finished

__all__ = ["run_there"]

Say = Callable[[str], None]


def run_there(
    found: Found, models: Sequence[Subject], place: Place, effort: str, repeats: int, out: Path, say: Say
) -> SuiteResult:
    """DeviceError where nothing could be measured, or the board is gone; the same call takes up what runs there."""
    rows = combinations(found.suite, [each.name for each in models])
    session = Session(found, models, [Planned(row, None) for row in rows], effort, repeats)
    records: dict[str, Record] = {}
    why: dict[str, str] = {}
    failed: dict[str, str] = {}
    for call in _calls(rows):
        try:
            told, reasons, broke = _measured(session, call[0], place, say)
        except ConnectionLost:
            raise
        except KdedgeError as error:
            if not records:  # a board that cannot be reached, or lacks something, does so for every call
                raise
            failed |= {row.name: str(error) for row in call}
            say(f"{place.name}: {error}")
            continue
        for row in call:
            record = told.get((row.precision, row.runtime))
            if record is not None:
                records[row.name] = completed(session, record, row)
            elif reason := _told_of(row, broke):
                failed[row.name] = reason
            else:
                why[row.name] = _told_of(row, reasons) or f"{place.name} does not run it with {row.runtime}."
    planned = [Planned(row, None, why.get(row.name)) for row in rows]
    done = Session(found, models, planned, effort, repeats)
    return finished(done, records, failed, out)


def _calls(rows: Sequence[Combination]) -> Iterator[list[Combination]]:
    """Those that one call of `run.pyz bench --artifact all` measures: all precisions and runtimes."""
    for _, call in groupby(rows, key=lambda row: (row.model, row.mode, row.batch, row.threads)):
        yield list(call)


def _measured(
    session: Session, row: Combination, place: Place, say: Say
) -> tuple[dict[tuple[str, str], Record], dict[str, str], dict[str, str]]:
    """(records by precision and runtime, why artifacts are not run there, why they failed there)."""
    subject = session.subject(row)
    assert subject.path is not None
    bare = subject.bundle is None
    words = ["bench", *([] if bare else ["--artifact", "all", "--build"]), "--rounds", str(session.repeats)]
    words += ["--effort", session.effort, "--threads", str(row.threads), "--batch", str(row.batch)]
    words += ["--offline"] if row.mode == "offline" else []
    with tempfile.TemporaryDirectory() as folder:  # under the names of a board two calls have the same ones
        target = Target(subject.path, subject.path.stem if bare else None, Path(folder))
        names = Names()
        # What was exported for this suite has another path the next time, and would pile up there.
        with finished_on(place, target.path, words, say=say, clean=subject.random) as document:
            records = written(document, target, str(place), names)
        if not bare and not subject.random:
            score_there(place, target, records, names, say)
    by = {(_precision(record, subject), str(record["artifact"].get("runtime"))): record for record in records}
    return by, _sentences(document.get("not_run")), _sentences(document.get("failed"))


def _precision(record: Record, subject: Subject) -> str:
    return str(record["artifact"].get("precision") or subject.precision)


def _sentences(told: Any) -> dict[str, str]:
    """By the names of artifacts, or of a runtime that is not there. Text of a board may hold anything."""
    return {str(name): shown(str(why), 2000) for name, why in told.items()} if isinstance(told, dict) else {}


def _told_of(row: Combination, reasons: Mapping[str, str]) -> str | None:
    """What the board said of the file that this row would run."""
    names = {"onnxruntime": (row.precision,), "openvino": (), "tensorrt": ("tensorrt", row.precision)}[row.runtime]
    if row.runtime == "tensorrt" and row.precision == "int8":
        names = ("tensorrt", "trt", "trt-fp16")
    return next((reasons[name] for name in names if name in reasons), None)
