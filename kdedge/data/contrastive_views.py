"""The views that contrastive learning compares: a random part of the image, mirrored, recoloured, blurred.

SimCLR, Chen et al., arXiv 2002.05709, appendix A, with the ranges and the order of google-research/simclr. Images come
as uint8 [B, C, H, W] and leave as float [B, C, H, W] in 0..255. As in `kdedge.data.views` all random numbers are drawn
on the CPU in one block, a column for each image, so that a step is the same on every device and a share of a batch is
some of its columns. What is decided by them is decided there too: a GPU is not asked which images an operation is for.

Images of one channel have no colours: hue, saturation and grayscale leave them as they are, and of three equal channels
too. B batch, C channels, H and W pixels, D draws an image.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdedge.config import Config
from kdedge.data import augment
from kdedge.data.colour import blur, hue

__all__ = ["ContrastiveViewConfig", "contrastive", "contrastive_draws"]

Fraction = Annotated[float, Field(ge=0, le=1)]

# area, aspect, top, left; mirror; jitter or not, in which order, four factors; grey; blur or not, how far; rotation
_DRAWS = 15
_ORDERS = torch.tensor(list(permutations(range(4))))
_BLUR_FRACTION = 0.1  # of the height: the width of the kernel
_BLUR_SIGMA = (0.1, 2.0)  # pixels


class ContrastiveViewConfig(Config):
    """How far contrastive views go. What is null is resolved from the kind of images.

    Published: smallest_area 0.08, flip true, grayscale 0.2, and jitter_strength 1 with blur 0.5 for photographs, 0.5
    without blur for small images. Digits have neither a mirror image nor colours; they may be turned a little, which
    is ours.
    """

    smallest_area: Annotated[float, Field(gt=0, le=1)] | None = None  # of the image's; a part has this area or more
    widest_aspect: Annotated[float, Field(ge=1)] = 4 / 3  # of a part, width over height; the narrowest is its inverse
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] | None = None  # either way; null, where not resolved, is none
    flip: bool | None = None  # mirror left to right, half of the images
    # s: brightness, contrast and saturation are multiplied by 1 - 0.8 s to 1 + 0.8 s, hue turned by up to 0.2 s
    jitter_strength: Annotated[float, Field(ge=0, le=2.5)] | None = None
    jitter_probability: Fraction = 0.8
    grayscale_probability: Fraction | None = None
    blur_probability: Fraction | None = None  # sigma 0.1 to 2 pixels, the kernel a tenth of the height wide


def contrastive_draws(count: int, config: ContrastiveViewConfig, generator: torch.Generator) -> Tensor:
    """What `contrastive` needs for `count` images, [D, B] in 0..1; as many whatever the config says."""
    return torch.rand(_DRAWS, count, generator=generator)


def contrastive(images_BCHW: Tensor, config: ContrastiveViewConfig, draws_DB: Tensor) -> Tensor:
    """One view of each image. `draws` are on the CPU; ValueError where the config has not been resolved."""
    if not len(images_BCHW):
        return images_BCHW.float()
    draws = draws_DB.cpu()
    theta = _rectangle(images_BCHW, config, draws[:4])
    if config.rotate_degrees:  # what is cut out, about its own centre
        turned = augment.rotation(config.rotate_degrees * (2 * draws[14] - 1))
        theta[:, :, :2] = theta[:, :, :2].diagonal(dim1=1, dim2=2).unsqueeze(2) * turned[:, :, :2]
    if _known(config.flip):
        theta[:, :, 0] = torch.where(draws[4, :, None] < 0.5, -theta[:, :, 0], theta[:, :, 0])
    x = _part(images_BCHW.float(), theta)
    x = _jittered(x, _known(config.jitter_strength) * (draws[5] < config.jitter_probability), draws[6:11])
    if x.shape[1] == 3:
        x = _where(x, draws[11] < _known(config.grayscale_probability), augment.color, torch.zeros(len(x)))
    radius = int(_BLUR_FRACTION * x.shape[2]) // 2
    low, high = _BLUR_SIGMA
    sigma = low + (high - low) * draws[13]
    return _where(x, draws[12] < _known(config.blur_probability), partial(blur, radius=radius), sigma)


def _known(value: float | None) -> float:
    if value is None:
        raise ValueError("the view configuration has not been resolved against the data")
    return value


def _where(x: Tensor, chosen_B: Tensor, apply: Callable[[Tensor, Tensor], Tensor], values_B: Tensor) -> Tensor:
    """`apply` to the chosen images and their values; the others as they are."""
    rows = chosen_B.nonzero().squeeze(1)
    if not len(rows):
        return x
    values = values_B[rows].to(x.device, non_blocking=True)
    if len(rows) == len(x):
        return apply(x, values)
    rows = rows.to(x.device, non_blocking=True)
    return x.index_copy(0, rows, apply(x[rows], values))


def _rectangle(images_BCHW: Tensor, config: ContrastiveViewConfig, draws_4B: Tensor) -> Tensor:
    """Where a rectangle of each image lies, [B, 2, 3], in grid_sample's units: -1 to 1 over the image.

    Its area is even in smallest_area..1, and its aspect even, in the logarithm, among those that fit with this area;
    published code draws both until they fit, which makes the largest areas a little rarer.
    """
    area, aspect, top, left = draws_4B
    smallest = _known(config.smallest_area)
    area = smallest + (1 - smallest) * area
    # The aspect of fractions of the sides is that of pixels times this.
    square = images_BCHW.shape[2] / images_BCHW.shape[3]
    widest = -area.log()  # a part with a higher aspect would be wider than the image
    low = torch.full_like(area, math.log(square / config.widest_aspect)).clamp(-widest, widest)
    high = torch.full_like(area, math.log(square * config.widest_aspect)).clamp(-widest, widest)
    half = (low + (high - low) * aspect) / 2
    width, height = area.sqrt() * half.exp(), area.sqrt() * (-half).exp()
    theta = torch.zeros(len(area), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width, (1 - width) * (2 * left - 1)
    theta[:, 1, 1], theta[:, 1, 2] = height, (1 - height) * (2 * top - 1)
    return theta


def _part(x: Tensor, theta_B23: Tensor) -> Tensor:
    """A part of each image stretched over the whole; bicubic, rounded to bytes; what lies outside is mirrored.

    A part is never larger than what it is stretched over, so that nothing is made smaller and no filter against
    aliasing is needed.
    """
    grid = functional.affine_grid(
        theta_B23.to(x.device, non_blocking=True), [len(x), 1, *x.shape[2:]], align_corners=False
    )
    moved = functional.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return moved.round_().clamp_(0, 255)


def _jittered(x: Tensor, strength_B: Tensor, draws_5B: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in one of their 24 orders, where `strength` is above 0."""
    order_4B = _ORDERS[(draws_5B[0] * len(_ORDERS)).long().clamp_(max=len(_ORDERS) - 1)].T
    spread_4B = 2 * draws_5B[1:] - 1
    # from max(1 - 0.8 s, 0), as published: a strength over 1.25 does not turn colours around
    least = (1 - 0.8 * strength_B).clamp(min=0)
    factor_4B = least + (1 + 0.8 * strength_B - least) * draws_5B[1:]
    factor_4B[3] = 0.2 * strength_B * spread_4B[3]
    operations = (augment.brightness, augment.contrast, augment.color, hue)
    for place_B in order_4B:
        for index, operation in enumerate(operations if x.shape[1] == 3 else operations[:2]):
            x = _where(x, (place_B == index) & (strength_B > 0), operation, factor_4B[index])
    return x
