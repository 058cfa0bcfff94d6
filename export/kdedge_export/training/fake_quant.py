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
_MEMORY = 0.9  # of the running size of gradients: some ten steps
_NO_GRADIENT = 1e-20


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


class _Steady(torch.autograd.Function):
    """`x`, its gradient divided by the running size of its largest element and multiplied by `step`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean_square: Tensor, seen: Tensor, step: float) -> Tensor:
        ctx.state, ctx.step = (mean_square, seen), step  # not saved for the backward pass: that pass moves them on
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        mean_square, seen = ctx.state
        mean_square.mul_(_MEMORY).add_(gradients[0].abs().max() ** 2, alpha=1 - _MEMORY)
        seen += 1
        size = (mean_square / (1 - _MEMORY**seen)).sqrt() + _NO_GRADIENT
        return gradients[0] / size * ctx.step, None, None, None


@final
class LearnedSpans(nn.Module):
    """The ends of ranges as parameters, each inside the limits of its tensor.

    They are kept in widths of the range they start with, and their gradients are divided by the running size of the
    largest of them: the end that matters most takes a whole step, the others their share of it. LSQ's gradient scale
    (section 2.2) leaves the size of a step to the loss; a student with large logits lost all its ranges at a rate that
    others learn too little with. To divide each end's gradient by its own size, as Adam does it, turns the noise of the
    many ends that do not matter into whole steps: the divergence of an EfficientNet-B0 rose fivefold in 20 of them.

    This is careful rather than quick: it refines ranges, and does not repair calibration. Where three of a student's
    ranges were a third of what they should be, a hundred steps took the divergence from 0.70 to 0.46, with sound ones
    it is 0.05.
    """

    def __init__(
        self, spans: Mapping[str, Span], limits: Mapping[str, Span], same: Mapping[str, str], step: float
    ) -> None:
        """`limits`: what each end may not pass (infinite: nothing). `same`: tensor -> the tensor whose span it has.

        `step`: how many widths the end with the largest gradient moves at a learning rate of 1.
        """
        super().__init__()
        self._same, self._step, self.names = dict(same), step, list(spans)
        ends_2T = torch.tensor([spans[name] for name in self.names], dtype=torch.float32).T
        self.register_buffer("widths_T", (ends_2T[1] - ends_2T[0]).clamp(min=_SMALLEST_SCALE), persistent=False)
        self.ends_2T = nn.Parameter(ends_2T / self.get_buffer("widths_T"))
        self.register_buffer("mean_square", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))
        self._limits = [limits[name] for name in self.names]  # no buffer: the loop's guard takes infinite ones for lost
        self._index = {name: place for place, name in enumerate(self.names)}

    def __contains__(self, name: str) -> bool:
        return self._same.get(name, name) in self._index

    def ends(self) -> Tensor:
        """[2, T] as they are now, for one pass: their gradients meet here, to be compared and divided once."""
        state = self.get_buffer("mean_square"), self.get_buffer("seen")
        steady: Tensor = _Steady.apply(self.ends_2T, *state, self._step)
        return steady * self.get_buffer("widths_T")

    def round(self, name: str, x: Tensor, ends_2T: Tensor) -> Tensor:
        return round_between(x, *self._limited(self._index[self._same.get(name, name)], ends_2T))

    def spans(self) -> dict[str, Span]:
        """As they are now, of the tensors that have another's span too."""
        with torch.no_grad():
            ends_2T = self.ends()
            limited = {name: self._limited(place, ends_2T) for name, place in self._index.items()}
        found = {name: (low.item(), high.item()) for name, (low, high) in limited.items()}
        return found | {name: found[source] for name, source in self._same.items()}

    def _limited(self, place: int, ends_2T: Tensor) -> tuple[Tensor, Tensor]:
        floor, ceiling = self._limits[place]
        return ends_2T[0, place].clamp(floor, 0.0), ends_2T[1, place].clamp(0.0, ceiling)
