"""`kdedge train-recipe`."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdedge.cli_common import Interrupted, Reply, columns, command_output, note
from kdedge.errors import RecipeError

if TYPE_CHECKING:
    from kdedge.pipeline import Replayed
    from kdedge.runs import Run

__all__ = ["train_recipe"]

OWN_IMAGES = (
    "Training on the embedded digits. For your own images: --data FOLDER --labels N, where FOLDER has one folder for "
    "each class, or labeled/CLASS/ and unlabeled/."
)


@click.command("train-recipe")
@click.argument("recipe")
@click.option("--data", metavar="SPEC", help="A folder of images, a .csv, or a name such as digits or cifar10.")
@click.option(
    "--labels", type=click.IntRange(min=1), metavar="N", help="Labelled images to use in all, evenly over the classes."
)
@click.option("--seed", type=click.IntRange(min=0), metavar="S", help="Draws the labels and the initial weights.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The run folder; runs/... unless given.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@click.option("--replay", is_flag=True, help="Look at the step at which a run's numbers were lost; change nothing.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key of the recipe; repeatable.")
@click.option("--device", metavar="auto|cpu|cuda[:N]", help="Where to train.")
@command_output
def train_recipe(
    recipe: str,
    data: str | None,
    labels: int | None,
    seed: int | None,
    out: Path | None,
    resume: bool,
    replay: bool,
    settings: tuple[str, ...],
    device: str | None,
) -> Reply:
    """Train a teacher and a student.

    RECIPE is a name (kdedge recipes list) or a .yaml file. On several GPUs or machines: torchrun --nproc-per-node N -m
    kdedge train-recipe ...
    """
    from kdedge import recipe_io

    if resume and replay:
        raise RecipeError("--resume goes on with the run, --replay only looks at it. Give one of them.")
    # Of the processes that torchrun started one speaks; errors are told by all, since a full GPU is one's own.
    first = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0"
    loaded = recipe_io.load(recipe, settings, data=data, labels=labels, seed=seed, device=device)
    if data is None and loaded.data.spec == "digits" and first:
        note(OWN_IMAGES)
    from kdedge import pipeline
    from kdedge.cli_display import open_display

    try:
        with open_display() as display:
            if replay:
                return _replayed(*pipeline.replay(loaded, out, display=display))
            run, result = pipeline.train(loaded, out, resume=resume, display=display)
    except pipeline.Stopped:
        again = _again(recipe, settings, {"data": data, "labels": labels, "seed": seed, "out": out, "device": device})
        raise Interrupted(
            "Stopped. What was trained is kept, up to the last step (stopped twice: up to the last checkpoint). "
            f"Go on with: {again}"
        ) from None
    return Reply({"run": str(run.path), **result}, _text(run.path, result)) if first else Reply(None)


def _replayed(run: "Run", replayed: "Replayed") -> Reply:
    sentences = replayed.replay.sentences()
    for name, ids in (("Labeled", replayed.labeled), ("Unlabeled", replayed.unlabeled)):
        if ids:
            sentences.append(f"{name} images of that step: {', '.join(ids)}.")
    document = replayed.replay.to_json() | {"labeled": list(replayed.labeled), "unlabeled": list(replayed.unlabeled)}
    return Reply({"run": str(run.path), **document}, "\n".join(sentences))


def _pretrained(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return ""
    knn = facts["knn_accuracy"]
    told = "" if knn is None else f"; the nearest labeled images tell {knn:.1%} of classes right"
    return f"Pre-trained without labels: the {facts['of']}'s {facts['arch']}, {facts['seconds']:.0f} s{told}.\n"


def _again(recipe: str, settings: tuple[str, ...], flags: dict[str, Any]) -> str:
    """The same command, to go on with."""
    shared = os.environ.get("WORLD_SIZE", "1") != "1"
    launcher = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m"] if shared else []
    words = [*launcher, "kdedge", "train-recipe", recipe]
    words += [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    words += [word for setting in settings for word in ("--set", setting)]
    return shlex.join([*words, "--resume"])


def _text(path: Path, result: dict[str, Any]) -> str:
    rows = [("", "network", "parameters", "test accuracy", "seconds")]
    for name in ("baseline", "teacher", "student"):
        if part := result.get(name):
            accuracy = part["test_accuracy"]
            shown = "-" if accuracy is None else f"{accuracy:.4f}"
            rows.append((name, part["arch"], f"{part['params']:,}", shown, f"{part['seconds']:.0f}"))
    pretrained = _pretrained(result.get("pretrain"))
    return f"{columns(rows)}\n{pretrained}\nRun: {path}\nNext: kdedge export {shlex.quote(str(path))} --int8"
