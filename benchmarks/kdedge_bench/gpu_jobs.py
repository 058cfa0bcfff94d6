"""What is measured on a GPU: a flat list of jobs, each one command, and the record that each leaves.

A job that trains is `kdedge train-recipe`, which goes on with --resume where it was stopped. All of them live in one
working folder, under which paths are relative, so that it may travel from machine to machine.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from kdedge.errors import RunError
from kdedge.runs import Run, read_json

__all__ = [
    "IMAGES",
    "PILOT",
    "REAL",
    "RESUMED",
    "SAME",
    "TOY",
    "Job",
    "Race",
    "Sizes",
    "Training",
    "What",
    "Work",
    "determinism",
    "horizon",
    "jobs",
]

What = Literal["cifar", "speed", "determinism"]

IMAGES = "cifar10-jpeg.packed"  # beside the working folder
PILOT, SAME, RESUMED = "pilot", "deterministic", "deterministic-resumed"
_TRAINING_SHARE = 0.85  # of the minutes; the rest reads images, measures plans, scores, clusters and saves
_SUPERVISED_SHARE = 0.1  # of a FixMatch step's time, for a step on the labeled images alone


@dataclass(frozen=True)
class Sizes:
    """How large everything is. The toy shrinks numbers; the code is the same."""

    labels: tuple[int, ...]  # of the rows
    students: tuple[str, ...]  # taught by the outer network of `student_labels`
    student_labels: int
    pilot_steps: int
    steps: tuple[int, int]  # the least and the most that the horizon may be
    least_s: float  # a run is not begun, or gone on with, where less is left of the slice
    race_s: float  # nor a race, which cannot be gone on with
    races: tuple[tuple[str, str], ...]  # network and precision of each
    race: tuple[str, ...]
    settings: tuple[str, ...] = ()  # of every run
    of_rows: tuple[str, ...] = ()
    of_students: tuple[str, ...] = ()
    images_a_class: int | None = None  # None: all, and the archive must be the known one


REAL = Sizes(
    labels=(4000, 250, 40),
    students=("mobilenet-v2", "mobilenet-v3-small"),
    student_labels=250,
    pilot_steps=200,
    steps=(200, 2**20),
    least_s=40.0,
    race_s=100.0,
    races=tuple(
        (network, precision) for network in ("wide-resnet-28-2", "mobilenet-v2") for precision in ("fp32", "bf16")
    ),
    race=(
        *("--sides", "published", "supervised", "--workers", "16"),
        *("--labeled", "64", "--ratio", "7", "--rounds", "3", "--seconds", "2"),
    ),
)
TOY = Sizes(
    labels=(20,),
    students=("mobilenet-v2",),
    student_labels=20,
    pilot_steps=4,
    steps=(6, 6),
    least_s=0.0,
    race_s=0.0,
    races=(("wide-resnet-10-1", "fp32"),),
    race=(
        *("--sides", "supervised", "--workers", "1"),
        *("--labeled", "2", "--ratio", "1", "--rounds", "1", "--seconds", "0.1"),
    ),
    settings=(
        "data.image_px=8",
        "teacher.arch=wide-resnet-10-1",
        "teacher.optim.labeled_batch=4",
        "teacher.optim.unlabeled_ratio=2",
        "student.optim.labeled_batch=4",
        "student.optim.unlabeled_ratio=2",
        "baseline.optim.labeled_batch=4",
        "engine.log_every_steps=1",
        "engine.checkpoint_every_s=0",  # at every step, so that a test may stop it anywhere
        "engine.plan={threads: 1}",
    ),
    of_rows=("student.arch=wide-resnet-10-1",),
    of_students=("student.width=0.25",),
    images_a_class=8,
)


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
        lines = _lines(path, "outer")
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
class Race:
    """Our step against Pillow in worker processes and against a plain supervised step, on the same networks."""

    name: str
    what: tuple[What, ...]
    about: str
    least_s: float
    network: str
    precision: str
    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()
    teacher_of: None = None

    def argv(self, work: Work, recipe: Path, device: str) -> list[str]:
        out = self._out(work).relative_to(work.path.parent)
        words = [
            "--networks",
            self.network,
            "--precisions",
            self.precision,
            *self.flags,
            "--device",
            device,
            "--out",
            str(out),
        ]
        return [sys.executable, "-m", "kdedge_bench.engine_race", *words]

    def _out(self, work: Work) -> Path:
        return work.path / "races" / f"{self.name}.json"

    def done(self, work: Work) -> bool:
        return self._out(work).is_file()

    def stop_here(self, work: Work) -> bool:
        return False

    def findings(self, work: Work) -> dict[str, Any]:
        """The record of the race."""
        found: dict[str, Any] = read_json(self._out(work))
        return found


Job = Training | Race


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
    about = "unlabeled images a second, ours and Pillow's way"
    found: list[Job] = [
        *(
            Race(f"speed-{network}-{precision}", ("speed",), about, sizes.race_s, network, precision, sizes.race)
            for network, precision in sizes.races
        ),
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


def _lines(path: Path, stage: str) -> list[dict[str, Any]]:
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


def _step_s(run: Run, stage: str) -> float:
    """Seconds of a step: the median over the lines of the second half, behind compiling and warming up."""
    lines = _lines(run.metrics_path, stage)
    if not lines:
        raise RunError(f"{run.metrics_path} tells no speed of stage {stage}; a finished run was expected.")
    recipe = run.read_manifest()["recipe"]
    optim = recipe["teacher" if stage == "outer" else "student"]["optim"]
    images = optim["labeled_batch"] * (1 + 2 * optim["unlabeled_ratio"])
    return float(images / statistics.median(line["images_per_second"] for line in lines[len(lines) // 2 :]))


def horizon(work: Work, sizes: Sizes, minutes: float) -> dict[str, Any]:
    """How many steps every stage of the rows and students takes, so that all of them end within `minutes` here.

    Written down before the first row and never changed: what comes out has no say in it.
    """
    pilot = work.run(PILOT)
    teacher_s, student_s = _step_s(pilot, "outer"), _step_s(pilot, "inner")
    rows, students = len(sizes.labels), len(sizes.students)
    one_step_s = rows * (2 + _SUPERVISED_SHARE) * teacher_s + students * (1 + _SUPERVISED_SHARE) * student_s
    steps = int(60 * minutes * _TRAINING_SHARE / one_step_s)
    least, most = sizes.steps
    return {
        "steps": min(most, max(least, steps // 100 * 100)),
        "minutes": minutes,
        "step_s": {"wide-resnet": round(teacher_s, 6), "mobilenet": round(student_s, 6)},
        "device": pilot.read_manifest()["device"],
    }


def determinism(work: Work) -> dict[str, Any]:
    """Whether two runs with engine.deterministic, one of them stopped and resumed, end with equal weights; its cost."""
    plain, same, resumed = (work.run(name) for name in (PILOT, SAME, RESUMED))
    hashes = {
        run.path.name: {stage: facts["sha256"] for stage, facts in run.read_manifest()["stages"].items()}
        for run in (plain, same, resumed)
    }
    step_s = {run.path.name: round(_step_s(run, "outer"), 6) for run in (plain, same)}
    return {
        "equal_after_resume": hashes[SAME] == hashes[RESUMED],
        "sha256": hashes,
        "step_s": step_s,  # of the outer network
        "cost_fraction": round(step_s[SAME] / step_s[PILOT] - 1, 4),
    }
