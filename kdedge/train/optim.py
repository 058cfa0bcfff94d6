"""The optimizer and schedule of FixMatch, as one config."""

import math
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from kdedge.config import Config
from kdedge.train.due import to_steps

__all__ = ["OptimConfig", "learning_rate", "make_optimizer", "set_batch_norm_momentum"]

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]


class OptimConfig(Config):
    """How a stage is trained. What is null comes from the stage's named settings (`kdedge.recipe.SETTINGS`)."""

    total_steps: Count | None = None
    total_epochs: Count | None = None  # passes over the unlabeled images (labeled ones for the baseline)
    total_images: Count | None = None  # labeled images drawn, as FixMatch counts
    labeled_batch: Count | None = None
    unlabeled_ratio: Count | None = None  # mu: unlabeled images for each labeled one
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


def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int) -> float:
    """peak * cos(7 pi k / 16 K) after a linear warm-up (arXiv 2001.07685, section 2.5): ends at 19.5 % of the peak."""
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    return peak * warm * math.cos(7 * math.pi * step / (16 * total_steps))


def make_optimizer(network: nn.Module, peak: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weight decay on convolution and linear kernels only, as in FixMatch's code."""
    kernels = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in network.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=peak, momentum=momentum, nesterov=momentum > 0, foreach=True)


def set_batch_norm_momentum(network: nn.Module, momentum: float) -> None:
    """Share of the new batch in the running statistics. 0.001 (the paper's) needs very long runs.

    0 is for starting weights: in training too, batch norm then uses the statistics they came with. Those of a small
    batch, half of it strong views, are of other images than the weights, and the head fitted to them, have seen. To be
    called after `network.train()`.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            if momentum:
                module.momentum = momentum
            else:
                module.eval()
