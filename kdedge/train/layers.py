"""Layers that compute what torch's own do, where torch's kernels on a CPU are far from what its cores can.

Measured on MobileNetV2 at 32 px (torch 2.14, channels-last, AVX-512): a 1x1 convolution takes up to five times as long
as the matrix product that it is; the gradient of a depthwise kernel up to 400 times as long as its sums, where the map
is smaller than the kernel; and ReLU6 in place copies its input first. They are the same sums in another order, and
ReLU6 is the same to the bit, so a plan says which ones compute (`kdedge.train.engine.EnginePlan.layers`).

B images, C channels, O channels of the output, H and W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["alike", "own_layer", "replaced"]

Layer = TypeVar("Layer", bound=nn.Module)


@contextmanager
def replaced(networks: Sequence[nn.Module], make: Callable[[nn.Module], nn.Module | None]) -> Iterator[None]:
    """Inside the block `make(layer)` stands for every layer for which it is not None.

    What is made with `alike` holds the very same parameters and buffers under the same names: optimizer, averages and
    checkpoints do not notice.
    """
    changed = [
        (module, name, child, made)
        for network in networks
        for module in network.modules()
        for name, child in module.named_children()
        if (made := make(child)) is not None
    ]
    for module, name, _, made in changed:
        setattr(module, name, made)
    try:
        yield
    finally:
        for module, name, child, made in changed:
            setattr(module, name, child.train(made.training))


def alike(layer: nn.Module, kind: type[Layer], **more: object) -> Layer:
    """A layer of `kind`, a subclass of its class, with the parameters, buffers and settings of `layer`, not copied."""
    made = kind.__new__(kind)
    made.__dict__ |= layer.__dict__ | more
    return made


def own_layer(layer: nn.Module) -> nn.Module | None:
    """The layer of this module that computes the same, or None. What is derived from torch's layers stays as it is."""
    if type(layer) is nn.ReLU6 and layer.inplace:
        return alike(layer, _Relu6)
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    if layer.groups == 1 and (layer.kernel_size, layer.stride, layer.padding) == ((1, 1), (1, 1), (0, 0)):
        return alike(layer, _Pointwise)
    if layer.groups == layer.in_channels == layer.out_channels > 1 and layer.dilation == (1, 1):
        return alike(layer, _Depthwise)
    return None


@final
class _Pointwise(nn.Conv2d):
    """A 1x1 convolution as the product of [B H W, C] and [C, O]; in channels-last nothing is copied for it."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not x_BCHW.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x_BCHW)
        y_BHWO = functional.linear(x_BCHW.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return y_BHWO.permute(0, 3, 1, 2)


@final
class _Depthwise(nn.Conv2d):
    """A depthwise convolution; on maps smaller than its kernel the kernel's gradient is summed tap by tap."""

    padding: tuple[int, int]  # torch's class takes words too

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = (
            (side + 2 * pad - kernel) // stride + 1
            for side, pad, kernel, stride in zip(
                x_BCHW.shape[2:], self.padding, self.kernel_size, self.stride, strict=True
            )
        )
        fits = height >= self.kernel_size[0] and width >= self.kernel_size[1]
        if fits or not self.weight.requires_grad:
            return super().forward(x_BCHW)
        if x_BCHW.shape[2:] == (1, 1) == (height, width):  # of the kernel only this tap meets the pixel
            tap_C = self.weight[:, :, self.padding[0], self.padding[1]].to(x_BCHW.dtype)
            y_BCHW = x_BCHW * tap_C.view(1, -1, 1, 1)
            return y_BCHW if self.bias is None else y_BCHW + self.bias.to(x_BCHW.dtype).view(1, -1, 1, 1)
        y_BCHW = functional.conv2d(
            x_BCHW, self.weight.detach(), self.bias, self.stride, self.padding, groups=self.groups
        )
        summed: Tensor = _TapSums.apply(y_BCHW, x_BCHW.detach(), self.weight, self.stride, self.padding)
        return summed


@final
class _TapSums(torch.autograd.Function):
    """The output of a depthwise convolution as it is; backward, the gradient of its kernel: sum_B,H,W of x and g.

    Tap (i, j) of the kernel met x[y stride - padding + i, ...] where the output is [y, ...].
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        (g_BCHW,), (x_BCHW, weight) = gradients, ctx.saved_tensors
        rows, columns = (
            [_met(tap, x_BCHW.shape[axis], g_BCHW.shape[axis], stride, pad) for tap in range(weight.shape[axis])]
            for axis, stride, pad in zip((2, 3), ctx.stride, ctx.padding, strict=True)
        )
        dweight = torch.zeros_like(weight)
        for i, (x_rows, g_rows) in enumerate(rows):
            for j, (x_columns, g_columns) in enumerate(columns):
                products = x_BCHW[:, :, x_rows, x_columns] * g_BCHW[:, :, g_rows, g_columns]
                if products.numel():
                    dweight[:, 0, i, j] = products.sum((0, 2, 3), dtype=torch.promote_types(g_BCHW.dtype, weight.dtype))
        return g_BCHW, None, dweight, None, None


def _met(tap: int, side: int, out: int, stride: int, padding: int) -> tuple[slice, slice]:
    """Along one axis: the pixels of the input that tap `tap` meets, and the pixels of the output for which it does."""
    first = max(0, -((tap - padding) // stride))  # the least y with y stride - padding + tap >= 0
    last = min(out - 1, (side - 1 + padding - tap) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    start = first * stride - padding + tap
    return slice(start, start + (last - first) * stride + 1, stride), slice(first, last + 1)


@final
class _Relu6(nn.ReLU6):
    """ReLU6 in place that keeps its output for the backward pass, where torch's keeps a copy of its input."""

    def forward(self, input: Tensor) -> Tensor:
        if not input.requires_grad or not torch.is_grad_enabled() or input._is_view():
            return super().forward(input)
        clamped: Tensor = _Clamped.apply(input)
        return clamped


@final
class _Clamped(torch.autograd.Function):
    """min(max(x, 0), 6), written over x. Where it is 0 or 6, x was at or beyond it, so the gradient is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.clamp_(0, 6)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (clamped,) = ctx.saved_tensors
        descended: Tensor = torch.ops.aten.hardtanh_backward(gradients[0], clamped, 0, 6)
        return descended
