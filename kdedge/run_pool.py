"""From a source and its splits to what the stages train on, and to what the recipe is resolved against."""

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from kdedge.data import Source, Splits
from kdedge.data.batches import Pool
from kdedge.data.packfile import PackedImages
from kdedge.data.store import Store
from kdedge.data.views import columns
from kdedge.errors import RecipeError
from kdedge.models.weights import StartingWeights, read_starting_weights
from kdedge.recipe import PRETRAINED, TEACHERS_WEIGHTS, DataDescription, Recipe, resolved_teacher_arch
from kdedge_device.preprocess import Preprocess

__all__ = ["describe", "held_back_truth", "input_channels", "make_pool", "pixel_statistics", "read_starting"]


def read_starting(recipe: Recipe, kind: str) -> dict[str, StartingWeights]:
    """The starting weights that the recipe names, for "teacher" and "student"; not what the run pre-trains itself.

    A student that starts from its teacher has the teacher's own: its baseline, which may not have what the teacher
    learned, starts from those. "ready" is a ready teacher that the student starts from: it says what the input is.
    """
    teacher, student, starting = recipe.teacher, recipe.student, dict[str, StartingWeights]()
    if teacher is not None and teacher.ready is None and teacher.init is not None and teacher.init != PRETRAINED:
        starting["teacher"] = read_starting_weights(teacher.init, resolved_teacher_arch(teacher, kind))
    if student.init is not None and student.init not in (PRETRAINED, TEACHERS_WEIGHTS):
        starting["student"] = read_starting_weights(student.init, student.arch)
    elif student.init == TEACHERS_WEIGHTS and teacher is not None:
        if teacher.ready is not None:
            starting["ready"] = read_starting_weights(teacher.ready, student.arch)
        elif "teacher" in starting:
            starting["student"] = starting["teacher"]
    return starting


def describe(recipe: Recipe, source: Source, splits: Splits, starting: dict[str, StartingWeights]) -> DataDescription:
    inputs = {(weights.mean, weights.std) for weights in starting.values()}
    if len(inputs) > 1 and (recipe.data.mean is None or recipe.data.std is None):
        raise RecipeError(
            "teacher.init and student.init were trained with different normalisations, and a run has one. "
            "Set data.mean and data.std in the recipe, or leave one init out."
        )
    return DataDescription(
        kind=source.kind,
        channels=input_channels(source),
        shorter_px=source.readable_px,
        flip_allowed=source.flip_allowed,
        classes=len(source.classes),
        labeled_images=len(splits.labeled),
        unlabeled_images=len(splits.unlabeled),
        teacher_weights=starting.get("teacher"),
        student_weights=starting.get("student"),
        ready=starting.get("ready"),
    )


def input_channels(source: Source) -> Literal[1, 3]:
    """That a run on these images chooses: colour images may be packed as grey ones."""
    packed_grey = isinstance(source.images, PackedImages) and source.images.image_shape[2] == 1
    return 1 if packed_grey else source.channels


def pixel_statistics(images: Store) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixel / 255 for each channel, in whole numbers summed exactly; 4 digits."""
    total = squares = torch.zeros(images.shape[1], dtype=torch.float64)
    for part in images.chunks(64):
        values = part.to(torch.float64).cpu()
        total = total + values.sum((0, 2, 3))
        squares = squares + values.pow(2).sum((0, 2, 3))
    count = len(images) * images.shape[2] * images.shape[3]
    mean = total / count
    std = (squares / count - mean.pow(2)).clamp(min=1.0).sqrt()
    return tuple(round(v, 4) for v in (mean / 255).tolist()), tuple(round(v, 4) for v in (std / 255).tolist())


def held_back_truth(splits: Splits) -> npt.NDArray[np.int64]:
    """The true class of each unlabeled image, for reports; -1 where unknown, and where the network was given it."""
    truth = splits.truth[splits.unlabeled].copy()
    truth[np.isin(splits.unlabeled, splits.labeled)] = -1
    return truth


def make_pool(images: Store, splits: Splits, preprocess: Preprocess) -> Pool:
    device = images.device
    labeled = np.searchsorted(splits.unlabeled, splits.labeled)  # labeled is part of unlabeled, and both ascend
    mean, std = columns(preprocess, device)
    return Pool(
        images=images,
        labeled=torch.from_numpy(labeled).to(device),
        labels=torch.from_numpy(splits.truth[splits.labeled]).to(device),
        unlabeled=torch.arange(len(splits.unlabeled), device=device),
        truth=torch.from_numpy(held_back_truth(splits)).to(device),
        mean=mean,
        std=std,
    )
