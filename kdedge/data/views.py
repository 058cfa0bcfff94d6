"""Weak and strong views of a batch: what FixMatch compares.

Weak: a small shift and, where allowed, a mirror (arXiv 2001.07685, section 2.3).
Strong: the weak view, then RandAugment with operations and magnitudes drawn anew for each image, then Cutout; the
form with continuous magnitudes, which does not depend on the resolution (microsoft/Semi-supervised-learning).

Images come as uint8 [B, C, H, W] and leave as float [B, C, H, W] in 0..255. All random numbers are drawn on the CPU in
one block, a column for each image, so that a step is the same on every device and a share of a batch is some of its
columns. What goes to a device is not waited for (`non_blocking`): torch's copies otherwise wait for all that it was
given to do.

B batch, C channels, H and W pixels, D draws an image.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from kdedge.config import Config
from kdedge.data import augment
from kdedge_device.preprocess import Preprocess

__all__ = ["OPERATIONS", "ViewConfig", "columns", "normalize", "strong", "strong_draws", "weak", "weak_draws"]

Fraction = Annotated[float, Field(ge=0, le=1)]

OPERATIONS = (
    "identity", "autocontrast", "equalize", "brightness", "color", "contrast", "sharpness", "posterize", "solarize",
    "rotate", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
_FIRST_GEOMETRIC = OPERATIONS.index("rotate")
_WEAK = 3  # draws of the weak view


class ViewConfig(Config):
    """How far views go. What is null is resolved from the data description (`kdedge.recipe.resolve`)."""

    flip: bool | None = None  # mirror left to right; never for digits, letters, signs
    shift_fraction: Annotated[float, Field(ge=0, le=0.5)] | None = None  # of the shorter side, weak view
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] | None = None  # strong view, either way
    shear: Fraction | None = None  # strong view, either way
    translate_fraction: Fraction | None = None  # of the side, strong view, either way
    cutout_fraction: Fraction | None = None  # of the shorter side; the square's side is drawn from 0 to this
    operations: Annotated[int, Field(ge=0, le=8)] = 2  # of RandAugment on each image
    fill: Annotated[float, Field(ge=0, le=255)] | None = None  # what moves in from outside, and the hole of Cutout
    geometric_only: bool | None = None  # leave out the colour and histogram operations: images with a few grey levels


def columns(preprocess: Preprocess, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C, 1, 1] of pixel / 255, as `normalize` takes them."""
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
    return mean, std


def normalize(x_BCHW: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x / 255 - mean) / std for images in 0..255; mean and std [C, 1, 1] of pixel / 255."""
    return torch.sub(x_BCHW, mean * 255).div_(std * 255)


def weak_draws(count: int, generator: torch.Generator) -> Tensor:
    """What `weak` needs for `count` images, [D, B] in 0..1: down, right, mirror."""
    return torch.rand(_WEAK, count, generator=generator)


def strong_draws(count: int, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """What `strong` needs, [D, B] in 0..1: the weak view's, then for each operation which, how far and which way, then
    the hole's centre and side."""
    return torch.rand(_WEAK + 3 * config.operations + 3, count, generator=generator)


def weak(images_BCHW: Tensor, config: ViewConfig, draws_DB: Tensor) -> Tensor:
    """Shift and, where allowed, mirror."""
    height, width = images_BCHW.shape[2:]
    most = round(_known(config.shift_fraction) * min(height, width))
    draws = draws_DB.to(images_BCHW.device, non_blocking=True)
    offsets = (draws[:2].T * (2 * most + 1)).long().clamp_(max=2 * most)
    # Reflection makes no new edges in a photograph; for digits it would double strokes, so the background moves in,
    # which need not be a whole number. What only moves bytes is done on bytes.
    fill = _known(config.fill) if config.geometric_only else None
    x = images_BCHW if fill is None else images_BCHW.float()
    return augment.shift(x, offsets, most, fill, draws[2] < 0.5 if config.flip else None).float()


def strong(images_BCHW: Tensor, config: ViewConfig, draws_DB: Tensor, *, fixed_shapes: bool = False) -> Tensor:
    """The weak view, `operations` random operations, Cutout.

    With `fixed_shapes` no shape follows from a draw, and `draws` lie where the images are: the same views by more work
    in fewer kernels, once it is compiled.
    """
    x = weak(images_BCHW, config, draws_DB[:_WEAK])
    if not len(x):
        return x
    height, width = x.shape[2:]
    first = _FIRST_GEOMETRIC if config.geometric_only else 0
    apply = _apply_to_all if fixed_shapes else _apply
    for choice, magnitude, sign in draws_DB[_WEAK:-3].reshape(config.operations, 3, len(x)).unbind():
        operation = first + (choice * (len(OPERATIONS) - first)).long().clamp_(max=len(OPERATIONS) - first - 1)
        x = apply(x, operation, magnitude, torch.where(sign < 0.5, -1.0, 1.0), config)
    hole = draws_DB[-3:].to(x.device, non_blocking=True)
    centre = hole[:2].T * torch.linspace(height, width, 2, device=x.device)
    return augment.cutout(x, centre, hole[2] * _known(config.cutout_fraction) * min(height, width), _known(config.fill))


