"""`kdedge verdict`: does KD-FixMatch help here? One run after the other, and the table so far after each.

Every run is an ordinary run folder, so the verdict can be stopped at any moment and goes on where it was; a second
process on the same folder makes the runs that the first is not at.
"""

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdedge import pipeline, recipe_io
from kdedge.errors import BugError
from kdedge.recipe import Recipe
from kdedge.recipe_yaml import Document
from kdedge.runs import write_bytes, write_json
from kdedge_bench.verdict_plan import SPELLINGS, Plan
from kdedge_bench.verdict_rows import (
    EQUAL_TOTAL,
    FIXMATCH,
    FULL,
    READY,
    SUPERVISED,
    Row,
    equal_total_steps,
    jobs,
    merged,
    run_name,
    settings_of,
)
from kdedge_bench.verdict_table import steps_of, verdict_document
from kdedge_bench.verdict_text import markdown
from kdedge_bench.work import OpenDisplay, Train, Wait, Work, make_runs, result_of, silent
from kdedge_bench.work_folder import WorkFolder
from kdedge_bench.work_job import Job

__all__ = ["KIND", "command_of", "verdict"]

KIND = "verdict"


def verdict(
    plan: Plan,
    out: Path | None = None,
    *,
    display: OpenDisplay = silent,
    say: Callable[[str], None] = lambda sentence: None,
    train: Train = pipeline.train,
    wait: Wait = time.sleep,
) -> dict[str, Any]:
    """Make every run of the plan that is not finished, and what verdict.json says in the end.

    `display` opens what is seen while one run trains. Raises RunError where the folder holds another verdict, and
    whatever `train` raises; what was finished stays, and the same call goes on.
    """
    folder = WorkFolder(out or plan.default_folder, KIND)
    folder.begin(plan.to_json(), SPELLINGS, plan.as_now)
    return make_runs(
        folder,
        jobs(plan.rows, plan.seeds),
        lambda job: _recipe(plan, folder, job),
        lambda: _write(plan, folder),
        Work(display, say, train, wait),
    )


def _own_settings(plan: Plan, folder: WorkFolder, job: Job[Row]) -> dict[str, str] | None:
    """What the job changes in the recipe; None for equal total compute while its cost is not known."""
    steps = None
    if job.row.name == EQUAL_TOTAL:
        full, alone = (folder.run(run_name(row, job.seed)) for row in (FULL, FIXMATCH))
        full_result, alone_result = result_of(full), result_of(alone)
        if full_result is None or alone_result is None:
            return None
        total, inner = full_result["training_flops"]["total"], alone_result["training_flops"]["inner"]
        steps = equal_total_steps(total, inner, steps_of(alone))
    teacher, supervised = _teacher_file(folder, job), plan.has_row(SUPERVISED)
    own = settings_of(job.row, plan.recipe, supervised=supervised, teacher=teacher, steps=steps)
    return own | {"seed": str(job.seed)}


def _recipe(plan: Plan, folder: WorkFolder, job: Job[Row]) -> Recipe:
    own = _own_settings(plan, folder, job)
    if own is None:
        raise BugError(f"{job.name} is made before the runs it needs")
    # From the recipe as it was planned, whatever has happened to its file since.
    document = Document(f"recipe {plan.recipe_name}", plan.recipe.model_dump(mode="json", by_alias=True))
    recipe_io.override(document, [f"{key}={value}" for key, value in own.items() if key != READY], Recipe)
    if READY in own:  # a folder may be called what YAML cannot say
        document.data["teacher"]["ready"] = _teacher_file(folder, job)
    return recipe_io.validate(document, Recipe)


def _teacher_file(folder: WorkFolder, job: Job[Row]) -> str:
    """The outer network of the job's seed."""
    return str(folder.run(run_name(FULL, job.seed)).teacher_path)


def _write(plan: Plan, folder: WorkFolder) -> dict[str, Any]:
    """Write the table so far. One process at a time, so that an older view never replaces a newer one."""
    with folder.lock("table"):
        commands = {}
        for job in jobs(plan.rows, plan.seeds):
            own = _own_settings(plan, folder, job)
            if own is not None:
                commands[job.name] = _run_command(plan, folder, job, own)
        document = verdict_document(plan, folder, command_of(plan, folder.path), commands)
        write_json(folder.json_path, document)
        write_bytes(folder.text_path, markdown(document).encode())
    return document


def _flags(plan: Plan) -> list[str]:
    return [word for name, value in plan.flags.items() if value is not None for word in (f"--{name}", str(value))]


def command_of(plan: Plan, folder: Path) -> str:
    """The command of the whole verdict, which also goes on with it."""
    words = ["kdedge", "verdict", plan.recipe_name, *_flags(plan), "--seeds", str(len(plan.seeds))]
    words += ["--first-seed", str(plan.seeds[0])] if plan.seeds[0] else []
    words += ["--rows", ",".join(row.name for row in plan.rows)]
    words += [word for setting in plan.settings for word in ("--set", setting)]
    return shlex.join([*words, "--out", str(folder)])


def _run_command(plan: Plan, folder: WorkFolder, job: Job[Row], own: dict[str, str]) -> str:
    """The command that makes this run alone."""
    words = ["kdedge", "train-recipe", plan.recipe_name, *_flags(plan), "--seed", str(job.seed)]
    changed = merged(plan.settings, {key: value for key, value in own.items() if key != "seed"})
    words += [word for setting in changed for word in ("--set", setting)]
    return shlex.join([*words, "--out", str(folder.run(job.name).path)])
