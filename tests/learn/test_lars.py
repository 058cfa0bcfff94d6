"""LARS against the update written out with plain numbers, and the schedules."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from toys import toy_network

from kdedge.train.lars import Lars
from kdedge.train.optim import OptimConfig, learning_rate, make_optimizer

RATES = (0.5, 0.4, 0.1)
MOMENTUM, DECAY, TRUST = 0.9, 0.1, 0.001


def length(row: list[float]) -> float:
    return math.sqrt(sum(v * v for v in row))


def by_hand(weights: list[float], gradients: list[list[float]], adapt: bool) -> list[list[float]]:
    """google-research/simclr, lars_optimizer.py, with classic momentum: where the weights are after each step."""
    found, step = [], [0.0] * len(weights)
    for rate, gradient in zip(RATES, gradients, strict=True):
        ratio = 1.0
        if adapt:
            gradient = [g + DECAY * w for g, w in zip(gradient, weights, strict=True)]
            if length(weights) > 0 and length(gradient) > 0:
                ratio = TRUST * length(weights) / length(gradient)
        step = [MOMENTUM * s + rate * ratio * g for s, g in zip(step, gradient, strict=True)]
        weights = [w - s for w, s in zip(weights, step, strict=True)]
        found.append(weights)
    return found


@pytest.mark.parametrize("start", [[1.0, -2.0, 0.5, 3.0], [0.0, 0.0, 0.0, 0.0]])
@pytest.mark.parametrize("adapt", [True, False])
def test_lars_is_the_update_written_out(start, adapt) -> None:
    gradients = [[0.3, 0.1, -0.2, 0.4], [0.0, 0.0, 0.0, 0.0], [-1.0, 2.0, 0.5, 0.0]]
    kernel = nn.Parameter(torch.tensor(start, dtype=torch.float64).view(2, 2))
    other = nn.Parameter(torch.ones(3, dtype=torch.float64))  # its norms are its own
    decay = DECAY if adapt else 0.0
    optimizer = Lars([{"params": [kernel, other], "weight_decay": decay, "adapt": adapt}], lr=1.0, momentum=MOMENTUM)
    for rate, gradient, expected in zip(RATES, gradients, by_hand(start, gradients, adapt), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        kernel.grad = torch.tensor(gradient, dtype=torch.float64).view(2, 2)
        other.grad = torch.full((3,), 5.0, dtype=torch.float64)
        optimizer.step()
        assert kernel.detach().flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert other.detach().tolist() != [1.0] * 3


def test_the_length_of_a_step_follows_the_weights_and_not_the_gradient() -> None:
    lengths = []
    for scale in (1.0, 1000.0):
        kernel = nn.Parameter(torch.full((3, 3), 2.0))
        kernel.grad = torch.eye(3) * scale
        Lars([{"params": [kernel]}], lr=1.0).step()
        lengths.append(float((kernel.detach() - 2).norm()))
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)
    assert lengths[0] == pytest.approx(TRUST * 6.0, rel=1e-4)


def test_biases_and_batch_norms_are_neither_adapted_nor_decayed() -> None:
    network = toy_network()
    adapted, plain = make_optimizer(network, 1.0, 0.9, 0.1, "lars").param_groups
    assert (adapted["adapt"], adapted["weight_decay"]) == (True, 0.1)
    assert (plain["adapt"], plain["weight_decay"]) == (False, 0.0)
    assert {p.ndim for p in adapted["params"]} == {2, 4}
    assert {p.ndim for p in plain["params"]} == {1}
    assert sum(len(group["params"]) for group in (adapted, plain)) == len(list(network.parameters()))


def test_what_has_no_gradient_is_left_alone() -> None:
    kernels = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    kernels[0].grad = torch.ones(2, 2)
    Lars([{"params": kernels}], lr=1.0, weight_decay=0.1).step()
    assert torch.equal(kernels[1], torch.ones(2, 2))
    assert not torch.equal(kernels[0], torch.ones(2, 2))


def test_cosine_climbs_over_the_warm_up_and_ends_at_zero() -> None:
    rates = [learning_rate(step, 100, 2.0, 9, "cosine") for step in range(100)]
    assert rates[:9] == pytest.approx([0.2 * k for k in range(1, 10)])
    assert rates[9] == 2.0 == max(rates)
    assert rates[9 + 45] == pytest.approx(1.01726, abs=1e-3)  # just before the middle of the 91 that are left
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert learning_rate(100, 100, 2.0, 9, "cosine") == pytest.approx(0, abs=1e-12)
    assert learning_rate(0, 100, 2.0, 0, "cosine") == 2.0
    assert all(math.isfinite(learning_rate(step, 5, 1.0, 9, "cosine")) for step in range(5))  # all of it warm-up


def test_optimizer_and_schedule_may_be_left_open_and_old_settings_still_load() -> None:
    old = OptimConfig.model_validate({"learning_rate": 0.1})
    assert old.optimizer is None
    assert old.schedule is None
    assert OptimConfig(optimizer="lars", schedule="cosine").schedule == "cosine"
    with pytest.raises(ValueError, match="sgd"):
        OptimConfig.model_validate({"optimizer": "adam"})
