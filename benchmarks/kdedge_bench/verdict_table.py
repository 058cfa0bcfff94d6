"""The table of a verdict: what the finished runs say, compared seed by seed.

A comparison is paired: both networks of a seed had the same labels and are asked about the same test images. Its
interval is Student's over the seeds, so it holds for new draws of labels and weights, not for these alone.
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdedge import __version__, recipe_io
from kdedge.errors import RunError
from kdedge.recipe import Recipe
from kdedge.runs import SCHEMA, Run, read_json
from kdedge_bench.seeds import mean_and_interval
from kdedge_bench.verdict_plan import Plan
from kdedge_bench.verdict_rows import FULL, SUPERVISED, Row, jobs, run_name
from kdedge_bench.work import result_of
from kdedge_bench.work_folder import WorkFolder
from kdedge_device.record import machine, now

__all__ = ["HELPS", "HURTS", "NO_EVIDENCE", "Cell", "paired", "read_cell", "steps_of", "verdict_document"]

HELPS, HURTS, NO_EVIDENCE = "helps", "hurts", "no evidence"
PRECISE_ENOUGH = 0.97
"""Of the confidence-only set: from here on the filters need not make it better, only not worse."""


@dataclass(frozen=True)
class Cell:
    """One row for one seed."""

    seed: int
    run: str
    test_accuracy: float
    student_steps: int
    training_flops: int  # of all stages, of the outer network too where it was trained once for several rows
    seconds: float  # likewise
    device: str


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """Mean, 95 % interval (Student's t) and the word of differences over seeds.

    No interval for fewer than two seeds, nor for equal differences: accuracies come in steps of one test image, so
    that nothing was learned about their spread, and a width of zero would be a lie.
    """
    if not differences:
        return {"mean": None, "half_width_95": None, "interval_95": None, "word": NO_EVIDENCE}
    found: dict[str, Any] = dict(mean_and_interval(differences))
    if max(differences) - min(differences) < 1e-9:
        found["half_width_95"] = None
    mean, half = found["mean"], found["half_width_95"]
    interval = None if half is None else [mean - half, mean + half]
    word = NO_EVIDENCE
    if interval is not None and interval[0] > 0:
        word = HELPS
    elif interval is not None and interval[1] < 0:
        word = HURTS
    return found | {"interval_95": interval, "word": word}


@functools.cache
def _resolved(path: Path) -> Recipe:
    """The recipe of a finished run, which does not change any more."""
    return recipe_io.load(str(path))


def steps_of(run: Run, who: str = "student") -> int:
    """Training steps of the student or the baseline of a finished run."""
    resolved = _resolved(run.recipe_path)
    return (resolved.baseline if who == "baseline" else resolved.student).optim.total_steps or 0


def read_cell(folder: WorkFolder, row: Row, seed: int) -> Cell | None:
    """The row's cell; None while its run, or the run of the teacher it uses, is not finished."""
    run, full = folder.run(run_name(row.name, seed)), folder.run(run_name(FULL, seed))
    result = result_of(run)
    if result is None:
        return None
    who = "baseline" if row.name == SUPERVISED else "student"
    flops, seconds = result["training_flops"], result["seconds"]
    if row.name == SUPERVISED:
        cost, seconds = flops["baseline"], result["baseline"]["seconds"]
    else:
        cost, seconds = flops["total"], seconds - (result["baseline"] or {"seconds": 0})["seconds"]
    if row.ready_teacher:
        teacher = result_of(full)
        if teacher is None:
            return None
        cost += teacher["training_flops"].get("outer") or 0
        seconds += teacher["teacher"]["seconds"] or 0
    accuracy = result[who]["test_accuracy"]
    if accuracy is None:
        raise RunError(f"The run {run.path} has no test accuracy. Expected a set with test images of known class.")
    manifest = run.read_manifest()
    return Cell(seed, run.path.name, accuracy, steps_of(run, who), cost, round(seconds, 2), manifest["device"])


def verdict_document(plan: Plan, folder: WorkFolder, command: str, commands: dict[str, str]) -> dict[str, Any]:
    """verdict.json: the plan, each row with its cells so far, and the comparisons.

    `commands` are those that make each run alone. RunError where two rows of a seed were not given the same images.
    """
    cells = {row.name: [cell for s in plan.seeds if (cell := read_cell(folder, row, s))] for row in plan.rows}
    for seed in plan.seeds:
        _require_same_exam([folder.run(c.run) for found in cells.values() for c in found if c.seed == seed])
    full = {seed: result for seed in plan.seeds if (result := result_of(folder.run(run_name(FULL, seed))))}
    every = jobs(plan.rows, plan.seeds)
    finished = sum(result_of(folder.run(job.name)) is not None for job in every)
    any_result = next(iter(full.values()), None)
    return {
        "schema": SCHEMA,
        "status": "complete" if finished == len(every) else "partial",
        "runs_finished": finished,
        "runs_planned": len(every),
        "command": command,
        "commands": commands,
        "date": now(),
        "machine": machine(),
        "kdedge": __version__,
        "recipe": plan.recipe.name,
        "recipe_sha256": plan.recipe_sha256,
        "settings": list(plan.settings),
        "data": plan.data,
        "data_fingerprint": plan.data_fingerprint,
        "labels": plan.labels,
        "test_images": any_result and any_result["test_images"],
        "input": any_result and any_result["input"],
        "networks": any_result and {who: {k: any_result[who][k] for k in ("arch", "params")} for who in _NETWORKS},
        "seeds": list(plan.seeds),
        "rows": {row.name: _row_document(row, cells[row.name]) for row in plan.rows},
        "comparisons": _comparisons(plan, cells, full),
        "trusted": _trusted(full),
    }


_NETWORKS = ("teacher", "student")


def _row_document(row: Row, cells: Sequence[Cell]) -> dict[str, Any]:
    """A row's cells and their means; null where there is none yet."""

    def mean(name: str) -> float | None:
        return sum(getattr(cell, name) for cell in cells) / len(cells) if cells else None

    return {
        "question": row.question,
        "settings": list(row.settings),
        "test_accuracy": mean_and_interval([cell.test_accuracy for cell in cells]) if cells else None,
        "student_steps": mean("student_steps"),
        "training_flops": mean("training_flops"),
        "seconds": mean("seconds"),
        "seeds": [asdict(cell) for cell in cells],
    }


def _comparisons(
    plan: Plan, cells: dict[str, list[Cell]], full: dict[int, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """KD-FixMatch minus each row, and for information minus its own teacher, over the seeds that both have."""
    mine = {cell.seed: cell.test_accuracy for cell in cells[FULL]}
    others = {
        row.name: (row.question, {cell.seed: cell.test_accuracy for cell in cells[row.name]})
        for row in plan.rows
        if row.name != FULL
    }
    teacher = {seed: result["teacher"]["test_accuracy"] for seed, result in full.items()}
    others["teacher"] = ("for information: the outer network", teacher)
    found = {}
    for name, (question, theirs) in others.items():
        shared = [seed for seed in mine if seed in theirs]
        differences = [mine[seed] - theirs[seed] for seed in shared]
        found[name] = {"question": question, "seeds": shared, "differences": differences} | paired(differences)
    return found


def _trusted(full: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The trusted set against as many of the most confident images of each class: which labels are right more often?

    The rule: not worse anywhere, and better where confidence alone is below 0.97 precise.
    """
    keys = ("precision", "confidence_only_precision")
    seeds = [
        {"seed": seed, **{key: result["trusted"].get(key) for key in (*keys, "images_exchanged")}}
        for seed, result in full.items()
        if all(result["trusted"].get(key) is not None for key in keys)
    ]
    found: dict[str, Any] = paired([one["precision"] - one["confidence_only_precision"] for one in seeds])
    means = {key: sum(one[key] for one in seeds) / len(seeds) if seeds else None for key in keys}
    alone = means["confidence_only_precision"]
    must_be_better = None if alone is None else alone < PRECISE_ENOUGH
    holds = None
    if len(seeds) > 1:
        holds = found["word"] == HELPS if must_be_better else found["word"] != HURTS
    return {"seeds": seeds, **means, "must_be_better": must_be_better, "rule_holds": holds, **found}


def _require_same_exam(runs: Sequence[Run]) -> None:
    """Rows of one seed are paired only if they had the same input and the same test images."""
    exams = {run.path.name: _exam(run.path) for run in runs}
    for name, exam in exams.items():
        first_name, first = next(iter(exams.items()))
        differs = [key for key in exam if exam[key] != first[key]]
        if differs:
            raise RunError(
                f"{name} and {first_name} cannot be compared: they differ in {', '.join(differs)}. Write what is open "
                "in the recipe into it (data.image_px, data.mean, views), and begin another verdict."
            )


@functools.cache
def _exam(path: Path) -> dict[str, Any]:
    resolved, splits = _resolved(Run(path).recipe_path), read_json(Run(path).splits_path)
    return {
        "input": resolved.data.model_dump(include={"image_px", "channels", "mean", "std"}),
        "views": resolved.views.model_dump(),
        "labeled images": splits["splits"]["labeled"]["sha256"],
        "test images": splits["splits"]["test"]["sha256"],
    }