def _known(value: float | None) -> float:
    if value is None:
        raise ValueError("the view configuration has not been resolved against the data")
    return value


def _apply(x: Tensor, operation_B: Tensor, magnitude_B: Tensor, sign_B: Tensor, config: ViewConfig) -> Tensor:
    """Apply operation_B[i] to image i.

    Images are put in the order of their operations, and then back, so that each kernel runs once and on images that lie
    together. The order is found where the draws are, on the CPU: a GPU is not waited for.
    """
    order_B = operation_B.argsort(stable=True)
    counts = torch.bincount(operation_B, minlength=len(OPERATIONS)).tolist()
    there = partial(Tensor.to, device=x.device, non_blocking=True)
    ordered = x.index_select(0, there(order_B))
    magnitudes = torch.split(there(magnitude_B[order_B]), counts)
    groups = zip(OPERATIONS[:_FIRST_GEOMETRIC], torch.split(ordered, counts), magnitudes, strict=False)
    done = [_photometric(name, group, magnitude) for name, group, magnitude in groups if len(group)]
    moved = ordered[sum(counts[:_FIRST_GEOMETRIC]) :]
    if len(moved):
        signed = torch.split(there((magnitude_B * sign_B)[order_B]), counts)[_FIRST_GEOMETRIC:]
        matrices = _matrices(signed, x.shape[2], x.shape[3], config)
        done.append(augment.affine(moved, matrices, _known(config.fill)).round_())
    return torch.cat(done).index_select(0, there(order_B.argsort()))


def _apply_to_all(x: Tensor, operation_B: Tensor, magnitude_B: Tensor, sign_B: Tensor, config: ViewConfig) -> Tensor:
    """What `_apply` does, by doing every operation to every image, of which each keeps its own.

    All tensors lie on one device, and nothing is sent to it: what a CUDA graph needs.
    """
    chosen, found = operation_B.view(-1, 1, 1, 1), x
    for number, name in enumerate(() if config.geometric_only else OPERATIONS[:_FIRST_GEOMETRIC]):
        found = torch.where(chosen == number, _photometric(name, x, magnitude_B), found)
    ways = len(OPERATIONS) - _FIRST_GEOMETRIC
    matrices = _matrices([magnitude_B * sign_B] * ways, x.shape[2], x.shape[3], config).view(ways, len(x), 2, 3)
    way_B = (operation_B - _FIRST_GEOMETRIC).clamp(min=0)
    matrix_B23 = matrices[way_B, torch.arange(len(x), device=x.device)]
    moved = augment.affine(x, matrix_B23, _known(config.fill)).round_()
    return torch.where(chosen >= _FIRST_GEOMETRIC, moved, found)


def _photometric(name: str, x: Tensor, magnitude: Tensor) -> Tensor:
    """Ranges of the pool: enhancement factors 0.05..0.95, posterize 4..8 bits, solarize 0..256."""
    if name == "identity":
        return x
    if name == "autocontrast":
        return augment.autocontrast(x)
    if name == "equalize":
        return augment.equalize(x)
    if name == "posterize":
        return augment.posterize(x, 4 + magnitude * 4)
    if name == "solarize":
        return augment.solarize(x, magnitude * 256)
    enhance = {
        "brightness": augment.brightness,
        "color": augment.color,
        "contrast": augment.contrast,
        "sharpness": augment.sharpness,
    }
    return enhance[name](x, 0.05 + magnitude * 0.9)


def _matrices(signed: Sequence[Tensor], height: int, width: int, config: ViewConfig) -> Tensor:
    """[N, 2, 3] for images whose operation is rotate, or shear_x, ...: how far each of them goes, in -1..1."""
    rotated, sheared_x, sheared_y, translated_x, translated_y = signed
    return torch.cat(
        [
            augment.rotation(rotated * _known(config.rotate_degrees)),
            augment.shear_x(sheared_x * _known(config.shear), height),
            augment.shear_y(sheared_y * _known(config.shear), width),
            augment.translate_x(translated_x * _known(config.translate_fraction) * width),
            augment.translate_y(translated_y * _known(config.translate_fraction) * height),
        ]
    )
