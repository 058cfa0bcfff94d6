"""Exponential moving average of a network's weights, which is what is evaluated and exported."""

import copy
from typing import final

import torch
from torch import Tensor, nn

from kdedge.models.zoo import Network

__all__ = ["Ema", "ema_decay"]

_Lists = tuple[list[Tensor], list[Tensor]]


def ema_decay(step: int, ceiling: float) -> float:
    """min(ceiling, (1 + k) / (10 + k)): short runs forget their random start as fast as long ones."""
    return min(ceiling, (1 + step) / (10 + step))


@final
class Ema:
    """A frozen copy whose floating-point weights and statistics trail those of the network it was made from."""

    def __init__(self, network: Network, ceiling: float) -> None:
        self.network: Network = copy.deepcopy(network).eval().requires_grad_(False)
        self.ceiling = ceiling
        self._pairs = _pairs(self.network, network)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average += (1 - decay) * (weights - average); integer counters are copied."""
        (averages, weights), (mine, theirs) = self._pairs
        torch._foreach_lerp_(averages, weights, 1.0 - ema_decay(step, self.ceiling))
        if mine:  # one a batch norm: copied one by one they were most of this update's kernels
            torch._foreach_copy_(mine, theirs)


def _pairs(average: nn.Module, network: nn.Module) -> tuple[_Lists, _Lists]:
    """Of the average and of the network: what trails, and what is copied."""
    mine, theirs = average.state_dict(keep_vars=True), network.state_dict(keep_vars=True)
    floats = [name for name, tensor in mine.items() if tensor.is_floating_point()]
    counters = [name for name in mine if not mine[name].is_floating_point()]
    return (
        ([mine[n].data for n in floats], [theirs[n].data for n in floats]),
        ([mine[n] for n in counters], [theirs[n] for n in counters]),
    )
