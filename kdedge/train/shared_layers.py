"""Layers that look beyond one image, for a batch that several processes share.

Batch norm needs the statistics of the whole batch, dropout the draws. torch's SyncBatchNorm runs on GPUs only; this one
runs wherever an all-reduce does.

M rows of this process, C channels, H and W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from kdedge.errors import RunError
from kdedge.train.layers import alike, replaced

__all__ = ["Shared", "SharedBatchNorm2d", "shared_layers"]

_AXES = (0, 2, 3)


@dataclass(frozen=True)
class Shared:
    """This process's rows of a batch of `count`, and the sum of a tensor over all processes."""

    rows: slice
    count: int
    total: Callable[[Tensor], Tensor]


@contextmanager
def shared_layers(networks: Sequence[nn.Module], shared: Shared) -> Iterator[None]:
    """Replace batch norms and dropouts by shared ones inside the block.

    The replacements hold the very same parameters and buffers under the same names: optimizer, averages and
    checkpoints do not notice. RunError where a layer normalises by the batch in a way that is not known here.
    """
    with replaced(networks, lambda layer: _shared(layer, shared)):
        yield


def _shared(layer: nn.Module, shared: Shared) -> nn.Module | None:
    """The layer for a shared batch, or None where it may stay as it is."""
    if isinstance(layer, nn.Dropout | StochasticDepth) and layer.p > 0:
        return _SharedDropout(layer.p, shared, isinstance(layer, StochasticDepth)).train(layer.training)
    if isinstance(layer, nn.BatchNorm2d):
        return alike(layer, SharedBatchNorm2d, shared=shared)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        raise RunError(
            f"The network has a layer {type(layer).__name__}, whose statistics several processes cannot share. "
            "Train it in one process, or choose another architecture."
        )
    return None


@final
class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the rows of all processes, exact for uneven shares; in eval mode as it always is."""

    shared: Shared

    def forward(self, x_MCHW: Tensor) -> Tensor:
        if not self.training:
            return self._after(super().forward(x_MCHW))
        normalized: Tensor = _Normalize.apply(x_MCHW, self.weight, self.bias, self)
        return self._after(normalized)

    def _after(self, x_MCHW: Tensor) -> Tensor:
        """timm's batch norms hold the activation that follows."""
        for name in ("drop", "act"):
            if name in self._modules:
                x_MCHW = self.get_submodule(name)(x_MCHW)
        return x_MCHW

    @torch.no_grad()
    def follow(self, mean_C: Tensor, variance_C: Tensor, count: Tensor) -> None:
        """Move the running statistics; that of the variance is unbiased, over the whole batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean), share)
        self.running_var.lerp_((variance_C * (count / (count - 1))).to(self.running_var), share)


@final
class _Normalize(torch.autograd.Function):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias with mean and variance over the rows of all processes.

    With n pixels in all and g the gradient of y, dx = weight / std (g - mean g - normalised x mean(g normalised x)):
    both means are over all rows too, which takes one all-reduce each way. Images are worked on by torch's own kernels
    of eval mode, given these statistics; sums are in float64, where the mean's square may be taken off safely.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, layer: SharedBatchNorm2d) -> Tensor:
        own = x.numel() // x.shape[1]
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        variance_C, mean_C = (s.double() for s in torch.var_mean(exact, _AXES, correction=0))
        sums = torch.cat([mean_C * own, (variance_C + mean_C.square()) * own, mean_C.new_full((1,), own)])
        sums = layer.shared.total(sums)
        count, channels = sums[-1], x.shape[1]
        mean_C = sums[:channels] / count
        variance_C = (sums[channels:-1] / count - mean_C.square()).clamp(min=0)
        layer.follow(mean_C, variance_C, count)
        mean, variance = mean_C.to(exact.dtype), variance_C.to(exact.dtype)
        ctx.layer = layer
        ctx.save_for_backward(x, weight, mean, variance, count)
        normalized: Tensor = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, layer.eps)[0]
        return normalized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, variance, count = ctx.saved_tensors
        (gradient,) = gradients
        eps = ctx.layer.eps
        # As if the statistics were constants; its gradients of weight and bias are the two sums that are needed.
        ones = torch.ones_like(mean) if weight is None else weight
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, ones, mean, variance, None, None, False, eps, [True, True, True]
        )
        total = ctx.layer.shared.total(torch.cat([dweight, dbias]).double()) / count
        dot_C, sum_C = (part.to(mean.dtype) for part in total.chunk(2))
        invstd_C = (variance + eps).rsqrt()
        slope_C = ones * invstd_C * invstd_C * dot_C
        shift_C = ones * invstd_C * sum_C - slope_C * mean
        dx = dx - (x * _column(slope_C, x) + _column(shift_C, x))
        return dx, *((None, None) if weight is None else (dweight, dbias)), None


def _column(values_C: Tensor, x: Tensor) -> Tensor:
    return values_C.view(1, -1, 1, 1).to(x.dtype)


@final
class _SharedDropout(nn.Module):
    """Dropout, or whole branches dropped for an image, drawn for the whole batch: an image's draw is its own."""

    def __init__(self, p: float, shared: Shared, by_image: bool) -> None:
        super().__init__()
        self.p, self.shared, self.by_image = p, shared, by_image

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = [1] * (x.ndim - 1) if self.by_image else list(x.shape[1:])
        noise = torch.empty(self.shared.count, *shape, dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        return x * noise[self.shared.rows].div_(1 - self.p)
