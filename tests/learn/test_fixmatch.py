"""FixMatch: image by image from the paper, and what the policy and the prior add."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from toys import VIEWS, toy_network, toy_pool

from kdedge.data.batches import Batch, Batches
from kdedge.errors import BugError
from kdedge.losses.consistency import labeled_cross_entropy, log_prior, masked_cross_entropy
from kdedge.methods.fixmatch import FixMatch, FixMatchConfig, logits_of
from kdedge.methods.thresholds import ThresholdConfig, make_policy
from kdedge.train.optim import learning_rate


@pytest.fixture
def batch() -> Batch:
    return Batches(toy_pool(), VIEWS, labeled_batch=6, unlabeled_batch=30, seed=0, stage="t").at(0)


def fixmatch(*, log_prior_K: torch.Tensor | None = None, logit_adjustment: float = 0.0, **thresholds) -> FixMatch:
    config = FixMatchConfig(thresholds=ThresholdConfig(**thresholds), logit_adjustment=logit_adjustment)
    return FixMatch(toy_network(), config, make_policy(config.thresholds, 3, 60), log_prior_K)


def slow_fixmatch(method: FixMatch, batch: Batch, threshold: float) -> float:
    """FixMatch image by image, from the paper, on a copy in the same mode."""
    logits = copy.deepcopy(method.network)(batch.images).detach()
    labeled, unlabeled = len(batch.labels_B), len(batch.position_U)
    supervised = sum(functional.cross_entropy(logits[i], batch.labels_B[i]) for i in range(labeled)) / labeled
    total = 0.0
    for u in range(unlabeled):
        q = torch.softmax(logits[labeled + u], 0)
        if q.max() >= threshold:
            total += functional.cross_entropy(logits[labeled + unlabeled + u], q.argmax())
    return float(supervised + total / unlabeled)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.01])
def test_fixmatch_is_the_paper_image_by_image(batch, threshold) -> None:
    method = fixmatch(threshold=threshold).train()
    expected = slow_fixmatch(method, batch, threshold)
    assert method(batch).loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.95])
def test_the_fixed_policy_adds_nothing_to_equation_4_not_a_bit(batch, threshold) -> None:
    method = fixmatch(threshold=threshold).train()
    labeled, weak, strong = logits_of(copy.deepcopy(method.network), batch)
    confidence, label = torch.softmax(weak.detach(), dim=1).max(1)
    unlabeled = (functional.cross_entropy(strong, label, reduction="none") * (confidence >= threshold)).mean()
    expected = functional.cross_entropy(labeled, batch.labels_B) + unlabeled
    assert torch.equal(method(batch).loss, expected)


def test_half_the_mask_is_half_the_loss_since_all_images_divide() -> None:
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    target = torch.arange(8).repeat(2) % 3
    half = torch.cat([torch.ones(8), torch.zeros(8)])
    whole = masked_cross_entropy(logits, target, torch.ones(16))
    assert masked_cross_entropy(logits, target, half).item() == pytest.approx(whole.item() / 2, rel=1e-6)
    assert masked_cross_entropy(logits, target, torch.full((16,), 0.5)).item() == pytest.approx(whole.item() / 2)


@pytest.mark.parametrize("policy", ["fixed", "flexmatch", "freematch", "softmatch", "adamatch"])
def test_the_weak_view_gives_targets_and_no_gradient(batch, policy) -> None:
    """The gradient is that of the labeled and the strong views against fixed targets and weights."""
    knobs = {"threshold": 0.0} if policy in ("fixed", "flexmatch", "adamatch") else {}
    knobs |= {"fairness_weight": 0.0} if policy == "freematch" else {}
    method = fixmatch(policy=policy, **knobs).eval()  # eval: views do not meet in batch norm
    method(batch).loss.backward()
    other = toy_network().eval()
    with torch.no_grad():
        pseudo = method.policy(other(batch.images[:6]), other(batch.images[6:36]), batch.position_U)
    assert pseudo.weight_U.sum() > 0
    loss = functional.cross_entropy(other(batch.images[:6]), batch.labels_B)
    (loss + masked_cross_entropy(other(batch.images[36:]), pseudo.label_U, pseudo.weight_U)).backward()
    for a, b in zip(method.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
        assert a.grad.abs().sum() > 0


def test_the_policys_own_term_is_in_the_loss_and_in_the_log(batch) -> None:
    step = fixmatch(policy="freematch", fairness_weight=0.5).train()(batch)
    without = fixmatch(policy="freematch", fairness_weight=0.0).train()(batch)
    assert "loss_extra" not in without.logs
    assert step.logs["loss_extra"] != 0
    assert step.loss.item() == pytest.approx(without.loss.item() + step.logs["loss_extra"].item(), rel=1e-5)


def test_the_rate_ends_at_the_published_fifth_of_its_peak() -> None:
    assert learning_rate(2**20, 2**20, 0.03, 0) == pytest.approx(0.03 * math.cos(7 * math.pi / 16))
    assert learning_rate(2**20, 2**20, 0.03, 0) == pytest.approx(0.00585, rel=1e-3)
    assert learning_rate(0, 2**20, 0.03, 0) == 0.03


def test_the_log_prior_is_the_share_of_each_class() -> None:
    prior = log_prior(torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1]), 3)
    torch.testing.assert_close(prior.exp(), torch.tensor([0.3, 0.6, 0.1]))  # of none: as if one


def test_logit_adjustment_image_by_image(batch) -> None:
    prior = log_prior(torch.tensor([0] * 8 + [1] * 3 + [2]), 3)
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).tolist()
    labels = [0, 2, 1, 2, 0]
    share, expected = [8 / 12, 3 / 12, 1 / 12], 0.0
    for z, y in zip(logits, labels, strict=True):  # arXiv 2007.07314 with tau 1
        expected += math.log(1 + sum(share[k] / share[y] * math.exp(z[k] - z[y]) for k in range(3) if k != y)) / 5
    ours = labeled_cross_entropy(torch.tensor(logits), torch.tensor(labels), prior)
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_logit_adjustment_is_for_labels_only_and_even_labels_change_nothing(batch) -> None:
    plain = fixmatch(threshold=0.0).train()(batch)
    even = fixmatch(threshold=0.0, logit_adjustment=1.0, log_prior_K=log_prior(torch.arange(3), 3)).train()(batch)
    assert even.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    prior = log_prior(torch.tensor([0, 0, 0, 0, 1, 2]), 3)
    tailed = fixmatch(threshold=0.0, logit_adjustment=0.5, log_prior_K=prior).train()
    logits = copy.deepcopy(tailed.network)(batch.images)[:6] + 0.5 * prior
    step = tailed(batch)
    assert torch.equal(step.logs["loss_unlabeled"], plain.logs["loss_unlabeled"])
    expected = functional.cross_entropy(logits, batch.labels_B)
    assert step.logs["loss_labeled"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert not any("prior" in name for name in tailed.state_dict())


def test_logit_adjustment_without_a_prior_is_our_mistake() -> None:
    with pytest.raises(BugError, match=r"logit_adjustment is 1\.0"):
        fixmatch(logit_adjustment=1.0)
