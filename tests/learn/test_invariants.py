"""The fourteen invariants of the papers, one test each, in the order of the reference; and the sign of fairness.

Each is short and on public functions; what else a room promises is tested beside it.
"""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from toys import VIEWS, toy_network, toy_pool

from kdedge.data.batches import Batch, Batches
from kdedge.losses.consistency import fairness, masked_cross_entropy, merge_targets
from kdedge.losses.contrastive import nt_xent
from kdedge.losses.dist import dist
from kdedge.losses.dkd import dkd, non_target_kd, target_kd
from kdedge.losses.kd import kd
from kdedge.losses.robust import masked_symmetric_cross_entropy, reverse_cross_entropy
from kdedge.methods.distill import DistillConfig
from kdedge.methods.fixmatch import FixMatch, FixMatchConfig
from kdedge.methods.kd_fixmatch import KDFixMatch, KDFixMatchConfig, TrustedTargets
from kdedge.methods.teacher import LiveTeacher
from kdedge.methods.thresholds import ThresholdConfig, make_policy
from kdedge.train.optim import learning_rate
from kdedge.trust.dec import kl_loss, map_clusters, soft_assignment, target_distribution
from kdedge.trust.select import TrustConfig, select_trusted
from kdedge_export.table import U8


@pytest.fixture
def batch() -> Batch:
    return Batches(toy_pool(), VIEWS, labeled_batch=6, unlabeled_batch=30, seed=0, stage="t").at(0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner(label_N: Tensor, threshold: float) -> KDFixMatch:
    config = KDFixMatchConfig(
        thresholds=ThresholdConfig(threshold=threshold), robust_loss="ce", distill=DistillConfig(loss="none")
    )
    policy = make_policy(config.thresholds, 3, 60)
    return KDFixMatch(toy_network(), config, policy, TrustedTargets(label_N, torch.ones(60)), None).train()


def test_1_nothing_trusted_is_fixmatch_and_all_trusted_is_pseudo_labeling(batch) -> None:
    config = FixMatchConfig(thresholds=ThresholdConfig(threshold=0.4))
    fixmatch = FixMatch(toy_network(), config, make_policy(config.thresholds, 3, 60)).train()
    assert torch.equal(inner(torch.full((60,), -1), 0.4)(batch).loss, fixmatch(batch).loss)
    told = torch.arange(60) % 3
    method = inner(told, threshold=1.01)
    labeled, _, strong = method.network(batch.images).split([6, 30, 30])
    expected = functional.cross_entropy(labeled, batch.labels_B)
    expected = expected + functional.cross_entropy(strong, told[batch.position_U])
    assert torch.allclose(inner(told, threshold=1.01)(batch).loss, expected)


def test_2_own_confidence_wins_over_the_trusted_label() -> None:
    own, sure, trusted = torch.tensor([0, 0, 0]), torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1, 1, -1])
    target, weight = merge_targets(own, sure, trusted)
    assert (target[0], target[1]) == (0, 1)
    assert weight.tolist() == [1, 1, 0]


def test_3_half_the_mask_is_half_the_loss() -> None:
    logits, target = normal(8, 3).repeat(2, 1), torch.arange(8).repeat(2) % 3
    half = torch.cat([torch.ones(8), torch.zeros(8)]).double()
    whole = masked_cross_entropy(logits, target, torch.ones(16).double())
    assert torch.allclose(masked_cross_entropy(logits, target, half), whole / 2)


def test_4_the_learning_rate_ends_at_a_fifth() -> None:
    assert learning_rate(2**20, 2**20, 0.03, 0) == pytest.approx(0.03 * math.cos(7 * math.pi / 16), rel=1e-12)
    assert learning_rate(2**20, 2**20, 0.03, 0) == pytest.approx(0.00585, abs=5e-6)


