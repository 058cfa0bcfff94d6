"""What is measured on a GPU: a flat list of jobs, each one command, and the record that each leaves.

A job that trains is `kdedge train-recipe`, which goes on with --resume where it was stopped. All of them live in one
working folder, under which paths are relative, so that it may travel from machine to machine.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from kdedge.runs import Run, read_json
from kdedge_bench.gpu_sizes import Sizes

__all__ = [
    "IMAGES",
    "PILOT",
    "RESUMED",
    "SAME",
    "Job",
    "Program",
    "Training",
    "What",
    "Work",
    "jobs",
    "speed_lines",
]

What = Literal["cifar", "speed", "determinism"]

IMAGES = "cifar10-jpeg.packed"  # beside the working folder
PILOT, SAME, RESUMED = "pilot", "deterministic", "deterministic-resumed"


@final
@dataclass(frozen=True)
class Work:
    """The working folder. What it holds travels; the images beside it do not."""

    path: Path

    @property
    def horizon_path(self) -> Path:
        return self.path / "horizon.json"

    @property
    def slices_path(self) -> Path:
        return self.path / "slices.json"

    def run(self, name: str) -> Run:
        return Run(self.path / "runs" / name)

    def record(self, name: str) -> Path:
        return self.path / "records" / f"{name}.json"

    def slices(self) -> list[dict[str, Any]]:
        """One entry for each time that a job ran."""
        found: list[dict[str, Any]] = read_json(self.slices_path) if self.slices_path.is_file() else []
        return found


@final
@dataclass(frozen=True)
class Training:
    """A run of `kdedge train-recipe`. With `full_length` it takes steps and engine plan from what the pilot found."""

    name: str
    what: tuple[What, ...]
    about: str
    least_s: float
    settings: tuple[str, ...]
    needs: tuple[str, ...] = ()  # jobs that must be finished
    plan_of: Literal["outer", "inner"] | None = None  # the pilot's, for all stages; None: measured
    full_length: bool = False
    teacher_of: str | None = None  # the job whose outer network is this one's ready teacher
    stopped_once: bool = False  # on purpose, halfway through its outer network

    def argv(self, work: Work, recipe: Path, device: str) -> list[str]:
        """To be called in the folder that `work` lies in."""
        run = work.run(self.name)
        words = ["train-recipe", str(recipe), "--out", str(run.path.relative_to(work.path.parent)), "--device", device]
        words += [word for setting in self._settings(work) for word in ("--set", setting)]
        return [sys.executable, "-m", "kdedge", *words, *(["--resume"] if run.manifest_path.is_file() else [])]

    def _settings(self, work: Work) -> list[str]:
        """What follows --set; of two values of one key the later one."""
        found = dict(setting.split("=", 1) for setting in (f"data.spec={IMAGES}", *self.settings))
        if self.plan_of is not None:
            plans = work.run(PILOT).read_manifest()["engine_plan"]
            found["engine.plan"] = json.dumps(plans[self.plan_of]["plan"])
        if self.full_length:
            steps = read_json(work.horizon_path)["steps"]
            stages = ("student", "baseline") if self.teacher_of else ("teacher", "student", "baseline")
            found |= {f"{stage}.optim.total_steps": str(steps) for stage in stages}
        if self.teacher_of is not None:
            path = work.run(self.teacher_of).teacher_path
            found["teacher.ready"] = str(path.relative_to(work.path.parent))
        return [f"{key}={value}" for key, value in found.items()]

    def done(self, work: Work) -> bool:
        run = work.run(self.name)
        return run.manifest_path.is_file() and run.read_manifest().get("status") == "finished"

    def stop_here(self, work: Work) -> bool:
        """Whether it is to be stopped on purpose: it has not been, and half of its outer network's steps are logged."""
        path = work.run(self.name).metrics_path
        if not self.stopped_once or not path.is_file() or any(entry["job"] == self.name for entry in work.slices()):
            return False
        lines = speed_lines(path, "outer")
        return bool(lines) and 2 * int(lines[-1]["step"]) >= int(lines[-1]["total_steps"])

    def findings(self, work: Work) -> dict[str, Any]:
        """What the finished run says of itself."""
        run = work.run(self.name)
        manifest = run.read_manifest()
        told = ("versions", "host", "device", "engine_plan", "stages", "recipe_sha256", "data_fingerprint")
        return {"settings": self._settings(work), "result": read_json(run.result_path)} | {
            name: manifest[name] for name in told
        }


