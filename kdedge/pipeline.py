"""From a recipe to a finished run: the images are opened, the folder is begun or gone on with, the stages are done."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdedge.data import Source, Splits, make_splits, open_source
from kdedge.data.leaks import without_leaks
from kdedge.errors import DeviceError, RunError
from kdedge.recipe import Recipe
from kdedge.run_begin import Begun, begin
from kdedge.run_folder import check_folder, run_folder
from kdedge.runs import Run, read_json
from kdedge.stages import Stages
from kdedge.train.distributed import Ranks
from kdedge.train.engine import expect_determinism, pick_device
from kdedge.train.metrics import Display, SilentDisplay
from kdedge.train.replay import Replay
from kdedge.train.stop import terminable

__all__ = ["Replayed", "Stopped", "replay", "train"]


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, in a run that can be resumed."""


def train(
    recipe: Recipe, out: Path | None = None, *, resume: bool = False, display: Display | None = None
) -> tuple[Run, dict[str, Any]]:
    """Everything from images to a student, and what result.json says.

    Under torchrun this process takes its share of the run; one that torchrun has restarted goes on with it.

    Raises RunError where the folder holds another run, or one without `resume`; DataError and RecipeError where data
    and recipe do not fit; leaves a run that can be resumed whenever it is stopped.
    """
    with terminable(), Ranks.from_environment(pick_device(recipe.engine.device)) as ranks:
        return _train(recipe, out, resume, ranks, display if display and ranks.is_first else SilentDisplay())


def _train(recipe: Recipe, out: Path | None, resume: bool, ranks: Ranks, shown: Display) -> tuple[Run, dict[str, Any]]:
    device = ranks.device
    if recipe.engine.deterministic:
        expect_determinism()
    with ranks.first_before_others():  # it may download
        source, splits = _opened(recipe)
    run = Run(out or run_folder(recipe, source, splits))
    resume = resume or (ranks.restarted and run.manifest_path.is_file())
    begun = resume and run.splits_path.is_file()
    if begun:
        splits = Splits.from_json(read_json(run.splits_path), source)  # says what changed since
    finished = check_folder(run, recipe, device, resume)
    ranks.barrier()  # all have looked at the folder before the first of them writes
    if finished is not None:
        shown.say(f"The run in {run.path} is finished already; nothing was done.")
        return run, finished
    if recipe.data.remove_leaks and not begun:
        splits = without_leaks(source, splits)
    for sentence in (*source.warnings, *splits.warnings):
        shown.say(sentence)
    with run.lock() if ranks.is_first else contextlib.nullcontext():
        try:
            return run, _through(begin(run, recipe, source, splits, ranks, shown))
        except KeyboardInterrupt:
            if not run.manifest_path.is_file():
                raise  # nothing has begun
            raise Stopped from None  # the manifest goes on saying "running"


def _through(begun: Begun) -> dict[str, Any]:
    try:
        return Stages(begun).all()
    except KeyboardInterrupt:
        raise
    except torch.OutOfMemoryError as error:
        _try_to_note_failure(begun, error)
        raise DeviceError(
            f"The memory of {begun.device} is full: {str(error).splitlines()[0]} Set "
            "teacher.optim.labeled_batch and student.optim.labeled_batch, or data.image_px, lower."
        ) from error
    except BaseException as error:
        _try_to_note_failure(begun, error)
        raise


def _opened(recipe: Recipe) -> tuple[Source, Splits]:
    root = Path(recipe.data.root) if recipe.data.root else None
    most, classes = recipe.data.max_unreadable_fraction, recipe.data.classes
    source = open_source(recipe.data.spec, root=root, max_unreadable_fraction=most, classes=classes).decodable()
    return source, make_splits(source, recipe.data.labels, recipe.seed)


def _try_to_note_failure(begun: Begun, error: BaseException) -> None:
    if not begun.ranks.is_first:
        return
    told = begun.ranks.told(error)
    with contextlib.suppress(RunError):  # the disk is full: the first error is the one to tell
        begun.run.update_manifest(status="failed", failure=f"{type(told).__name__}: {told}")


@dataclass(frozen=True)
class Replayed:
    """A lost step once more, and the ids of its images."""

    replay: Replay
    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]


def replay(recipe: Recipe, out: Path | None = None, *, display: Display | None = None) -> tuple[Run, Replayed]:
    """The step at which a run's numbers were lost, from the checkpoint before it; the run is left as it is.

    RunError where the folder holds another run, or one that has lost no step.
    """
    shown, device = display or SilentDisplay(), pick_device(recipe.engine.device)
    with terminable(), Ranks.from_environment(device) as ranks:
        if ranks.world > 1:
            raise RunError(f"A replay is for one process, and torchrun started {ranks.world}. Start it without.")
        source, splits = _opened(recipe)
        run = Run(out or run_folder(recipe, source, splits))
        check_folder(run, recipe, device, True)
        if not run.failure_path.is_file():
            raise RunError(f"The run in {run.path} has lost no step: it holds no {run.failure_path.name}.")
        failure = read_json(run.failure_path)
        splits = Splits.from_json(read_json(run.splits_path), source)
        with run.lock():
            begun = begin(run, recipe, source, splits, ranks, shown, writes=False)
            found = Stages(begun, logs=False).replay(failure["stage"], failure["step"])
    labeled, unlabeled = (
        tuple(source.ids[splits.unlabeled[place]] for place in places)
        for places in (found.position_B, found.position_U)
    )
    return run, Replayed(found, labeled, unlabeled)