def test_5_no_gradient_through_the_targets_nor_into_the_outer_network(batch) -> None:
    method = inner(torch.full((60,), -1), 0.0)  # every image has its own label
    unlabeled_only = method.forward(batch).loss
    weights = list(method.network.parameters())
    found = torch.autograd.grad(unlabeled_only, weights)
    again = inner(torch.full((60,), -1), 0.0)
    labeled, weak, strong = again.network(batch.images).split([6, 30, 30])
    fixed = weak.detach().argmax(1)  # targets that are numbers, and no function of the weights
    by_hand = functional.cross_entropy(labeled, batch.labels_B) + functional.cross_entropy(strong, fixed)
    expected = torch.autograd.grad(by_hand, list(again.network.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    pool = toy_pool()
    outer = toy_network(1)
    teacher = LiveTeacher(outer, mean=pool.mean, std=pool.std, own_mean=pool.mean, own_std=pool.std, own_px=8)
    config = KDFixMatchConfig(distill=DistillConfig(views="same"))
    policy = make_policy(config.thresholds, 3, 60)
    nothing = TrustedTargets(torch.full((60,), -1), torch.ones(60))
    KDFixMatch(toy_network(), config, policy, nothing, teacher).train()(batch).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in outer.parameters())
    assert not outer.training


def test_6_clustering_keeps_distributions_and_falls() -> None:
    truth = torch.arange(4).repeat_interleave(30)
    features = functional.one_hot(truth, 4).double() * 3 + normal(120, 4) * 0.3
    centroids = (functional.one_hot(torch.arange(4), 4).double() * 2).requires_grad_(True)
    losses = []
    for _ in range(5):
        p = target_distribution(soft_assignment(features, centroids.detach()))
        assert torch.allclose(p.sum(1), torch.ones(120).double())
        assert torch.allclose(soft_assignment(features, centroids).sum(1), torch.ones(120).double())
        loss = kl_loss(p, soft_assignment(features, centroids))
        (step,) = torch.autograd.grad(loss, centroids)
        losses.append(loss.item())
        centroids = (centroids - step).detach().requires_grad_(True)
    assert losses == sorted(losses, reverse=True)
    one_hot = functional.one_hot(truth, 4).double()
    assert torch.equal(target_distribution(one_hot), one_hot)
    mapping = map_clusters((truth + 1) % 4, truth, torch.ones(120), 4, 4)
    assert sorted(mapping.tolist()) == [0, 1, 2, 3]
    assert mapping.tolist() == [3, 0, 1, 2]


def test_7_symmetric_cross_entropy() -> None:
    logits, target, ones = normal(9, 5), torch.arange(9) % 5, torch.ones(9).double()
    plain = functional.cross_entropy(logits, target)
    assert torch.allclose(masked_symmetric_cross_entropy(logits, target, ones, 1.0, 0.0), plain)
    likely = torch.softmax(logits, 1).gather(1, target[:, None]).squeeze(1)
    assert torch.allclose(reverse_cross_entropy(logits, target), -math.log(1e-4) * (1 - likely), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_8_nt_xent(temperature) -> None:
    same = torch.ones(6, 4).double()
    assert nt_xent(same, same, temperature).item() == pytest.approx(math.log(11), rel=1e-6)
    first, second = normal(6, 4), normal(6, 4, seed=1)
    loss = nt_xent(first, second, temperature)
    assert torch.allclose(loss, nt_xent(second, first, temperature))
    # Written out: for each of the 12 views, minus the log of its partner's share among the 11 others.
    views = [v / v.norm() for v in (*first, *second)]
    slow = 0.0
    for i, view in enumerate(views):
        shares = {k: math.exp(float(view @ other) / temperature) for k, other in enumerate(views) if k != i}
        slow -= math.log(shares[(i + 6) % 12] / sum(shares.values())) / 12
    assert loss.item() == pytest.approx(slow, rel=1e-5)


def test_9_kd() -> None:
    teacher = normal(7, 5)
    student = teacher.clone().requires_grad_(True)
    loss = kd(student, teacher, 4.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12
    other = normal(7, 5, seed=1)
    assert torch.allclose(kd(other + 3.0, teacher - 2.0, 4.0), kd(other, teacher, 4.0))
    # T^2 keeps the size: for small logits the loss does not depend on T.
    small, smaller = 1e-3 * other, 1e-3 * teacher
    assert kd(small, smaller, 8.0).item() == pytest.approx(kd(small, smaller, 2.0).item(), rel=1e-2)


def test_10_dkd_is_kd_taken_apart() -> None:
    student, teacher, target = normal(7, 5), normal(7, 5, seed=1), torch.arange(7) % 5
    rest = 1 - torch.softmax(teacher, 1).gather(1, target[:, None]).squeeze(1)
    apart = target_kd(student, teacher, target) + rest * non_target_kd(student, teacher, target)
    whole = torch.stack([kd(s[None], t[None], 1.0) for s, t in zip(student, teacher, strict=True)])
    assert torch.allclose(apart, whole)
    for i in range(7):
        one = slice(i, i + 1)
        found = dkd(student[one], teacher[one], target[one], 1.0, 1.0, float(rest[i]))
        assert torch.allclose(found, whole[i])


def test_11_dist_forgives_scale_and_shift() -> None:
    teacher = normal(6, 5)
    probs = torch.softmax(teacher, 1)
    student = torch.log(0.5 * probs + 0.5 / 5)  # a positive affine map of rows and of columns, still a distribution
    assert dist(student, teacher, 1.0, 1.0, 1.0).item() == pytest.approx(0, abs=1e-7)
    assert dist(normal(6, 5, seed=1), teacher, 1.0, 1.0, 1.0) > 0.1


def test_12_flexmatch_equal_classes_have_the_fixed_threshold() -> None:
    policy = make_policy(ThresholdConfig(policy="flexmatch"), 2, 4).train()
    sure = torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0], [0.0, 9.0]])
    policy(sure, sure, torch.arange(4))  # every image used, both classes twice: M(1) = 1
    edge = math.log(0.95 / 0.05)
    asked = torch.tensor([[edge + 0.01, 0.0], [edge - 0.01, 0.0], [0.0, edge + 0.01], [0.0, edge - 0.01]])
    policy.eval()
    assert policy(sure, asked, torch.arange(4)).weight_U.tolist() == [1, 0, 1, 0]
    fresh = make_policy(ThresholdConfig(policy="flexmatch"), 2, 4).eval()
    unsure = torch.tensor([[0.1, 0.0], [0.0, 0.1]])  # nothing learned: M(0) = 0, every label passes
    assert fresh(sure, unsure, torch.arange(2)).weight_U.tolist() == [1, 1]


