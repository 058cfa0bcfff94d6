"""The combinations of a suite in the order in which they are measured, and why some of them cannot run here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from kdedge_bench.suite import Base, Precision, Runtime, Suite
from kdedge_bench.suite_models import Subject
from kdedge_device.bench_all import Wish, field
from kdedge_device.bench_offline import MLPERF_SAMPLES
from kdedge_device.bench_rounds import Job
from kdedge_device.choose_runner import why_not_onnxruntime
from kdedge_device.clock import EFFORTS
from kdedge_device.failures import Failure
from kdedge_device.manifest import Bundle
from kdedge_device.openvino_runner import why_not_openvino
from kdedge_device.trt import load_tensorrt

__all__ = ["Combination", "Planned", "base_of", "combinations", "plan", "way"]

Mode = Literal["single stream", "offline"]
Say = Callable[[str], None]


@final
@dataclass(frozen=True)
class Combination:
    """One row: a model, and how it is run. `precision` is of the network's body, `batch` images a call."""

    model: str
    precision: Precision
    runtime: Runtime
    threads: int
    batch: int
    mode: Mode

    @property
    def name(self) -> str:
        """Letters, digits and dashes: part of a file's name."""
        mode = "offline" if self.mode == "offline" else "single"
        return f"{self.model}-{self.precision}-{self.runtime}-t{self.threads}-b{self.batch}-{mode}"


@final
@dataclass(frozen=True)
class Planned:
    """A combination, and what measures it; or `why` nothing does here. `failed`: it should have run."""

    combination: Combination
    job: Job | None
    why: str | None = None
    failed: bool = False


def combinations(suite: Suite, models: Sequence[str]) -> list[Combination]:
    """Model by model, so that what is compared most is measured side by side."""
    modes: list[tuple[Mode, int]] = [("single stream", batch) for batch in suite.single_stream]
    modes += [("offline", batch) for batch in suite.offline]
    return [
        Combination(model, precision, runtime, threads, batch, mode)
        for model in models
        for mode, batch in modes
        for threads in suite.threads
        for runtime in suite.runtimes
        for precision in suite.precisions
    ]


def base_of(row: Combination, suite: Suite) -> Combination:
    """The combination that `row` is compared with: that of the suite's base, and else as the row itself."""
    base = suite.base if suite.base != Base() else Base(precision=suite.precisions[0])
    return Combination(
        base.model or row.model,
        base.precision or row.precision,
        base.runtime or row.runtime,
        base.threads or row.threads,
        row.batch,
        row.mode,
    )


def way(row: Combination, suite: Suite, usual: str | None = None) -> str:
    """What a table calls it: the precision, and whatever differs between the rows of this suite.

    `usual`: the one runtime that runs here, which goes without saying.
    """
    parts = [row.precision.upper()]
    parts += [row.runtime] if len(suite.runtimes) > 1 and row.runtime != usual else []
    parts += [f"{row.threads} thread{'s' if row.threads > 1 else ''}"] if len(suite.threads) > 1 else []
    parts += ["offline"] if row.mode == "offline" else []
    several = len(suite.offline if row.mode == "offline" else suite.single_stream) > 1
    parts += [f"batch {row.batch}"] if several or row.batch > 1 else []
    return ", ".join(parts)


def plan(suite: Suite, subjects: Sequence[Subject], effort: str, repeats: int, say: Say) -> list[Planned]:
    """What each combination is measured with, engines of TensorRT built where it is here; `effort` in `repeats`."""
    return [
        each for subject in subjects for each in _Planner(suite, subject, effort, repeats, say).all()
    ]  # the order of `combinations`


@final
class _Planner:
    """Of one model. Engines are looked for once a batch."""

    def __init__(self, suite: Suite, subject: Subject, effort: str, repeats: int, say: Say) -> None:
        self.suite, self.subject, self.effort, self.repeats, self.say = suite, subject, effort, repeats, say
        self.engines: dict[tuple[int, int, str], Any] = {}

    def all(self) -> list[Planned]:
        return [self._planned(each) for each in combinations(self.suite, [self.subject.name])]

    def _planned(self, row: Combination) -> Planned:
        try:
            if self.subject.bundle is None:
                return self._of_file(row)
            return self._of_bundle(row, Bundle(self.subject.bundle))
        except Failure as error:
            return Planned(row, None, str(error), failed=True)

    def _of_file(self, row: Combination) -> Planned:
        path, found = self.subject.path, self.subject.precision
        assert path is not None
        if row.precision != found:
            told = f"{path.name} is in {str(found).upper()}"
            return Planned(row, None, f"{told}; other files are made of a float one by: kdedge export {path.name}")
        if row.runtime == "tensorrt":
            return Planned(row, None, f"{path.name} is no bundle, which engines are built of. Make one: kdedge export")
        if row.runtime == "openvino" and (why := why_not_openvino()):
            return Planned(row, None, why)
        return Planned(row, Job(row.name, [str(path), *_with(row.runtime), *self._words(row)]))

    def _of_bundle(self, row: Combination, bundle: Bundle) -> Planned:
        if row.runtime == "tensorrt":
            return self._engine(row, bundle)
        why = _lacks(bundle, row.precision)
        if row.runtime == "openvino":
            why = why or why_not_openvino()
        else:
            why = why or why_not_onnxruntime(bundle, row.precision)
        if why:
            return Planned(row, None, why)
        chosen = ["--artifact", row.precision, *_with(row.runtime)]
        return Planned(row, Job(row.name, [bundle.path, *chosen, *self._words(row)]))

    def _engine(self, row: Combination, bundle: Bundle) -> Planned:
        """Built first where it is missing. Without TensorRT nothing of a processor stands in for it."""
        try:
            load_tensorrt()
        except Failure as error:
            return Planned(row, None, str(error))
        key = (row.batch, row.threads, row.mode)
        if key not in self.engines:
            self.engines[key] = field(bundle, self._words(row), Wish(batch=row.batch, build=True))
        found = self.engines[key]
        names = ("trt", "trt-fp16", "int8") if row.precision == "int8" else (row.precision,)
        for job in found.jobs:
            if job.name in names:
                return Planned(row, job._replace(name=row.name))
        for name in names:
            if name in found.failed:
                return Planned(row, None, str(found.failed[name]), failed=True)
        reasons = [found.not_run[name] for name in names if name in found.not_run]
        return Planned(row, None, next(iter(reasons), _lacks(bundle, row.precision) or "There is no engine of it."))

    def _words(self, row: Combination) -> list[str]:
        share = EFFORTS[self.effort].split(self.repeats)
        offline = row.mode == "offline"
        runs = -(-MLPERF_SAMPLES // self.repeats) if offline and self.effort == "mlperf" else share.runs
        words = ["--seconds", repr(share.seconds), "--runs", str(runs), "--warm-up", repr(share.warm_up_seconds)]
        words += ["--threads", str(row.threads), "--batch", str(row.batch)]
        return [*words, "--offline"] if offline else words


def _with(runtime: str) -> list[str]:
    return ["--runtime", runtime] if runtime == "openvino" else []


def _lacks(bundle: Bundle, precision: str) -> str:
    if precision in bundle.artifacts:
        return ""
    has = ", ".join(sorted(bundle.artifacts))
    flag = "" if precision == "fp32" else f" Export it with: kdedge export --{precision}"
    return f"The bundle has no file in {precision.upper()}; it has {has}.{flag}"
