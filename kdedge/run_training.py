"""What each stage of a run trains: which network, by which method, how long, into which file."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdedge.data.contrastive_views import ContrastiveViewConfig
from kdedge.data.views import ViewConfig
from kdedge.losses.consistency import log_prior
from kdedge.methods.fixmatch import FixMatch
from kdedge.methods.kd_fixmatch import KDFixMatch
from kdedge.methods.simclr import SimCLR
from kdedge.methods.step import Method
from kdedge.methods.supervised import FineTuneConfig, Supervised
from kdedge.methods.thresholds import Policy, ThresholdConfig, make_policy
from kdedge.models.weights import LoadedModel, load_model
from kdedge.models.zoo import ModelSpec, Network
from kdedge.recipe import TEACHERS_WEIGHTS, StudentConfig, TeacherConfig
from kdedge.recipe_pretrain import PretrainConfig
from kdedge.run_begin import Begun
from kdedge.run_teacher import copy_weights, make_teacher, nothing_trusted, outer_answers, targets
from kdedge.train.optim import OptimConfig
from kdedge.trust.select import load_trusted

__all__ = ["Training", "stored_answers", "training_of"]


@dataclass(frozen=True)
class Training:
    """A stage that trains a network: the "student" or the "teacher", from what, how long, and the file it goes to.

    Of each step `labeled` and `unlabeled` images; without `unlabeled` it learns from the labels alone. `head_only` is
    linear evaluation, which takes no steps. `threshold` is what pseudo labels are held to, for reports on val.
    """

    stage: str
    who: str
    path: Path
    spec: ModelSpec
    optim: OptimConfig
    views: ViewConfig | ContrastiveViewConfig
    labeled: int
    unlabeled: int
    make_method: Callable[[Network], Method]
    head_only: bool = False
    threshold: float | None = None


def training_of(begun: Begun, stage: str) -> Training:
    """What `stage` trains: "pretrain", "baseline", "outer" or "inner"."""
    run, recipe = begun.run, begun.recipe
    if stage == "pretrain":
        assert recipe.pretrain is not None
        return _pretraining(begun, recipe.pretrain)
    if stage == "outer":
        assert recipe.teacher is not None
        return _of_method(begun, stage, "teacher", run.teacher_path, recipe.teacher)
    if stage == "inner":
        return _of_method(begun, stage, "student", run.student_path, recipe.student)
    spec, optim = begun.student_spec(), recipe.baseline.optim
    batch = optim.labeled_batch or 0
    return Training(stage, "student", run.baseline_path, spec, optim, recipe.views, batch, 0, Supervised)


def _pretraining(begun: Begun, config: PretrainConfig) -> Training:
    preprocess = begun.preprocess
    image = (preprocess.channels, preprocess.height, preprocess.width)
    return Training(
        "pretrain",
        config.of,
        begun.run.pretrained_path,
        begun.pretrained_spec(config.of),
        config.optim,
        config.views,
        0,
        config.batch or 0,
        partial(SimCLR, config=config.method, image=image),
    )


def _of_method(begun: Begun, stage: str, who: str, path: Path, config: TeacherConfig | StudentConfig) -> Training:
    method, batch = config.method, config.optim.labeled_batch or 0
    fine_tune = method if isinstance(method, FineTuneConfig) else None
    return Training(
        stage,
        who,
        path,
        begun.teacher_spec(config) if isinstance(config, TeacherConfig) else begun.student_spec(),
        config.optim,
        begun.recipe.views,
        batch,
        0 if fine_tune else batch * (config.optim.unlabeled_ratio or 0),
        partial(_outer if stage == "outer" else _inner, begun),
        head_only=fine_tune is not None and fine_tune.train == "head",
        threshold=None if isinstance(method, FineTuneConfig) else method.thresholds.threshold,
    )


def _outer(begun: Begun, network: Network) -> Method:
    assert begun.recipe.teacher is not None
    config = begun.recipe.teacher.method
    if isinstance(config, FineTuneConfig):
        return Supervised(network)
    return FixMatch(network, config, _policy(begun, config.thresholds), _log_prior(begun))


def _inner(begun: Begun, network: Network) -> Method:
    """FixMatch alone where there is no outer network."""
    recipe, config, teacher_path = begun.recipe, begun.recipe.student.method, begun.run.teacher_path
    if recipe.teacher is not None and recipe.student.init == TEACHERS_WEIGHTS:
        copy_weights(network, teacher_path)
    if isinstance(config, FineTuneConfig):
        return Supervised(network)
    policy, prior = _policy(begun, config.thresholds), _log_prior(begun)
    if recipe.teacher is None:
        return KDFixMatch(network, config, policy, nothing_trusted(len(begun.pool.unlabeled)), None, prior)
    trusted, loaded = load_trusted(begun.run.trusted_path), load_model(teacher_path)
    features = None
    if config.distill.needs_features and config.distill.views == "stored":
        _, stored, features_path = stored_answers(begun, loaded)
        features = torch.from_numpy(np.array(stored, dtype=np.float32))
        begun.ranks.barrier()  # all have read it
        if begun.ranks.is_first:
            features_path.unlink()
    teacher = make_teacher(config.distill, loaded, torch.from_numpy(trusted.logits), features, begun.pool)
    return KDFixMatch(network, config, policy, targets(trusted), teacher, prior)


def stored_answers(begun: Begun, loaded: LoadedModel) -> tuple[Tensor, np.memmap, Path]:
    """Logits and features of the outer network on all unlabeled images, and the file of the features, to be removed."""
    features_path, plan = begun.run.checkpoint_path / "features.npy", begun.notes.plan_of("outer")
    logits, features = outer_answers(
        loaded, begun.source, begun.splits, begun.pool, begun.preprocess, plan, features_path, begun.ranks
    )
    return logits, features, features_path


def _policy(begun: Begun, config: ThresholdConfig) -> Policy:
    return make_policy(config, len(begun.source.classes), len(begun.pool.unlabeled))


def _log_prior(begun: Begun) -> Tensor:
    return log_prior(begun.pool.labels, len(begun.source.classes))
