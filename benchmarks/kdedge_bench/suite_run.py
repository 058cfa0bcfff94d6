"""`kdedge bench --suite`: every combination of a suite in turn, in one session, and its table.

DIR/records/*.json               one record a combination
DIR/suite.json, .csv, .md        the table
DIR/rounds/                      rounds that are over, while it runs; the same command goes on after them
"""

import contextlib
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import final

from kdedge import __version__
from kdedge.errors import RunError
from kdedge.runs import Run, read_json
from kdedge_bench.accuracy import accuracy_of
from kdedge_bench.records import Record, check_record
from kdedge_bench.remote_place import Place
from kdedge_bench.suite import Found, load, with_models
from kdedge_bench.suite_models import Subject, built, subjects
from kdedge_bench.suite_plan import plan
from kdedge_bench.suite_result import Session, SuiteResult, completed, finished
from kdedge_bench.suite_state import Kept, identity
from kdedge_device.alone import alone
from kdedge_device.bench_pool import pooled
from kdedge_device.bench_rounds import Told, new_session, one_round, one_turn
from kdedge_device.clock import EFFORTS, usual_rounds
from kdedge_device.failures import Failure
from kdedge_device.record import machine, now

__all__ = ["Stopped", "run_suite"]

Say = Callable[[str], None]


class Stopped(KeyboardInterrupt):
    """Ctrl-C; its text says what is kept."""


def run_suite(
    name: str,
    paths: Sequence[Path] = (),
    *,
    effort: str | None = None,
    repeats: int | None = None,
    threads: int | None = None,
    on: Place | None = None,
    out: Path | None = None,
    say: Say = lambda _: None,
) -> SuiteResult:
    """Measure a suite, shipped or a file, and write DIR. What is given here takes the place of what the suite says.

    `paths`: runs, bundles and .onnx files instead of its models. `on`: a board instead of this machine. RecipeError
    where the suite is wrong, RunError where a model is not there, DeviceError where nothing at all could be measured;
    Stopped with what is kept.
    """
    found = _given(load(name), paths, threads)
    effort = effort or found.suite.effort
    repeats = repeats or found.suite.repeats or usual_rounds(effort)
    asked = subjects(found, say)
    out = out or _usual_out(asked, found.name)
    with tempfile.TemporaryDirectory(prefix="kdedge-suite-") as folder:
        scratch = Path(folder)
        if on is not None:
            from kdedge_bench.suite_there import run_there

            return run_there(found, built(asked, found.suite, scratch, say), on, effort, repeats, out, say)
        with alone(say):
            models = built(asked, found.suite, scratch, say)
            planned = plan(found.suite, models, effort, repeats, say)
            session = Session(found, models, planned, effort, repeats)
            measured = _Measured(session, out, say)
            measured.all()
            return measured.result()


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

    def __init__(self, of: Session, out: Path, say: Say) -> None:
        self.of, self.out, self.say, self.repeats = of, out, say, of.repeats
        self.jobs = [each.job for each in of.planned if each.job is not None]
        self.failed: dict[str, Failure] = {}
        self.rounds: list[dict[str, Told]] = []
        self.session = self.sitting = new_session(now())
        what = {
            "suite": of.found.suite.model_dump(mode="json", by_alias=True),
            "files": {each.name: dict(each.hashes()) for each in of.models},
            "jobs": [job.name for job in self.jobs],
            "machine": machine()["name"],
            "versions": _versions(),
            "effort": [of.effort, of.repeats],
        }
        self.kept = Kept(out / "rounds", identity(what))

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
        if before.session is None or before.session == _over(self.out):
            self._say_how_long()
            if self.jobs:
                self.kept.begin()
            return
        self.session, self.rounds = before.session, before.rounds[: self.repeats]
        self.of = replace(self.of, sittings=before.sittings + (len(self.rounds) < self.repeats))
        self.failed = {name: Failure(why) for name, why in before.failed.items()}
        self.say(f"{len(self.rounds)} of {self.repeats} rounds were measured before; going on after them")

    def _say_how_long(self) -> None:
        effort = EFFORTS[self.of.effort]
        run = [each.combination for each in self.of.planned if each.job is not None]
        # With the images of a bundle, single stream is timed end to end, too, for as long; at most the standard effort.
        whole = [each for each in run if each.mode == "single stream" and self.of.subject(each).bundle]
        again = min(effort.seconds, EFFORTS["standard"].seconds) + effort.warm_up_seconds
        least = (len(run) * (effort.seconds + effort.warm_up_seconds) + len(whole) * again) / 60
        count = f"{len(run)} of {len(self.of.planned)} combinations run here"
        self.say(f"{count}, {self.repeats} rounds in turn: at least {max(least, 0.1):.1f} minutes")

    def result(self) -> SuiteResult:
        """On disk. What cannot be written leaves the rounds, from which the same command goes on."""
        records = self._records()
        why = {name: str(error) for name, error in self.failed.items()}
        found = finished(self.of, records, why, self.out)
        self.kept.remove()
        return found

    def _records(self) -> dict[str, Record]:
        """By the combination's name."""
        found: dict[str, Record] = {}
        for each in self.of.planned:
            name = each.combination.name
            told = [round_[name] for round_ in self.rounds if name in round_]
            if not told or name in self.failed:
                continue
            record = completed(self.of, check_record(pooled(told, self.session), Path(name)), each.combination)
            subject = self.of.subject(each.combination)
            if subject.path is not None and not subject.random:
                record["accuracy"] = accuracy_of(record, subject.path, self.say)
            found[name] = record
        return found


def _over(out: Path) -> str | None:
    """The session whose table lies in `out`: its rounds, where they could not be removed, are none to go on with."""
    path = out / "suite.json"
    try:
        document = read_json(path) if path.is_file() else None
    except RunError:
        return None
    return document.get("session") if isinstance(document, dict) else None


def _versions() -> dict[str, str]:
    """Of everything that is timed: rounds before and after an update are of two measurements."""
    found = {"kdedge": __version__, "python": platform.python_version()}
    for name in ("onnxruntime", "openvino", "tensorrt", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
