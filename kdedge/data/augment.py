"""The operations of RandAugment, in batches on tensors, with one magnitude an image.

Images are float [B, C, H, W] in 0..255, whole numbers where Pillow would hold bytes, on whatever device. Each
operation follows Pillow's of the same name as used by FixMatch (arXiv 2001.07685, table 12 of the appendix), but that
rotations, shears and translations are bilinear and not nearest. On photographs, over the whole range of magnitudes, a
pixel is Pillow's exactly, or differs by 1 of 255 after autocontrast, brightness and the bilinear ones, which round
where Pillow cuts off; tests/learn/test_augment.py holds each to it. Nothing here draws random numbers: magnitudes come
in, one for each image, so that a step can be repeated. Constants are made on the device: one that is copied there
makes the host wait for it, and keeps a compiler from putting all of this into one CUDA graph.

B batch, C channels, H and W pixels.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "affine",
    "autocontrast",
    "brightness",
    "color",
    "contrast",
    "cutout",
    "equalize",
    "posterize",
    "sharpness",
    "shift",
    "solarize",
]


def _column(values_B: Tensor) -> Tensor:
    return values_B.view(-1, 1, 1, 1)


def _grey(x_BCHW: Tensor) -> Tensor:
    """ITU-R 601 luma [B, 1, H, W], rounded as Pillow's convert("L") is."""
    if x_BCHW.shape[1] == 1:
        return x_BCHW
    red, green, blue = x_BCHW.unbind(1)
    # Pillow: (19595 R + 38470 G + 7471 B + 0x8000) >> 16
    return torch.floor((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).unsqueeze(1)


def _blend(degenerate: Tensor, x_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """degenerate + factor * (x - degenerate), clamped and cut to bytes (ImageEnhance)."""
    return (degenerate + _column(factor_B) * (x_BCHW - degenerate)).clamp(0, 255).floor()


def brightness(x_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """0 is black, 1 the image."""
    return _blend(torch.zeros_like(x_BCHW), x_BCHW, factor_B)


def color(x_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """0 is grey, 1 the image; nothing changes where there is one channel."""
    return _blend(_grey(x_BCHW).expand_as(x_BCHW), x_BCHW, factor_B)


def contrast(x_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """0 is the mean luma of the image, 1 the image."""
    mean = torch.floor(_grey(x_BCHW).mean((1, 2, 3), keepdim=True) + 0.5)
    return _blend(mean.expand_as(x_BCHW), x_BCHW, factor_B)


def sharpness(x_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """0 is the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, 1 the image; the border keeps its pixels."""
    channels = x_BCHW.shape[1]
    kernel = x_BCHW.new_full((3, 3), 1 / 13)
    kernel[1, 1] = 5 / 13
    inner = functional.conv2d(x_BCHW, kernel.expand(channels, 1, 3, 3), groups=channels)
    smooth = x_BCHW.clone()
    smooth[:, :, 1:-1, 1:-1] = torch.floor(inner + 0.5)
    return _blend(smooth, x_BCHW, factor_B)


def posterize(x_BCHW: Tensor, bits_B: Tensor) -> Tensor:
    """Keep the highest `bits` bits, a whole number from 1 to 8."""
    step = _column(torch.exp2(8 - torch.floor(bits_B)))
    return torch.floor(x_BCHW / step) * step


def solarize(x_BCHW: Tensor, threshold_B: Tensor) -> Tensor:
    """Invert the pixels at or above `threshold`, 0..256."""
    return torch.where(x_BCHW < _column(threshold_B), x_BCHW, 255 - x_BCHW)


def autocontrast(x_BCHW: Tensor) -> Tensor:
    """Stretch each channel of each image to 0..255; a constant channel stays."""
    low = x_BCHW.amin((2, 3), keepdim=True)
    high = x_BCHW.amax((2, 3), keepdim=True)
    scale = 255 / (high - low).clamp(min=1)
    return torch.where(high > low, ((x_BCHW - low) * scale).clamp(0, 255).floor(), x_BCHW)


def equalize(x_BCHW: Tensor) -> Tensor:
    """Flatten the histogram of each channel of each image (Pillow's ImageOps.equalize)."""
    batch, channels, height, width = x_BCHW.shape
    levels = x_BCHW.reshape(batch * channels, height * width).long()
    # Whole numbers: CUDA has no deterministic cumulative sum of floats.
    histogram = torch.zeros(batch * channels, 256, dtype=torch.int64, device=x_BCHW.device)
    histogram.scatter_add_(1, levels, torch.ones_like(levels))
    # Pillow: step = (pixels - pixels of the brightest level present) // 255
    brightest = levels.amax(1, keepdim=True)
    step = (histogram.sum(1, keepdim=True) - histogram.gather(1, brightest)) // 255
    before = histogram.cumsum(1) - histogram
    table = ((before + step // 2) // step.clamp(min=1)).clamp(0, 255)
    table = torch.where(step > 0, table, torch.arange(256, device=x_BCHW.device))
    return table.gather(1, levels).to(x_BCHW.dtype).reshape(x_BCHW.shape)


def affine(x_BCHW: Tensor, matrix_B23: Tensor, fill: float, mode: str = "bilinear") -> Tensor:
    """Move pixels by `matrix`, which maps output to input in pixels about the centre; outside is `fill` (0..255)."""
    batch, _, height, width = x_BCHW.shape
    # grid_sample counts in half widths and half heights from the centre
    half = torch.linspace(width / 2, height / 2, 2, dtype=matrix_B23.dtype, device=matrix_B23.device)
    scale = half.view(1, 1, 2) / half.view(1, 2, 1)
    theta = torch.cat([matrix_B23[:, :, :2] * scale, matrix_B23[:, :, 2:] / half.view(1, 2, 1)], dim=2)
    grid = functional.affine_grid(theta, [batch, 1, height, width], align_corners=False)
    moved = functional.grid_sample(x_BCHW - fill, grid, mode=mode, padding_mode="zeros", align_corners=False)
    return (moved + fill).clamp(0, 255)


def rotation(degrees_B: Tensor) -> Tensor:
    """Matrices [B, 2, 3] that turn images counter-clockwise, as Pillow's rotate does."""
    radians = degrees_B * (math.pi / 180)
    cos, sin, zero = torch.cos(radians), torch.sin(radians), torch.zeros_like(radians)
    return torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)


def shear_x(amount_B: Tensor, height: int) -> Tensor:
    """Matrices that read x + amount * (y from the top): rows slide along x, the top one stays, as in FixMatch."""
    matrix = _unit(amount_B, 0, 1)
    matrix[:, 0, 2] = amount_B * height / 2
    return matrix


def shear_y(amount_B: Tensor, width: int) -> Tensor:
    """Matrices that read y + amount * (x from the left): columns slide along y, the left one stays."""
    matrix = _unit(amount_B, 1, 0)
    matrix[:, 1, 2] = amount_B * width / 2
    return matrix


def translate_x(pixels_B: Tensor) -> Tensor:
    """Matrices that read at x + pixels: the image moves to the left."""
    return _unit(pixels_B, 0, 2)


def translate_y(pixels_B: Tensor) -> Tensor:
    """Matrices that read at y + pixels: the image moves up."""
    return _unit(pixels_B, 1, 2)


def _unit(amount_B: Tensor, row: int, column: int) -> Tensor:
    matrix = torch.eye(2, 3, device=amount_B.device, dtype=amount_B.dtype).repeat(len(amount_B), 1, 1)
    matrix[:, row, column] = amount_B
    return matrix


def cutout(x_BCHW: Tensor, centre_B2: Tensor, side_B: Tensor, fill: float) -> Tensor:
    """Fill a square of `side` pixels about `centre` (y, x in pixels); at the border only its inner part."""
    height, width = x_BCHW.shape[2:]
    rows = torch.arange(height, device=x_BCHW.device) + 0.5
    columns = torch.arange(width, device=x_BCHW.device) + 0.5
    half = side_B.view(-1, 1) / 2
    inside_rows = ((rows - centre_B2[:, :1]).abs() <= half).to(x_BCHW.dtype)
    inside_columns = ((columns - centre_B2[:, 1:]).abs() <= half).to(x_BCHW.dtype)
    hole = (inside_rows[:, :, None] * inside_columns[:, None, :]).unsqueeze(1)
    # 0 and 1 make this exact, and it is five times as fast as a choice by a mask that all channels share.
    return torch.addcmul(hole * fill, x_BCHW, 1 - hole)


def shift(
    x_BCHW: Tensor, offset_B2: Tensor, most: int, fill: float | None = None, mirrored_B: Tensor | None = None
) -> Tensor:
    """Pad by `most` pixels (reflected, or with `fill`), cut at `offset` (y, x; whole numbers 0..2 * most), and mirror
    the images marked true from left to right."""
    if most == 0 and mirrored_B is None:
        return x_BCHW
    height, width = x_BCHW.shape[2:]
    rows = offset_B2[:, :1] + torch.arange(height, device=x_BCHW.device)
    columns = offset_B2[:, 1:] + torch.arange(width, device=x_BCHW.device)
    if mirrored_B is not None:
        columns = torch.where(mirrored_B.view(-1, 1), columns.flip(1), columns)
    if fill is None:
        # By index and not by padding: bytes can be moved so, and nothing is copied twice.
        rows, columns = _reflected(rows - most, height), _reflected(columns - most, width)
    else:
        x_BCHW = functional.pad(x_BCHW, (most, most, most, most), value=fill)
    places_B1N = (rows[:, :, None] * x_BCHW.shape[3] + columns[:, None, :]).flatten(1).unsqueeze(1)
    cut = x_BCHW.flatten(2).gather(2, places_B1N.expand(-1, x_BCHW.shape[1], -1))
    return cut.view(*x_BCHW.shape[:2], height, width)


def _reflected(places: Tensor, count: int) -> Tensor:
    """Places outside 0..count - 1 mirrored at the outermost pixel, which is not repeated."""
    return (count - 1) - ((count - 1) - places.abs()).abs()
