"""`kdedge bench --suite`: every combination of a suite in turn, in one session, and its table.

DIR/records/*.json               one record a combination
DIR/suite.json, .csv, .md        the table
DIR/rounds/                      rounds that are over, while it runs; the same command goes on after them
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from kdedge.errors import DeviceError
from kdedge.runs import Run, read_json, write_bytes, write_json
from kdedge_bench.accuracy import accuracy_of
from kdedge_bench.records import Record, check_record, file_name
from kdedge_bench.rows import Row, ratio, row_of
from kdedge_bench.rows_table import as_csv, as_json, as_markdown, as_text
from kdedge_bench.suite import Found, load, with_models
from kdedge_bench.suite_models import Subject, built, subjects
from kdedge_bench.suite_plan import Combination, Planned, base_of, plan, way
from kdedge_bench.suite_state import Kept, identity
from kdedge_device.alone import alone
from kdedge_device.bench_pool import pooled
from kdedge_device.bench_rounds import Told, new_session, one_round, one_turn
from kdedge_device.clock import EFFORTS, told_effort, usual_rounds
from kdedge_device.failures import Failure
from kdedge_device.record import machine, now

__all__ = ["Stopped", "SuiteResult", "run_suite"]

RANDOM = "random weights: speed only"
Say = Callable[[str], None]


class Stopped(KeyboardInterrupt):
    """Ctrl-C; its text says what is kept."""


@final
@dataclass(frozen=True)
class SuiteResult:
    """`document`: what suite.json holds. `exit_code`: 1 where a combination that should run here failed."""

    rows: list[Row]
    records: list[Record]
    document: dict[str, Any]
    text: str
    exit_code: int


def run_suite(
    name: str,
    paths: Sequence[Path] = (),
    *,
    effort: str | None = None,
    repeats: int | None = None,
    threads: int | None = None,
    out: Path | None = None,
    say: Say = lambda _: None,
) -> SuiteResult:
    """Measure a suite, shipped or a file, and write DIR. What is given here takes the place of what the suite says.

    `paths`: runs, bundles and .onnx files instead of its models. RecipeError where the suite is wrong, RunError where a
    model is not there, DeviceError where nothing at all could be measured; Stopped with what is kept.
    """
    found = _given(load(name), paths, threads)
    effort = effort or found.suite.effort
    repeats = repeats or found.suite.repeats or usual_rounds(effort)
    asked = subjects(found, say)
    out = out or _usual_out(asked, found.name)
    with tempfile.TemporaryDirectory(prefix="kdedge-suite-") as scratch, alone(say):
        models = built(asked, found.suite, Path(scratch), say)
        planned = plan(found.suite, models, effort, repeats, say)
        measured = _Measured(found, models, planned, effort, repeats, out, say)
        measured.all()
        return measured.written()


def _given(found: Found, paths: Sequence[Path], threads: int | None) -> Found:
    found = with_models(found, paths) if paths else found
    if threads is None:
        return found
    base = found.suite.base.model_copy(update={"threads": None})
    return found.model_copy(update={"suite": found.suite.model_copy(update={"threads": (threads,), "base": base})})


def _usual_out(models: Sequence[Subject], name: str) -> Path:
    """RUN/bench/<suite> where all is of one run; else ./bench/<suite>."""
    if len(models) == 1 and models[0].bundle is not None:
        run = Run(models[0].bundle.parent)
        if models[0].bundle.name == run.bundle_path.name and run.manifest_path.is_file():
            return run.bench_path / name
    return Path("bench") / name


@final
class _Measured:
    """One session of a suite: its rounds, then what they come to."""

    def __init__(
        self,
        found: Found,
        models: Sequence[Subject],
        planned: Sequence[Planned],
        effort: str,
        repeats: int,
        out: Path,
        say: Say,
    ) -> None:
        self.found, self.models, self.planned = found, {each.name: each for each in models}, planned
        self.effort, self.repeats, self.out, self.say = effort, repeats, out, say
        self.jobs = [each.job for each in planned if each.job is not None]
        self.failed: dict[str, Failure] = {}
        self.rounds: list[dict[str, Told]] = []
        self.session = self.sitting = new_session(now())
        self.sittings = 1
        of = {
            "suite": found.suite.model_dump(mode="json", by_alias=True),
            "files": {each.name: dict(each.hashes()) for each in models},
            "jobs": [job.name for job in self.jobs],
            "machine": machine()["name"],
            "effort": [effort, repeats],
        }
        self.kept = Kept(out / "rounds", identity(of))

    def all(self) -> None:
        """The rounds that are still missing. Stopped where the user does."""
        self._begin()
        try:
            while len(self.rounds) < self.repeats and self.jobs:
                number = len(self.rounds)
                told = one_turn(self.jobs, number, self.repeats, one_round, self.say, self.failed)
                why = {name: str(error) for name, error in self.failed.items()}
                self.kept.add(number, self.session, self.sitting, told, why)
                self.rounds.append(told)
        except KeyboardInterrupt:
            done = len(self.rounds)
            told_of = f"{done} of {self.repeats} rounds are kept in {self.kept.folder}, and" if done else "Then"
            raise Stopped(f"Stopped by Ctrl-C. {told_of} the same command goes on from there.") from None

    def _begin(self) -> None:
        before = self.kept.read()
        if before.session is None:
            self._say_how_long()
            if self.jobs:
                self.kept.begin()
            return
        self.session, self.rounds = before.session, before.rounds[: self.repeats]
        self.sittings = before.sittings + (len(self.rounds) < self.repeats)
        self.failed = {name: Failure(why) for name, why in before.failed.items()}
        self.say(f"{len(self.rounds)} of {self.repeats} rounds were measured before; going on after them")

    def _say_how_long(self) -> None:
        effort = EFFORTS[self.effort]
        run = [each.combination for each in self.planned if each.job is not None]
        # With the images of a bundle, single stream is timed end to end, too, for as long; at most the standard effort.
        whole = [each for each in run if each.mode == "single stream" and self.models[each.model].bundle]
        again = min(effort.seconds, EFFORTS["standard"].seconds) + effort.warm_up_seconds
        least = (len(run) * (effort.seconds + effort.warm_up_seconds) + len(whole) * again) / 60
        count = f"{len(run)} of {len(self.planned)} combinations run here"
        self.say(f"{count}, {self.repeats} rounds in turn: at least {max(least, 0.1):.1f} minutes")

    def written(self) -> SuiteResult:
        """The records and the table, on disk. DeviceError where there is not a single record."""
        records = self._records()
        if not records:
            reasons = dict.fromkeys(why for each in self.planned if (why := self._why(each)))
            raise DeviceError(f"Nothing of the suite {self.found.name} could be measured. " + " ".join(reasons))
        rows = [self._row(each, records) for each in self.planned]
        folder = self.out / "records"
        written = {file_name(record, record["artifact"]["name"]): record for record in records.values()}
        for name, record in written.items():
            write_json(folder / name, record)
        for path in folder.glob("*.json"):
            if path.name not in written and "suite" in read_json(path):
                path.unlink()  # of another session: beside these it would be taken for one of them
        document = self._document(rows, next(iter(records.values())))
        write_json(self.out / "suite.json", document)
        write_bytes(self.out / "suite.csv", as_csv(rows).encode())
        title = f"# {self.found.name}\n\n"
        write_bytes(self.out / "suite.md", (title + as_markdown(rows) + "\n" + _conditions(document) + "\n").encode())
        self.kept.remove()
        failed = bool(self.failed) or any(each.failed for each in self.planned)
        text = f"{as_text(rows)}\n\n{_conditions(document)}\nRecords: {folder}"
        return SuiteResult(rows, list(records.values()), document, text, int(failed))

    def _records(self) -> dict[str, Record]:
        """By the combination's name."""
        found: dict[str, Record] = {}
        for each in self.planned:
            name = each.combination.name
            told = [round_[name] for round_ in self.rounds if name in round_]
            if not told or name in self.failed:
                continue
            record = check_record(pooled(told, self.session), Path(name))
            found[name] = self._completed(record, each.combination)
        return found

    def _completed(self, record: Record, row: Combination) -> Record:
        subject = self.models[row.model]
        record["conditions"]["effort"] = told_effort(self.effort, self.repeats)
        record["artifact"] |= {"name": row.name, "precision": row.precision}
        record["suite"] = {
            "name": self.found.name,
            "combination": asdict(row),
            "weights": "random" if subject.random else None,
            "sittings": self.sittings,
        }
        if subject.path is not None and not subject.random:
            record["accuracy"] = accuracy_of(record, subject.path, self.say)
        return record

    def _why(self, planned: Planned) -> str | None:
        error = self.failed.get(planned.combination.name)
        return planned.why if error is None else str(error)

    def _row(self, planned: Planned, records: Mapping[str, Record]) -> Row:
        row, suite = planned.combination, self.found.suite
        label = way(row, suite, self._usual_runtime)
        record = records.get(row.name)
        if record is None:
            known: dict[str, Any] = {"precision": row.precision, "runtime": row.runtime, "threads": row.threads}
            return Row(row.model, label, **known, batch=row.batch, mode=row.mode, why=self._why(planned))
        base = base_of(row, suite)
        compared = None
        if base != row and base.name in records:
            compared = ratio(records[base.name], record, _base_label(base, row, suite.base.model))
        note = RANDOM if self.models[row.model].random else None
        return row_of(record, row.model, label, speed=compared, note=note, record=file_name(record, row.name))

    @property
    def _usual_runtime(self) -> str | None:
        """Where it is the only one that runs here."""
        run = {each.combination.runtime for each in self.planned if each.job is not None}
        return run.pop() if len(run) == 1 else None

    def _document(self, rows: list[Row], record: Record) -> dict[str, Any]:
        return {
            "schema": 1,
            "suite": self.found.name,
            "settings": self.found.suite.model_dump(mode="json", by_alias=True, exclude={"models"}),
            "models": {
                name: each.model.model_dump(mode="json", exclude={"path"}) for name, each in self.models.items()
            },
            "session": self.session,
            "started_at": record["started_at"],
            "machine": record["machine"],
            "effort": told_effort(self.effort, self.repeats),
            "repeats": self.repeats,
            "sittings": self.sittings,
            "load_average": record["conditions"].get("load_average"),
            "rows": as_json(rows),
        }


def _base_label(base: Combination, row: Combination, model: str | None) -> str:
    """What differs between the two: "FP32", or "resnet18 FP32"."""
    parts = [base.model] if model is not None else []
    parts += [base.precision.upper()] if base.precision != row.precision or not parts else []
    parts += [base.runtime] if base.runtime != row.runtime else []
    parts += [f"{base.threads} thread{'s' if base.threads > 1 else ''}"] if base.threads != row.threads else []
    return " ".join(parts)


def _conditions(document: Mapping[str, Any]) -> str:
    """What a reader of the table has to know, in sentences."""
    machine_ = document["machine"]
    name = machine_.get("gpu") or machine_.get("cpu") or machine_.get("model") or machine_.get("name")
    sittings = f", stopped and gone on with {document['sittings'] - 1} times" if document["sittings"] > 1 else ""
    rounds = f"{document['repeats']} rounds in turn, in one session{sittings}"
    publish = " Not for publication: --effort standard is." if document["effort"] == "quick" else ""
    return (
        f"{name}, effort {document['effort']}, {rounds}; ratios are of rows of this session, round by round.{publish} "
        "p90 of computing, of all times; its interval is of the rounds' centre."
    )
