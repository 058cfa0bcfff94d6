"""A few real test images with what the network says of them: some it gets right, and the mistakes it is surest of."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kdedge.errors import DataError, KdedgeError
from kdedge.runs import Run
from kdedge_bench.facts import Facts
from kdedge_device.failures import Failure
from kdedge_device.preprocess import Preprocess

if TYPE_CHECKING:
    from kdedge.data.source import Source

__all__ = ["WRONG_SHOWN", "Load", "Picture", "Strip", "opening", "pick", "probabilities", "strip", "strip_of"]

MAX_SIDE_PX = 128  # of an embedded image
SMALL_PX = 64  # fewer on a side are shown enlarged and unsmoothed
RIGHT_SHOWN, WRONG_SHOWN = 6, 12

# Facts and ids of test images -> their pixels as the network sees them, uint8 [H, W, C] each.
Load = Callable[[Facts, Sequence[str]], list[npt.NDArray[np.uint8]]]


@dataclass(frozen=True)
class Picture:
    """One image: `uri` is a data: URI, `confidence` the softmax of the guess."""

    id: str
    uri: str
    truth: str
    guess: str
    confidence: float
    right: bool
    small: bool  # a few pixels a side, to be enlarged without smoothing


@dataclass(frozen=True)
class Strip:
    """Pictures to show, or the reason there are none."""

    right: tuple[Picture, ...] = ()
    wrong: tuple[Picture, ...] = ()
    wrong_in_all: int = 0
    problem: str = ""


def probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Softmax over the last axis, [N, K]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))


def pick(labels: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> tuple[list[int], list[int], int]:
    """Positions of right images (spread over the classes), of the surest mistakes, and how many mistakes there are."""
    guesses, confidence = logits.argmax(1), probabilities(logits).max(1)
    known = labels >= 0
    wrong = np.flatnonzero(known & (guesses != labels))
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    right = np.flatnonzero(known & (guesses == labels))
    # The first right image of each class, then evenly over the classes: no picking of pretty ones.
    _, first = np.unique(labels[right], return_index=True)
    firsts = right[first]
    if len(firsts) > RIGHT_SHOWN:
        firsts = firsts[np.linspace(0, len(firsts) - 1, RIGHT_SHOWN).round().astype(int)]
    return [int(index) for index in firsts], [int(index) for index in wrong[:WRONG_SHOWN]], len(wrong)


def strip(facts: Facts, artifact: str, load: Load) -> Strip:
    """The pictures of `artifact`. A data set that is gone is told in the page and does not fail it."""
    labels, logits, ids = facts.test_labels, facts.logits(artifact), facts.predictions.get("test_id")
    if labels is None or logits is None or ids is None:
        return Strip(problem="The run has no predictions on test images of known class.")
    right, wrong, in_all = pick(labels, logits)
    return strip_of(facts, artifact, right, wrong, in_all, load)


def strip_of(facts: Facts, artifact: str, right: list[int], wrong: list[int], in_all: int, load: Load) -> Strip:
    """Pictures of the test images at these places, with what `artifact` says of them."""
    labels, logits, ids = facts.test_labels, facts.logits(artifact), facts.predictions.get("test_id")
    if labels is None or logits is None or ids is None:
        return Strip(problem="The run has no predictions on test images of known class.")
    if not right and not wrong:
        return Strip()
    wanted = [str(ids[index]) for index in right + wrong]
    try:
        pixels = load(facts, wanted)
    except (KdedgeError, Failure) as error:
        return Strip(problem=f"The test images cannot be opened from here. {error}")
    probs, classes = probabilities(logits), facts.classes
    pictures = []
    for index, image in zip(right + wrong, pixels, strict=True):
        guess = int(logits[index].argmax())
        pictures.append(
            Picture(
                id=str(ids[index]),
                uri=_data_uri(image),
                truth=classes[int(labels[index])],
                guess=classes[guess],
                confidence=float(probs[index, guess]),
                right=guess == int(labels[index]),
                small=max(image.shape[:2]) < SMALL_PX,
            )
        )
    return Strip(tuple(pictures[: len(right)]), tuple(pictures[len(right) :]), in_all)


def _data_uri(image: npt.NDArray[np.uint8]) -> str:
    """A photograph as a JPEG, a fifth of the bytes of a PNG; a few pixels as they are."""
    from PIL import Image

    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    picture.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    kind = "png" if max(image.shape[:2]) < SMALL_PX else "jpeg"
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, optimize=True, **({} if kind == "png" else {"quality": 88}))
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def opening() -> Load:
    """Loads test images from the data of their run, which is opened once a run: listing a large folder takes seconds.

    Through the run's own preprocessing. It raises DataError where the data set has moved or has changed since.
    """
    opened: dict[Run, Source] = {}

    def load(facts: Facts, ids: Sequence[str]) -> list[npt.NDArray[np.uint8]]:
        from kdedge.data import open_source

        preprocess = Preprocess.from_json(_preprocess(facts))
        spec, root = _data(facts)
        if facts.run not in opened:
            opened[facts.run] = open_source(spec, root=root)
        source = opened[facts.run]
        positions = {name: index for index, name in enumerate(source.ids)}
        absent = [name for name in ids if name not in positions]
        if absent:
            raise DataError(
                f"The data set {spec} has no image {absent[0]!r} any more; it was there when the run was made. "
                "Put the data back as it was."
            )
        images = source.load(np.array([positions[name] for name in ids], dtype=np.int64), preprocess)
        return [np.ascontiguousarray(image.permute(1, 2, 0).numpy()) for image in images]

    return load


def _preprocess(facts: Facts) -> dict[str, Any]:
    found = (facts.bundle or {}).get("preprocess")
    if not isinstance(found, dict):
        raise DataError("The run has no bundle, and so no recorded preprocessing. Make one with: kdedge export")
    return found


def _data(facts: Facts) -> tuple[str, Path | None]:
    """The data's SPEC and root, as the manifest says; a recipe of an older kdedge need not load any more."""
    recipe = facts.manifest.get("recipe")
    data = recipe.get("data") if isinstance(recipe, dict) else None
    if isinstance(data, dict) and data.get("spec"):
        spec, root = str(data["spec"]), data.get("root")
    else:
        from kdedge import recipe_io

        loaded = recipe_io.load(str(facts.run.recipe_path)).data
        spec, root = loaded.spec, loaded.root
    return spec, Path(root) if root else None