@final
@dataclass(frozen=True)
class Program:
    """A measurement of this package that leaves one record: a race of our step against others, or a profile of it."""

    name: str
    what: tuple[What, ...]
    about: str
    least_s: float
    module: str
    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()
    teacher_of: None = None

    def argv(self, work: Work, recipe: Path, device: str) -> list[str]:
        """To be called in the folder that `work` lies in."""
        out = self._out(work).relative_to(work.path.parent)
        return [sys.executable, "-m", self.module, *self.flags, "--device", device, "--out", str(out)]

    def _out(self, work: Work) -> Path:
        return work.path / "races" / f"{self.name}.json"

    def done(self, work: Work) -> bool:
        return self._out(work).is_file()

    def stop_here(self, work: Work) -> bool:
        return False

    def findings(self, work: Work) -> dict[str, Any]:
        """What it recorded."""
        found: dict[str, Any] = read_json(self._out(work))
        return found


Job = Training | Program


def _speed(sizes: Sizes) -> Iterator[Program]:
    about = "unlabeled images a second, ours and Pillow's way"
    for network, precision in sizes.races:
        flags = ("--networks", network, "--precisions", precision, *sizes.race)
        yield Program(
            f"speed-{network}-{precision}", ("speed",), about, sizes.race_s, "kdedge_bench.engine_race", flags
        )
    about = "where the time of a step goes, and how many operations it is"
    for network, mode in sizes.profiles:
        flags = ("--networks", network, "--compile", mode, "--compile-views", mode, *sizes.profile)
        name = f"parts-{network}" if mode == "none" else f"parts-{network}-{mode}"
        yield Program(name, ("speed",), about, sizes.profile_s, "kdedge_bench.engine_profile", flags)


def jobs(sizes: Sizes) -> tuple[Job, ...]:
    """Every job, in the order of making.

    A row's students come right after it: while they wait for their turn, their teacher takes room in what travels.
    """
    pilot = (
        f"teacher.optim.total_steps={sizes.pilot_steps}",
        f"student.optim.total_steps={sizes.pilot_steps}",
        "student.arch=mobilenet-v2",
        f"data.labels={sizes.student_labels}",
        "baseline.enabled=false",
        *sizes.settings,
        *sizes.of_students,
    )
    sure = (*pilot, "engine.deterministic=true")
    found: list[Job] = [
        *_speed(sizes),
        Training(PILOT, ("cifar", "determinism"), "how long a step takes", sizes.least_s, pilot),
        Training(SAME, ("determinism",), "the pilot, bit for bit", sizes.least_s, sure, (PILOT,), "outer"),
        Training(
            RESUMED, ("determinism",), "the same, stopped halfway", sizes.least_s, sure, (PILOT,), "outer",
            stopped_once=True,
        ),
    ]  # fmt: skip
    for labels in sizes.labels:
        row, given = f"cifar10-{labels}", (f"data.labels={labels}", *sizes.settings)
        about = f"{labels} labels: labels only, FixMatch (the outer network) and KD-FixMatch"
        of_row = (*given, *sizes.of_rows)
        found.append(Training(row, ("cifar",), about, sizes.least_s, of_row, (PILOT,), "outer", full_length=True))
        for arch in sizes.students if labels == sizes.student_labels else ():
            found.append(
                Training(
                    f"{arch}-{labels}",
                    ("cifar",),
                    f"{arch} taught by the outer network of {row}",
                    sizes.least_s,
                    (*given, *sizes.of_students, f"student.arch={arch}"),
                    (PILOT, row),
                    "inner",
                    full_length=True,
                    teacher_of=row,
                )
            )
    return tuple(found)


def speed_lines(path: Path, stage: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that tell a stage's speed; a line cut off by a kill is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["stage"] == stage and entry.get("images_per_second"):
            found.append(entry)
    return found
