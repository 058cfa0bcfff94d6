"""The outer network as the later stages use it: one that is trained already, and the answers the student learns from.

N unlabeled images, C channels, K classes, F features.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdedge.data import Source, Splits
from kdedge.data.batches import Pool
from kdedge.data.views import columns
from kdedge.errors import RecipeError, RunError
from kdedge.methods.distill import DistillConfig
from kdedge.methods.kd_fixmatch import TrustedTargets
from kdedge.methods.teacher import LiveTeacher, StoredTeacher, Teacher
from kdedge.models.weights import LoadedModel, load_model
from kdedge.models.zoo import ModelSpec, Network
from kdedge.train.distributed import Ranks
from kdedge.train.engine import EnginePlan, as_planned
from kdedge.train.evaluate import predict_with_features
from kdedge.trust.select import OUTLIER, TrustedSet
from kdedge_device.preprocess import Preprocess

__all__ = [
    "copy_weights",
    "live_teacher",
    "make_teacher",
    "nothing_trusted",
    "outer_answers",
    "read_ready_teacher",
    "refuse_other_start",
    "targets",
]


def read_ready_teacher(path: Path, classes: tuple[str, ...], channels: int) -> LoadedModel:
    """The network of `path`, which replaces stage 1, with its outputs in the order of `classes`.

    Classes are matched by name; their order may differ. RunError with both lists where they are not the same, and
    where the network reads another number of channels than the run's images have. Its input size and normalisation
    may differ from the student's.
    """
    loaded = load_model(path)
    if sorted(loaded.classes) != sorted(classes):
        raise RunError(
            f"The teacher {path} knows other classes than the data. Teacher: {', '.join(loaded.classes)}. "
            f"Data: {', '.join(classes)}. Use a teacher of the same classes, or leave teacher.ready out."
        )
    if loaded.preprocess.channels != channels:
        raise RunError(
            f"The teacher {path} reads images of {loaded.preprocess.channels} channels, and the run's have {channels}. "
            f"Set data.channels={loaded.preprocess.channels}, or use another teacher."
        )
    order = torch.tensor([loaded.classes.index(name) for name in classes])
    head = loaded.module.head
    with torch.no_grad():
        head.weight.copy_(head.weight[order])
        head.bias.copy_(head.bias[order])
    return LoadedModel(loaded.module, loaded.spec, classes, loaded.preprocess)


def refuse_other_start(student: ModelSpec, teacher: ModelSpec, reads: Preprocess, ready: Preprocess | None) -> None:
    """RecipeError where the student, which `reads` images so, cannot start from the teacher's weights."""
    if student != teacher:
        raise RecipeError(
            f"student.init is 'teacher', but the student is {_named(student)} and the teacher {_named(teacher)}. "
            "Give both the same architecture, width, halvings and projection_layers, or leave student.init out."
        )
    if ready is not None and ready != reads:
        raise RecipeError(
            f"student.init is 'teacher', and the ready teacher reads images of {ready.height} px with mean "
            f"{ready.mean} and std {ready.std}; the recipe asks for {reads.height} px, {reads.mean} and {reads.std}. "
            "Leave data.image_px, data.mean and data.std out, or student.init."
        )


def _named(spec: ModelSpec) -> str:
    layers = f", {spec.neck} projection layer" if spec.neck else ""
    return f"{spec.arch} (width {spec.width:g}, {spec.halvings} halvings{layers})"


def copy_weights(network: Network, teacher_path: Path) -> None:
    """Start `network` from the outer network's weights, head included: the classes are the same."""
    network.load_state_dict(load_model(teacher_path).module.state_dict())


def outer_answers(
    loaded: LoadedModel,
    source: Source,
    splits: Splits,
    pool: Pool,
    preprocess: Preprocess,
    plan: EnginePlan,
    features_path: Path,
    ranks: Ranks,
) -> tuple[Tensor, np.memmap]:
    """Logits [N, K] and features [N, F] of the outer network on the unlabeled images without views.

    `preprocess` is the run's; a ready teacher with another one reads the images as it was trained to.
    """
    device = pool.images.device
    network = as_planned(loaded.module.to(device), plan)
    # Pool.images are the unlabeled images, in their order.
    images = pool.images if loaded.preprocess == preprocess else source.load(splits.unlabeled, loaded.preprocess)
    mean, std = columns(loaded.preprocess, device)
    return predict_with_features(network, images, mean, std, plan, features_path, ranks)


def nothing_trusted(images: int) -> TrustedTargets:
    """Without an outer network."""
    return TrustedTargets(torch.full((images,), -1), torch.ones(images))


def targets(trusted: TrustedSet) -> TrustedTargets:
    """What the inner network is told of each unlabeled image."""
    label = torch.from_numpy(np.where(trusted.kept, trusted.label, -1))
    return TrustedTargets(label, torch.from_numpy((trusted.why != OUTLIER).astype(np.float32)))


def make_teacher(
    config: DistillConfig, loaded: LoadedModel, logits_NK: Tensor, features_NF: Tensor | None, pool: Pool
) -> Teacher:
    """Answers made once, or the network itself where the student's own views are asked for."""
    if config.views == "stored":
        return StoredTeacher(logits_NK, features_NF)
    return live_teacher(loaded, pool, pool.images.device)


def live_teacher(loaded: LoadedModel, pool: Pool, device: torch.device) -> LiveTeacher:
    """The network itself, on `device`, asked about images that are normalised as those of `pool`."""
    own_mean, own_std = columns(loaded.preprocess, device)
    return LiveTeacher(
        loaded.module.to(device),
        mean=pool.mean,
        std=pool.std,
        own_mean=own_mean,
        own_std=own_std,
        own_px=loaded.preprocess.height,
    )
