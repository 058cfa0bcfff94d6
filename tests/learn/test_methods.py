"""FixMatch and KD-FixMatch: the invariants that tie one to the other."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from toys import VIEWS, toy_network, toy_pool

from kdedge.data.batches import Batch, Batches
from kdedge.methods.fixmatch import FixMatch, FixMatchConfig
from kdedge.methods.kd_fixmatch import KDFixMatch, KDFixMatchConfig
from kdedge.methods.supervised import Supervised

PLAIN = KDFixMatchConfig(robust_loss="ce", kd_weight=0.0)


@pytest.fixture
def batch() -> Batch:
    return Batches(toy_pool(), VIEWS, labeled_batch=6, unlabeled_batch=30, seed=0, stage="t").at(0)


def inner(
    config: KDFixMatchConfig, trusted: torch.Tensor | None = None, logits: torch.Tensor | None = None
) -> KDFixMatch:
    return KDFixMatch(
        toy_network(),
        config,
        torch.full((60,), -1) if trusted is None else trusted,
        torch.zeros(60, 3) if logits is None else logits,
    )


def test_without_trusted_labels_kd_fixmatch_is_fixmatch_bit_for_bit(batch) -> None:
    for threshold in (0.4, 0.95):
        outer = FixMatch(toy_network(), FixMatchConfig(threshold=threshold)).train()
        same = inner(PLAIN.model_copy(update={"threshold": threshold})).train()
        assert torch.equal(outer(batch).loss, same(batch).loss)


def test_with_all_trusted_and_no_own_confidence_it_is_pseudo_label_training_on_strong_views(batch) -> None:
    pool = toy_pool()
    method = inner(PLAIN.model_copy(update={"threshold": 1.01}), trusted=pool.truth).train()
    logits = copy.deepcopy(method.network)(batch.images).detach()
    labeled, _, strong = logits.split([6, 30, 30])
    expected = functional.cross_entropy(labeled, batch.labels_B) + functional.cross_entropy(strong, batch.truth_U)
    step = method(batch)
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert step.logs["kept_fraction"] == 1
    assert step.logs["pseudo_label_accuracy"] == 1


def test_soft_distillation_adds_its_divergence_and_trains_no_teacher(batch) -> None:
    teacher = torch.randn(60, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
    with_kd = inner(PLAIN.model_copy(update={"kd_weight": 0.5}), logits=teacher.detach()).train()
    without = inner(PLAIN).train()
    a, b = with_kd(batch), without(batch)
    assert a.loss.item() == pytest.approx(b.loss.item() + 0.5 * a.logs["loss_kd"].item(), rel=1e-6)
    assert a.logs["loss_kd"] > 0
    assert not any("teacher" in name or "trusted" in name for name in with_kd.state_dict())


def test_the_baseline_sees_labels_only() -> None:
    labels_only = Batches(toy_pool(), VIEWS, labeled_batch=6, unlabeled_batch=0, seed=0, stage="t").at(0)
    method = Supervised(toy_network()).train()
    expected = functional.cross_entropy(copy.deepcopy(method.network)(labels_only.images), labels_only.labels_B)
    assert method(labels_only).loss.item() == pytest.approx(expected.item(), rel=1e-6)
