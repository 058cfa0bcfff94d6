"""How what a recipe leaves open is filled in, whatever the group of keys."""

from typing import TypeVar

from kdedge.config import Config
from kdedge.train.due import to_steps
from kdedge.train.optim import OptimConfig

__all__ = ["filled", "in_steps"]

Some = TypeVar("Some", bound=Config)


def filled(config: Some, **values: object) -> Some:
    """`config` with `values` where it says null."""
    return config.model_copy(update={name: value for name, value in values.items() if getattr(config, name) is None})


def in_steps(
    config: OptimConfig, default: int, *, batch: int, images_an_epoch: int, batch_of_epoch: int
) -> OptimConfig:
    """The duration as total_steps, whatever unit it was given in; `total_images` counts images of `batch` a step."""
    epochs = to_steps(None, config.total_epochs, None, batch=batch_of_epoch, images_an_epoch=images_an_epoch)
    images = to_steps(None, None, config.total_images, batch=batch, images_an_epoch=1)
    steps = config.total_steps or epochs or images or default
    return config.model_copy(update={"total_steps": steps, "total_epochs": None, "total_images": None})