def test_13_clusters_make_a_confident_set_no_less_precise() -> None:
    truth = torch.arange(4).repeat_interleave(50)
    features = (functional.one_hot(truth, 4).double() + 0.1 * normal(200, 4)).float()
    wrong = torch.rand(200, generator=torch.Generator().manual_seed(2)) < 0.15
    said = torch.where(wrong, (truth + 1) % 4, truth)
    label = torch.where(torch.arange(200) % 10 == 0, truth, -1)
    logits = functional.one_hot(said, 4).float() * 8
    trusted = select_trusted(logits, features.numpy(), np.arange(200), label, TrustConfig(), seed=0)
    summary = trusted.summary(truth.numpy(), 4)
    assert summary["precision"] >= summary["precision_after_confidence"]
    assert summary["precision"] == 1.0 > summary["precision_after_confidence"]


@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.7), (0.0, 6.0), (-4.0, 0.0), (0.5, 2.0)])
def test_14_zero_is_exact_and_rounding_is_half_a_step(low, high) -> None:
    found = U8.over((low, high))
    assert found.apply(np.zeros(1))[0] == 0.0
    inside = np.linspace(found.low, found.high, 1001)
    assert np.abs(found.apply(inside) - inside).max() <= found.scale / 2 * (1 + 1e-6)


def test_fairness_is_a_negative_cross_entropy_to_be_descended() -> None:
    """The value is sum P log Q, below zero (test_thresholds.py descends it, and predictions even out)."""
    mean, share = torch.tensor([0.45, 0.3, 0.25]), torch.tensor([0.7, 0.2, 0.1])
    logits = torch.tensor([[2.0, 0.5, 0.1], [1.5, 0.2, 0.3], [0.2, 0.9, 0.4], [0.1, 0.0, 0.8]])
    probs = torch.softmax(logits, 1)
    p, q = mean / share, probs.mean(0) / torch.tensor([0.5, 0.25, 0.25])
    expected = sum(float(a / p.sum()) * math.log(float(b / q.sum())) for a, b in zip(p, q, strict=True))
    assert fairness(logits, torch.ones(4), mean, share).item() == pytest.approx(expected, rel=1e-5)
    assert expected < 0
    # A class that nobody predicts counts 0: it makes no infinity.
    assert torch.isfinite(fairness(logits, torch.ones(4), torch.tensor([0.7, 0.3, 0.0]), torch.tensor([0.7, 0.3, 0.0])))
