"""The optimizers and schedules of FixMatch and of SimCLR, as one config."""

import math
from typing import Annotated, Literal, Self, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import nn

from kdedge.config import Config
from kdedge.train.due import to_steps
from kdedge.train.lars import Lars

__all__ = ["OptimConfig", "OptimizerName", "Schedule", "learning_rate", "make_optimizer", "set_batch_norm_momentum"]

OptimizerName: TypeAlias = Literal["sgd", "lars"]
Schedule: TypeAlias = Literal["fixmatch", "cosine"]

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]


class OptimConfig(Config):
    """How a stage is trained. What is null comes from the stage's named settings (`kdedge.recipe.SETTINGS`).

    `optimizer` and `schedule` may stay null, which is sgd and fixmatch.
    """

    total_steps: Count | None = None
    total_epochs: Count | None = None  # passes over the unlabeled images (labeled ones for the baseline)
    total_images: Count | None = None  # labeled images drawn, as FixMatch counts
    labeled_batch: Count | None = None
    unlabeled_ratio: Count | None = None  # mu: unlabeled images for each labeled one
    optimizer: OptimizerName | None = None  # sgd: with Nesterov momentum; lars: for large batches
    schedule: Schedule | None = None  # after the warm-up; fixmatch: ends at 19.5 % of the rate, cosine: at 0
    learning_rate: Positive | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None  # on kernels only, never on biases and batch norms
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None  # ceiling; see kdedge.models.ema.ema_decay
    batch_norm_momentum: Annotated[float, Field(ge=0, le=1)] | None = None  # share of the new batch; 0: statistics stay

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        to_steps(self.total_steps, self.total_epochs, self.total_images, batch=1, images_an_epoch=1)
        return self


def learning_rate(
    step: int, total_steps: int, peak: float, warmup_steps: int, schedule: Schedule = "fixmatch"
) -> float:
    """The rate of `step`, counted from 0, after a linear warm-up.

    fixmatch: peak * cos(7 pi k / 16 K) (arXiv 2001.07685, section 2.5), which ends at 19.5 % of the peak. cosine: half
    a period over the steps that follow the warm-up, which ends at 0 (google-research/simclr, model_util.py).
    """
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    if schedule == "fixmatch":
        return peak * warm * math.cos(7 * math.pi * step / (16 * total_steps))
    if step < warmup_steps:
        return peak * warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


def make_optimizer(
    network: nn.Module,
    peak: float,
    momentum: float,
    weight_decay: float,
    optimizer: OptimizerName = "sgd",
    *,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or LARS; weight decay, and LARS's adaptation, on convolution and linear kernels only.

    So in FixMatch's code and in SimCLR's. `fused` says how SGD's kernels are made, and rounds elsewhere.
    """
    kernels = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in network.parameters() if p.requires_grad and p.ndim <= 1]
    if optimizer == "lars":
        adapted = {"params": kernels, "weight_decay": weight_decay, "adapt": True}
        return Lars([adapted, {"params": others, "adapt": False}], lr=peak, momentum=momentum)
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=peak, momentum=momentum, nesterov=momentum > 0, foreach=not fused, fused=fused)


def set_batch_norm_momentum(network: nn.Module, momentum: float) -> None:
    """Share of the new batch in the running statistics. 0.001 (the paper's) needs very long runs.

    0 is for starting weights: in training too, batch norm then uses the statistics they came with. Those of a small
    batch, half of it strong views, are of other images than the weights, and the head fitted to them, have seen. To be
    called after `network.train()`.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            if momentum:
                module.momentum = momentum
            else:
                module.eval()
