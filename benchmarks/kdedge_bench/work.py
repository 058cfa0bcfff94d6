"""Many runs one after the other, each an ordinary run folder, so that the whole can be stopped and goes on.

A second process on the same folder makes the runs that the first is not at.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from kdedge import pipeline
from kdedge.errors import RunError
from kdedge.recipe import Recipe
from kdedge.run_folder import check_folder
from kdedge.runs import Run, read_json
from kdedge.train.engine import pick_device
from kdedge.train.metrics import Display, SilentDisplay
from kdedge_bench.work_folder import WorkFolder
from kdedge_bench.work_job import Job, WorkRow

__all__ = ["OpenDisplay", "Train", "Wait", "Work", "make_runs", "result_of", "silent"]

WAIT_S = 20.0
"""Between two looks at runs that another process is at."""

Train = Callable[..., Any]
"""As `kdedge.pipeline.train`."""
OpenDisplay = Callable[[], AbstractContextManager[Display]]
Wait = Callable[[float], None]


SomeRow = TypeVar("SomeRow", bound=WorkRow)


def silent() -> AbstractContextManager[Display]:
    return nullcontext(SilentDisplay())


@dataclass(frozen=True)
class Work:
    """How runs are made: what is shown while one trains, to whom sentences go, and who trains."""

    display: OpenDisplay = silent
    say: Callable[[str], None] = lambda sentence: None
    train: Train = pipeline.train
    wait: Wait = time.sleep


def result_of(run: Run) -> dict[str, Any] | None:
    """What result.json says; None while the run is not finished."""
    if not run.manifest_path.is_file() or run.read_manifest().get("status") != "finished":
        return None
    result: dict[str, Any] = read_json(run.result_path)
    return result


def make_runs(
    folder: WorkFolder,
    jobs: Sequence[Job[SomeRow]],
    recipe_of: Callable[[Job[SomeRow]], Recipe],
    write: Callable[[], dict[str, Any]],
    work: Work,
) -> dict[str, Any]:
    """Make every run that is not finished, and return the last document of `write`, the tables so far.

    `recipe_of` is asked once what the job needs is finished. Raises whatever `work.train` raises; what was finished
    stays, and the same call goes on. A run whose numbers were lost (a loss that is not finite) costs only those that
    need it: the RunError that tells it comes when all others are made.
    """
    document = write()
    waiting, told = list(jobs), False
    lost: dict[str, RunError] = {}
    while waiting:
        done, trained = _first_that_can_be_made(folder, waiting, recipe_of, work, lost)
        if done is None:
            if not told:
                work.say("Waiting for the runs that another process is at.")
            told = True
            work.wait(WAIT_S)
            continue
        told = False
        waiting.remove(done)
        while unmakeable := [job for job in waiting if lost.keys() & {*job.needs}]:
            lost |= {job.name: lost[next(name for name in job.needs if name in lost)] for job in unmakeable}
            waiting = [job for job in waiting if job not in unmakeable]
        if trained or not waiting:  # the last: another process may have finished some since
            document = write()
            work.say(f"{document['runs_finished']} of {document['runs_planned']} runs: {folder.text_path}")
    if lost:
        raise RunError(
            f"{', '.join(lost)} could not be made; all other runs are finished. The first of them: "
            f"{next(iter(lost.values()))}"
        )
    return document


def _first_that_can_be_made(
    folder: WorkFolder,
    waiting: list[Job[SomeRow]],
    recipe_of: Callable[[Job[SomeRow]], Recipe],
    work: Work,
    lost: dict[str, RunError],
) -> tuple[Job[SomeRow] | None, bool]:
    """The first job that is finished now, or `lost`, and whether it was trained here; None where all wait for another
    process."""
    for job in waiting:
        if not all(result_of(folder.run(name)) for name in job.needs):
            continue
        with folder.claim(job.name) as mine:
            if not mine:
                continue
            run, recipe = folder.run(job.name), recipe_of(job)
            begun = run.manifest_path.is_file()
            if begun and check_folder(run, recipe, pick_device(recipe.engine.device), resume=True) is not None:
                return job, False
            work.say(f"{job.title}{' (going on)' if begun else ''}: {run.path}")
            try:
                with work.display() as shown:
                    work.train(recipe, run.path, resume=begun, display=shown)
            except RunError as error:
                if not run.failure_path.is_file():
                    raise
                lost[job.name] = error
                work.say(f"{job.title} is lost: {error}")
            return job, True
    return None, False
