"""At which rate a rounded network can be trained: found by a few steps, since too high a one destroys its start.

With its batch normalisation folded, a network no longer bears whatever rate its student was trained at: that depends on
how far its activations lie apart and how sure it is of its answers.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from kdedge.data.batches import Batches
from kdedge.methods.step import Method
from kdedge.runs import read_json, write_json
from kdedge.train.optim import OptimConfig, make_optimizer

__all__ = ["kept", "sound_rate"]

SHARES = (1.0, 0.1, 0.01)  # of the rate that is asked for
STEPS = 10
UNSEEN = 4  # batches


def sound_rate(make: Callable[[float], Method], batches: Batches, optim: OptimConfig) -> float:
    """The first of SHARES of the peak rate at which STEPS steps lower the loss on UNSEEN other batches of the pool.

    The last of them where none does: what it trains is compared with what there was before, and not kept. `make` gives
    a fresh method for a rate.
    """
    peak = optim.learning_rate or 0.0
    steps = min(STEPS, optim.total_steps or STEPS)
    for share in SHARES[:-1]:
        if _improves(make(share * peak), share * peak, optim.momentum or 0.0, batches, steps):
            return share * peak
    return SHARES[-1] * peak


def _improves(method: Method, rate: float, momentum: float, batches: Batches, steps: int) -> bool:
    method.train()
    optimizer = make_optimizer(method, rate, momentum, 0.0)
    before = _loss(method, batches, steps)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        method.forward(batches.at(step)).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _loss(method, batches, steps) <= before  # False for a loss that is not finite


def _loss(method: Method, batches: Batches, first: int) -> float:
    with torch.no_grad():
        return sum(float(method.forward(batches.at(step)).loss) for step in range(first, first + UNSEEN))


def kept(path: Path, find: Callable[[], float]) -> float:
    """What `find` gives, found once: training that goes on must not try again and decide otherwise."""
    if not path.exists():
        write_json(path, {"learning_rate": find()})
    return float(read_json(path)["learning_rate"])
