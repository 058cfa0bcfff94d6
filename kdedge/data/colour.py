"""Operations on pixels that contrastive views need beside those of RandAugment (`kdedge.data.augment`).

Images are float [B, C, H, W] in 0..255, whole numbers where Pillow would hold bytes, on whatever device; one magnitude
an image comes in. B batch, C channels, H and W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["blur", "hue"]


def hue(x_BCHW: Tensor, turn_B: Tensor) -> Tensor:
    """Turn the hue by `turn` of the colour circle, -0.5..0.5, keeping value and saturation (HSV).

    Grey pixels have no hue and stay. Of three channels only.
    """
    value, brightest = x_BCHW.max(1, keepdim=True)
    chroma = value - x_BCHW.amin(1, keepdim=True)
    red, green, blue = (x_BCHW[:, c : c + 1] for c in range(3))
    # In sixths of the circle, from the brightest channel's place: red 0, green 2, blue 4.
    differences = torch.cat([green - blue, blue - red, red - green], 1).gather(1, brightest)
    sixth = 2 * brightest + differences / chroma.clamp(min=1e-6) + 6 * turn_B.view(-1, 1, 1, 1)
    # Each channel is the value, less the chroma where the hue is far from its own.
    place = (sixth + torch.arange(5, 0, -2, device=x_BCHW.device).view(1, 3, 1, 1)).remainder(6)
    return (value - chroma * torch.minimum(place, 4 - place).clamp_(0, 1)).round_()


def blur(x_BCHW: Tensor, sigma_B: Tensor, radius: int) -> Tensor:
    """Gaussian of `sigma` pixels, cut off `radius` pixels from its centre; beyond the border the image is mirrored."""
    if radius == 0:
        return x_BCHW
    steps = torch.arange(radius + 1, device=x_BCHW.device)
    weight_RB = torch.exp(-0.5 * (steps[:, None] / sigma_B).square())
    weight_RB = (weight_RB / (2 * weight_RB.sum(0) - 1)).view(radius + 1, -1, 1, 1, 1)
    for axis in (3, 2):
        size, padded = x_BCHW.shape[axis], _mirrored(x_BCHW, axis, radius)
        x_BCHW = weight_RB[0] * x_BCHW
        # By shifting and not as a convolution: each image has a kernel of its own.
        for step in range(1, radius + 1):
            before, after = (padded.narrow(axis, radius + way * step, size) for way in (-1, 1))
            x_BCHW = torch.addcmul(x_BCHW, weight_RB[step], before + after)
    return x_BCHW.round_()


def _mirrored(x_BCHW: Tensor, axis: int, radius: int) -> Tensor:
    """With `radius` more pixels before and after, mirrored at the outermost ones, as often as it takes."""
    size = x_BCHW.shape[axis]
    if radius < size:  # what `pad` can do, which is faster
        return functional.pad(x_BCHW, (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius), mode="reflect")
    there_and_back = max(2 * (size - 1), 1)
    place = torch.arange(-radius, size + radius, device=x_BCHW.device).remainder(there_and_back)
    return x_BCHW.index_select(axis, torch.minimum(place, there_and_back - place))
