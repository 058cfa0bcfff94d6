"""LARS: SGD whose step is as long as the weights it changes, layer by layer.

You, Gitman, Ginsburg, arXiv 1708.03888, in the form of google-research/simclr (lars_optimizer.py): the momentum is of
steps and not of gradients, so that a learning rate that falls does not scale what was stepped already.
"""

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor

__all__ = ["Lars"]


@final
class Lars(torch.optim.Optimizer):
    """step = momentum * step + lr * trust * (gradient + weight_decay * weights);  weights -= step.

    The trust in groups with `adapt` is `trust` |weights| / |gradient + weight_decay * weights|, layer by layer; it is 1
    where either norm is 0, and in groups without: biases and batch norms. Nothing here waits for the device.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        adapt: bool = True,
    ) -> None:
        """`params` are groups, which may have a `weight_decay` and an `adapt` of their own."""
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": adapt}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step. The gradients are used up: they hold the step afterwards. There is no `closure`."""
        for group in self.param_groups:
            weights = [each for each in group["params"] if each.grad is not None]
            if not weights:
                continue
            gradients = [each.grad for each in weights]
            if group["weight_decay"]:
                torch._foreach_add_(gradients, weights, alpha=group["weight_decay"])
            if group["adapt"]:
                torch._foreach_mul_(gradients, _trust(weights, gradients, group["trust"]))
            steps = [self._step(each) for each in weights]
            torch._foreach_mul_(steps, group["momentum"])
            torch._foreach_add_(steps, gradients, alpha=group["lr"])
            torch._foreach_sub_(weights, steps)

    def _step(self, weight: Tensor) -> Tensor:
        """What `weight` was last moved by; under torch's usual name, so that checkpoints keep it like SGD's."""
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        step: Tensor = state["momentum_buffer"]
        return step


def _trust(weights: list[Tensor], gradients: list[Tensor], trust: float) -> list[Tensor]:
    """One number for each layer."""
    of_weights, of_gradients = (torch.stack(torch._foreach_norm(each)) for each in (weights, gradients))
    ratio = torch.where((of_weights > 0) & (of_gradients > 0), trust * of_weights / of_gradients, 1.0)
    return list(ratio.unbind())
