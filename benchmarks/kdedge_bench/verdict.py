"""`kdedge verdict`: does KD-FixMatch help here? One run after the other, and the table so far after each.

Every run is an ordinary run folder, so the verdict can be stopped at any moment and goes on where it was; a second
process on the same folder makes the runs that the first is not at.
"""

import shlex
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from kdedge import pipeline, recipe_io
from kdedge.errors import BugError
from kdedge.recipe import Recipe
from kdedge.recipe_yaml import Document
from kdedge.run_folder import check_folder
from kdedge.runs import write_bytes, write_json
from kdedge.train.engine import pick_device
from kdedge.train.metrics import Display, SilentDisplay
from kdedge_bench.verdict_folder import Plan, VerdictFolder
from kdedge_bench.verdict_rows import (
    EQUAL_TOTAL,
    FIXMATCH,
    FULL,
    READY,
    SUPERVISED,
    Job,
    equal_total_steps,
    jobs,
    merged,
    run_name,
    settings_of,
)
from kdedge_bench.verdict_table import result_of, steps_of, verdict_document
from kdedge_bench.verdict_text import markdown

__all__ = ["command_of", "verdict"]

WAIT_S = 20.0
"""Between two looks at runs that another process is at."""

Train = Callable[..., Any]
"""As `kdedge.pipeline.train`."""


def verdict(
    plan: Plan,
    out: Path | None = None,
    *,
    display: Callable[[], AbstractContextManager[Display]] = lambda: nullcontext(SilentDisplay()),
    say: Callable[[str], None] = lambda sentence: None,
    train: Train = pipeline.train,
    wait: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Make every run of the plan that is not finished, and what verdict.json says in the end.

    `display` opens what is seen while one run trains. Raises RunError where the folder holds another verdict, and
    whatever `train` raises; what was finished stays, and the same call goes on.
    """
    folder = VerdictFolder(out or plan.default_folder)
    folder.begin(plan)
    document = _write(plan, folder)
    waiting, told = list(jobs(plan.rows, plan.seeds)), False
    while waiting:
        done, trained = _first_that_can_be_made(plan, folder, waiting, display, say, train)
        if done is None:
            if not told:
                say("Waiting for the runs that another process is at.")
            told = True
            wait(WAIT_S)
            continue
        told = False
        waiting.remove(done)
        if trained or not waiting:  # the last: another process may have finished some since
            document = _write(plan, folder)
            say(f"{document['runs_finished']} of {document['runs_planned']} runs: {folder.text_path}")
    return document


def _first_that_can_be_made(
    plan: Plan,
    folder: VerdictFolder,
    waiting: list[Job],
    display: Callable[[], AbstractContextManager[Display]],
    say: Callable[[str], None],
    train: Train,
) -> tuple[Job | None, bool]:
    """The first job that is finished now, and whether it was trained here; None where all wait for another process."""
    for job in waiting:
        if not all(result_of(folder.run(name)) for name in job.needs):
            continue
        with folder.claim(job) as mine:
            if not mine:
                continue
            run, recipe = folder.run(job.name), _recipe(plan, folder, job)
            begun = run.manifest_path.is_file()
            if begun and check_folder(run, recipe, pick_device(recipe.engine.device), resume=True) is not None:
                return job, False
            say(f"{job.row.name}, seed {job.seed}{' (going on)' if begun else ''}: {run.path}")
            with display() as shown:
                train(recipe, run.path, resume=begun, display=shown)
            return job, True
    return None, False


def _own_settings(plan: Plan, folder: VerdictFolder, job: Job) -> dict[str, str] | None:
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


def _recipe(plan: Plan, folder: VerdictFolder, job: Job) -> Recipe:
    own = _own_settings(plan, folder, job)
    if own is None:
        raise BugError(f"{job.name} is made before the runs it needs")
    # From the recipe as it was planned, whatever has happened to its file since.
    document = Document(f"recipe {plan.recipe_name}", plan.recipe.model_dump(mode="json", by_alias=True))
    recipe_io.override(document, [f"{key}={value}" for key, value in own.items() if key != READY], Recipe)
    if READY in own:  # a folder may be called what YAML cannot say
        document.data["teacher"]["ready"] = _teacher_file(folder, job)
    return recipe_io.validate(document, Recipe)


def _teacher_file(folder: VerdictFolder, job: Job) -> str:
    """The outer network of the job's seed."""
    return str(folder.run(run_name(FULL, job.seed)).teacher_path)


def _write(plan: Plan, folder: VerdictFolder) -> dict[str, Any]:
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


def _run_command(plan: Plan, folder: VerdictFolder, job: Job, own: dict[str, str]) -> str:
    """The command that makes this run alone."""
    words = ["kdedge", "train-recipe", plan.recipe_name, *_flags(plan), "--seed", str(job.seed)]
    changed = merged(plan.settings, {key: value for key, value in own.items() if key != "seed"})
    words += [word for setting in changed for word in ("--set", setting)]
    return shlex.join([*words, "--out", str(folder.run(job.name).path)])
