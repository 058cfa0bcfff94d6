"""The parts of a FixMatch step, each for itself: how long it takes, and of how many operations it is made.

B labeled images, U unlabeled images, K classes.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kdedge.data.batches import Batches
from kdedge.methods.fixmatch import FixMatch, logits_of
from kdedge.train.engine import EnginePlan, arranged, prepare, using
from kdedge_bench.engine_sides import state_of

__all__ = ["PARTS", "by_part", "wait_for"]

PARTS = ("views", "forward", "loss", "backward", "optimizer", "average")


def by_part(
    method: FixMatch, batches: Batches, plan: EnginePlan, device: torch.device, count: int
) -> tuple[dict[str, list[float]], float, dict[str, int]]:
    """Seconds of each part in `count` steps and one before them, of a step in a row, and each part's operations."""
    state = state_of(method, plan)
    times_s: dict[str, list[float]] = {part: [] for part in PARTS}
    operations: dict[str, int] = {}

    def timed(part: str, work: Callable[..., Any], *given: Any) -> Any:
        started_at_s = time.perf_counter()
        done = work(*given)
        wait_for(device)
        times_s[part].append(time.perf_counter() - started_at_s)
        return done

    def counted(part: str, work: Callable[..., Any], *given: Any) -> Any:
        with _Operations() as found:
            done = work(*given)
        operations[part] = found.count
        return done

    def step(number: int, do: Callable[..., Any]) -> None:
        batch = do("views", batches.at, number)
        batch = dataclasses.replace(batch, images=prepare(batch.images, plan))
        # The method's own forward pass is that of the network, and a loss on its logits.
        method.network.zero_grad(set_to_none=True)
        logits = do("forward", logits_of, method.network, batch)
        loss = do("loss", _loss, *logits, batch.labels_B)
        do("backward", loss.backward)
        do("optimizer", state.optimizer.step)
        do("average", state.ema.update, number)

    with using(plan, device), arranged([method], plan, batches):
        for number in range(count + 1):
            step(number, timed)
        started_at_s = time.perf_counter()
        for number in range(count):
            step(number, lambda _, work, *given: work(*given))
        wait_for(device)
        in_a_row_s = (time.perf_counter() - started_at_s) / count
        if (plan.compile, plan.compile_views) == ("none", "none"):
            step(0, counted)
    return times_s, in_a_row_s, operations


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what torch computes, views of the same memory left out. A list of tensors counts once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        answers = operation._schema.returns
        self.count += not any(each.alias_info is not None and not each.alias_info.is_write for each in answers)
        return operation(*given, **(named or {}))


def _loss(labeled_BK: Tensor, weak_UK: Tensor, strong_UK: Tensor, labels_B: Tensor) -> Tensor:
    """Eq. 3 and 4 of FixMatch (arXiv 2001.07685) at threshold 0.95."""
    best = weak_UK.detach().softmax(1).max(1)
    each_U = functional.cross_entropy(strong_UK, best.indices, reduction="none")
    return functional.cross_entropy(labeled_BK, labels_B) + (each_U * (best.values >= 0.95)).mean()
