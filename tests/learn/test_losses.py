"""Losses against slow versions written from the formulas, and the invariants of the papers."""

import math

import pytest
import torch
from torch import Tensor

from kdedge.losses.consistency import masked_cross_entropy, merge_targets
from kdedge.losses.kd import kd
from kdedge.losses.robust import masked_symmetric_cross_entropy, reverse_cross_entropy


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


def probs_of(row: Tensor) -> list[float]:
    exps = [math.exp(v) for v in row.tolist()]
    return [e / sum(exps) for e in exps]


def test_masked_cross_entropy_divides_by_all_images(logits) -> None:
    target = torch.arange(12) % 5
    mask = (torch.arange(12) % 3 > 0).double()
    slow = 0.0
    for row, k, weight in zip(logits, target.tolist(), mask.tolist(), strict=True):
        slow -= weight * math.log(probs_of(row)[k])
    assert float(masked_cross_entropy(logits, target, mask)) == pytest.approx(slow / 12, rel=1e-12)


def test_half_the_mask_is_half_the_loss(logits) -> None:
    twice = torch.cat([logits, logits])
    target = torch.zeros(24, dtype=torch.long)
    half = torch.cat([torch.ones(12), torch.zeros(12)]).double()
    whole = torch.ones(24).double()
    ratio = masked_cross_entropy(twice, target, half) / masked_cross_entropy(twice, target, whole)
    assert float(ratio) == pytest.approx(0.5, rel=1e-12)


def test_heuristic_1_prefers_the_confident_own_label() -> None:
    own_label = torch.tensor([0, 0, 0, 0])
    own_mask = torch.tensor([1.0, 1.0, 0.0, 0.0])
    trusted = torch.tensor([3, -1, 3, -1])
    target, weight = merge_targets(own_label, own_mask, trusted)
    assert target.tolist() == [0, 0, 3, 0]
    assert weight.tolist() == [1, 1, 1, 0]
    target, weight = merge_targets(own_label, own_mask, trusted, outer_first=True)
    assert target.tolist() == [3, 0, 3, 0]
    assert weight.tolist() == [1, 1, 1, 0]


def test_without_trusted_labels_merging_changes_nothing() -> None:
    label, mask = torch.tensor([1, 2, 3]), torch.tensor([1.0, 0.0, 1.0])
    for outer_first in (False, True):
        target, weight = merge_targets(label, mask, torch.full((3,), -1), outer_first=outer_first)
        assert torch.equal(weight, mask)
        assert torch.equal(target, label)


def test_reverse_cross_entropy_is_the_sum_written_out(logits) -> None:
    target = torch.arange(12) % 5
    for row, k, ours in zip(logits, target.tolist(), reverse_cross_entropy(logits, target).tolist(), strict=True):
        probs = probs_of(row)
        slow = -sum(p * math.log(1.0 if j == k else 1e-4) for j, p in enumerate(probs))
        assert ours == pytest.approx(slow, abs=1e-5)
        assert ours == pytest.approx(-math.log(1e-4) * (1 - probs[k]), abs=1e-5)


def test_symmetric_cross_entropy_with_beta_0_is_cross_entropy(logits) -> None:
    target, mask = torch.arange(12) % 5, (torch.arange(12) % 2).double()
    ours = masked_symmetric_cross_entropy(logits, target, mask, alpha=1.0, beta=0.0)
    assert float(ours) == pytest.approx(float(masked_cross_entropy(logits, target, mask)), rel=1e-12)
    both = masked_symmetric_cross_entropy(logits, target, mask, alpha=0.1, beta=1.0)
    parts = 0.1 * masked_cross_entropy(logits, target, mask) + (reverse_cross_entropy(logits, target) * mask).mean()
    assert float(both) == pytest.approx(float(parts), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_the_divergence_written_out(logits, temperature) -> None:
    teacher = logits.flip(0)
    slow = 0.0
    for s, t in zip(logits / temperature, teacher / temperature, strict=True):
        p, q = probs_of(t), probs_of(s)
        slow += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(kd(logits, teacher, temperature)) == pytest.approx(temperature**2 * slow / 12, rel=1e-10)


def test_kd_is_zero_with_its_gradient_where_both_agree(logits) -> None:
    student = (logits + 3.0).requires_grad_()  # a constant added to all logits changes nothing
    loss = kd(student, logits, 4.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert float(student.grad.abs().max()) < 1e-12


def test_kd_keeps_the_size_of_its_gradient_when_the_temperature_changes() -> None:
    small = torch.randn(64, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.05
    sizes = []
    for temperature in (4.0, 8.0):
        student = small.clone().requires_grad_()
        kd(student, small.flip(0), temperature).backward()
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
