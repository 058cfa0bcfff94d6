"""What follows from several runs on a GPU: how long the others may be, and what determinism gives and costs."""

import statistics
from typing import Any

from kdedge.errors import RunError
from kdedge.runs import Run
from kdedge_bench.gpu_jobs import PILOT, RESUMED, SAME, Work, speed_lines
from kdedge_bench.gpu_sizes import Sizes

__all__ = ["determinism", "horizon"]

_TRAINING_SHARE = 0.85  # of the minutes; the rest reads images, scores, clusters and saves
_SUPERVISED_SHARE = 0.1  # of a FixMatch step's time, for a step on the labeled images alone


def _step_s(run: Run, stage: str) -> float:
    """Seconds of a step: the median over the lines of the second half, behind compiling and warming up."""
    lines = speed_lines(run.metrics_path, stage)
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
