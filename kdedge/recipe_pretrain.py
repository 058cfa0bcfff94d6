"""Contrastive pre-training in a recipe: which network, how, and the published settings by name."""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kdedge.config import Config
from kdedge.data.contrastive_views import ContrastiveViewConfig
from kdedge.errors import BugError, RecipeError
from kdedge.methods.simclr import SimCLRConfig
from kdedge.recipe_fill import filled, in_steps
from kdedge.train.optim import OptimConfig

__all__ = ["PRETRAIN_SETTINGS", "PretrainConfig", "PretrainSettings", "Published", "resolved_pretrain"]

PretrainSettings = Literal["simclr.small", "simclr.imagenet", "simclr.short"]


@dataclass(frozen=True)
class Published:
    """What a name in `pretrain.settings` stands for."""

    batch: int
    epochs: int | None  # None: the number of steps follows from the kind of images
    warmup_fraction: float  # of all steps
    rate_of_256: float  # learning rate for a batch of 256; it grows with the batch
    temperature: float | None  # None: it follows from the kind of images
    views: ContrastiveViewConfig | None  # None: they follow from the kind of images
    optim: OptimConfig


_LARS = OptimConfig(
    optimizer="lars",
    schedule="cosine",
    momentum=0.9,
    weight_decay=1e-4,
    # The weights themselves: the projection head is not averaged, and what is kept of it must fit the backbone.
    ema_decay=0.0,
    batch_norm_momentum=0.1,
)

_SMALL_VIEWS = ContrastiveViewConfig(
    smallest_area=0.08, rotate_degrees=0.0, jitter_strength=0.5, grayscale_probability=0.2, blur_probability=0.0
)
_PHOTO_VIEWS = ContrastiveViewConfig(
    smallest_area=0.08, rotate_degrees=0.0, jitter_strength=1.0, grayscale_probability=0.2, blur_probability=0.5
)

PRETRAIN_SETTINGS: dict[PretrainSettings, Published] = {
    # google-research/simclr at 383d4143: the command of its README for CIFAR-10, and the defaults of run.py for
    # ImageNet. There the rate is for 256 images too, and the warm-up 10 epochs.
    "simclr.small": Published(512, 1000, 0.01, 1.0, 0.5, _SMALL_VIEWS, _LARS),
    "simclr.imagenet": Published(4096, 100, 0.1, 0.3, 0.1, _PHOTO_VIEWS, _LARS),
    # Minutes on a laptop CPU for small images. Readings after 100 to 150 steps on training images, one seed. Digits (8
    # px, wide-resnet-10-2, probe of 40 labels; random features 73.5 %): 89.7, 91.5 and 92.6 % at rates of 1, 2 and 3;
    # 84.1 % from parts of 0.2, 84.7 % at a temperature of 0.2. MNIST (16 px, batch 128, kNN): a rate of 1 and a turn of
    # 25 degrees 74.6 to 84.4 %, the turn being 2 to 3 points of it, temperatures of 0.1 and 0.5 alike; at a rate of 3
    # less than random features. CIFAR-10 (16 px, temperature 0.2, published views): 24.0 to 33.2 %.
    "simclr.short": Published(256, None, 0.1, 2.0, None, None, _LARS),
}

_STEPS = {"digits": 300, "small": 4000, "photo": 2000}
_PHOTO_BATCH = 32  # in two views; each a pass of the backbone at up to 224 px

_TEMPERATURE = {"digits": 0.5, "small": 0.2, "photo": 0.1}
_DIGIT_VIEWS = ContrastiveViewConfig(
    smallest_area=0.4, rotate_degrees=15.0, jitter_strength=0.5, grayscale_probability=0.0, blur_probability=0.0
)
_SIGN_VIEWS = ContrastiveViewConfig(  # small images that no mirror may touch: digits and letters of some size, garments
    smallest_area=0.3, rotate_degrees=25.0, jitter_strength=0.5, grayscale_probability=0.2, blur_probability=0.0
)


class PretrainConfig(Config):
    """SimCLR on all training images without their labels, before anything else is trained.

    Contrastive pre-training is poor on small networks (SEED, arXiv 2101.04731): pre-train the teacher, and distil to
    the student.
    """

    of: Literal["teacher", "student"] = "teacher"
    settings: PretrainSettings = "simclr.short"
    batch: Annotated[int, Field(gt=1)] | None = None  # images a step, each in two views
    method: SimCLRConfig = SimCLRConfig()
    views: ContrastiveViewConfig = ContrastiveViewConfig()
    optim: OptimConfig = OptimConfig()  # total_epochs: passes over all training images; total_images: images drawn

    @model_validator(mode="after")
    def _without_labels_and_average(self) -> Self:
        for name in ("labeled_batch", "unlabeled_ratio"):
            if getattr(self.optim, name) is not None:
                raise ValueError(f"optim.{name} counts labels, and pre-training has none; set pretrain.batch instead.")
        if self.optim.ema_decay:
            raise ValueError(
                f"optim.ema_decay is {self.optim.ema_decay:g}, and the projection head, which is kept beside the "
                "backbone, is not averaged. Set it to 0, or leave it out."
            )
        return self


def resolved_pretrain(
    config: PretrainConfig, *, kind: Literal["digits", "small", "photo"], flip_allowed: bool, images: int
) -> PretrainConfig:
    """`config` with every open value filled in, for `images` unlabeled images of a kind.

    RecipeError where the batch is larger than the set: an image would be compared with itself as with another.
    """
    named = PRETRAIN_SETTINGS[config.settings]
    usual = _PHOTO_BATCH if config.settings == "simclr.short" and kind == "photo" else named.batch
    batch = min(usual, images) if config.batch is None else config.batch
    if batch > images:
        raise RecipeError(
            f"pretrain.batch is {batch}, and there are {images} training images: some would be twice in a batch, and "
            f"pushed away from themselves. Set pretrain.batch to {images} or less."
        )
    views = named.views or _views(kind, flip_allowed)
    return config.model_copy(
        update={
            "batch": batch,
            "method": filled(config.method, temperature=named.temperature or _TEMPERATURE[kind]),
            "views": filled(config.views, **views.model_dump(exclude={"flip"}), flip=flip_allowed),
            "optim": _optim(config.optim, named, batch, images, _STEPS[kind]),
        }
    )


def _views(kind: str, flip_allowed: bool) -> ContrastiveViewConfig:
    if kind == "digits":
        return _DIGIT_VIEWS
    if kind == "small":
        return _SMALL_VIEWS if flip_allowed else _SIGN_VIEWS
    return _PHOTO_VIEWS


def _optim(given: OptimConfig, named: Published, batch: int, images: int, steps: int) -> OptimConfig:
    optim = filled(given, **named.optim.model_dump(exclude={"total_steps", "total_epochs", "total_images"}))
    optim = filled(optim, learning_rate=named.rate_of_256 * batch / 256)
    if named.epochs is not None:
        steps = -(-named.epochs * images // batch)
    optim = in_steps(optim, steps, batch=batch, images_an_epoch=images, batch_of_epoch=batch)
    if optim.total_steps is None:
        raise BugError("the number of steps was left open")
    return filled(optim, warmup_steps=round(named.warmup_fraction * optim.total_steps))
