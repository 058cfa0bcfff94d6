"""8-bit rounding with gradients: straight through it for values, and for the ends of a range where those are learned.

T tensors.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from kdedge_export.table import LEVELS, U8, Span

__all__ = ["LearnedSpans", "round_between", "round_bias", "round_u8", "round_weight"]

_INT32_MAX = 2**31 - 512
_SMALLEST_SCALE = 1e-8


def round_u8(x: Tensor, u8: U8) -> Tensor:
    """`x` quantized and dequantized. The gradient is that of `x` inside the range, and 0 where it clips."""
    rounded: Tensor = _Round.apply(x, u8.scale, -u8.zero_point, LEVELS - u8.zero_point)
    return rounded


def round_weight(weight: Tensor, scales_K: Tensor) -> Tensor:
    """`weight` [K, ...] in the codes -127..127 of its channels; gradients as of `round_u8`."""
    scales = scales_K.view(-1, *[1] * (weight.ndim - 1))
    rounded: Tensor = _Round.apply(weight, scales, -127, 127)
    return rounded


class _Round(torch.autograd.Function):
    """round(x / scale) from `lowest` to `highest`, times scale.

    torch.fake_quantize_per_tensor_affine does the same, but takes three times as long on a CPU, and it multiplies by
    1 / scale, which puts values at the borders elsewhere than ONNX Runtime's division.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float | Tensor, lowest: int, highest: int) -> Tensor:
        codes = torch.div(x, scale).round_()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((codes >= lowest) & (codes <= highest))
        return codes.clamp_(lowest, highest).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


def round_bias(bias_K: Tensor, scales_K: Tensor, input_scale: float) -> tuple[Tensor, Tensor]:
    """The bias in whole numbers of input scale x weight scale, and the scales, coarser where 32 bits do not hold it.

    As `quantize_weight` does; nothing is clipped, so the gradient is that of the bias.
    """
    scales_K = torch.maximum(scales_K, bias_K.detach().abs() / (input_scale * _INT32_MAX))
    unit_K = input_scale * scales_K
    return _through(torch.round(bias_K / unit_K) * unit_K, bias_K), scales_K


def round_between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """As `round_u8` over the range from `low` to `high`, with gradients for both (scalars, low <= 0 <= high).

    LSQ (arXiv 1902.08153, eq. 3), written for the two ends of an asymmetric range: with s = (high - low) / 255 and
    x' = s (clamp(round(x / s) + z, 0, 255) - z), rounding passed straight through, d x' / d high is 1 above the range,
    0 below it, and (round(x / s) - x / s) / 255 inside; d x' / d low is 0, 1, and minus that.
    """
    rounded: Tensor = _RoundBetween.apply(x, low, high)
    return rounded


class _RoundBetween(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        scale = ((high - low) / LEVELS).clamp(min=_SMALLEST_SCALE)
        zero_point = torch.round(-low / scale)
        codes = torch.div(x, scale).round_().add_(zero_point)
        inside = (codes >= 0) & (codes <= LEVELS)
        rounded = codes.clamp_(0, LEVELS).sub_(zero_point).mul_(scale)
        ctx.save_for_backward(x, rounded, inside, scale)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, rounded, inside, scale = ctx.saved_tensors
        passed = gradients[0] * inside
        clipped = gradients[0] - passed
        by_rounding = (passed * (rounded - x)).sum() / (scale * LEVELS)
        above = (clipped * (x > rounded)).sum()
        return passed, clipped.sum() - above - by_rounding, above + by_rounding


def _through(value: Tensor, x: Tensor) -> Tensor:
    """`value`, with the gradient of `x`."""
    return x + (value - x).detach()


@final
class LearnedSpans(nn.Module):
    """The ends of ranges as parameters, each inside the limits of its tensor.

    They are kept in code widths (end / 255): of a range that starts at 0 that is LSQ's step size, so that its gradient
    scale, 1 / sqrt(values of an image x 255), gives them steps like those of the weights (section 2.2).
    """

    def __init__(self, spans: Mapping[str, Span], limits: Mapping[str, Span], same: Mapping[str, str]) -> None:
        """`limits`: what each end may not pass (infinite: nothing). `same`: tensor -> the tensor whose span it has."""
        super().__init__()
        self._same, self.names = dict(same), list(spans)
        ends_T2 = torch.tensor([spans[name] for name in self.names], dtype=torch.float32) / LEVELS
        self.lows_T, self.highs_T = (nn.Parameter(each.clone()) for each in ends_T2.unbind(1))
        self._limits = [limits[name] for name in self.names]  # no buffer: the loop's guard takes infinite ones for lost
        self._index = {name: place for place, name in enumerate(self.names)}

    def __contains__(self, name: str) -> bool:
        return self._same.get(name, name) in self._index

    def round(self, name: str, x: Tensor) -> Tensor:
        place = self._index[self._same.get(name, name)]
        share = (x[0].numel() * LEVELS) ** -0.5
        return round_between(x, *self._ends(place, share))

    def spans(self) -> dict[str, Span]:
        """As they are now, of the tensors that have another's span too."""
        found: dict[str, Span] = {}
        for name, place in self._index.items():
            low, high = self._ends(place)
            found[name] = (low.detach().item(), high.detach().item())
        return found | {name: found[source] for name, source in self._same.items()}

    def _ends(self, place: int, share: float = 1.0) -> tuple[Tensor, Tensor]:
        floor, ceiling = self._limits[place]
        low, high = (_slowly(ends_T[place], share) * LEVELS for ends_T in (self.lows_T, self.highs_T))
        return low.clamp(floor, 0.0), high.clamp(0.0, ceiling)


def _slowly(parameter: Tensor, share: float) -> Tensor:
    """The parameter, with `share` of its gradient."""
    return _through(parameter.detach(), parameter * share)
