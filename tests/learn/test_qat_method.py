"""Distilled QAT as a method: what it learns from, and that its teacher stays what it was."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from toys import VIEWS, toy_network, toy_pool

from kdedge.data.batches import Batches
from kdedge.losses.kd import kd
from kdedge.methods.qat import DistilledQAT, DistilledQATConfig
from kdedge.methods.teacher import LiveTeacher


def method_and_batches(labeled: int = 3, **settings: object) -> tuple[DistilledQAT, Batches]:
    pool, network = toy_pool(), toy_network().eval()
    same = {"mean": pool.mean, "std": pool.std, "own_mean": pool.mean, "own_std": pool.std, "own_px": 8}
    teacher = LiveTeacher(copy.deepcopy(network), **same)  # type: ignore[arg-type]
    method = DistilledQAT(network, DistilledQATConfig.model_validate(settings), teacher)
    return method, Batches(pool, VIEWS, labeled_batch=labeled, unlabeled_batch=4, seed=0, stage="qat")


def test_the_same_network_has_nothing_to_learn() -> None:
    method, batches = method_and_batches()
    step = method(batches.at(0))
    assert float(step.loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(step.logs["agreement"]) == 1.0


@pytest.mark.parametrize(("views", "rows"), [("weak", 7), ("both", 11)])
def test_it_learns_the_teachers_answers_for_the_views_asked_for(views: str, rows: int) -> None:
    method, batches = method_and_batches(views=views, temperature=2.0)
    nn.init.normal_(method.network.head.weight)
    batch = batches.at(0)
    with torch.no_grad():
        expected = kd(method.network(batch.images[:rows]), method.teacher.network(batch.images[:rows]), 2.0)
    assert float(method(batch).loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_labels_count_only_where_they_are_given_weight() -> None:
    method, batches = method_and_batches(labeled_weight=0.5)
    batch = batches.at(0)
    logits = method.network(batch.images[:3])
    expected = 0.5 * nn.functional.cross_entropy(logits, batch.labels_B)
    assert float(method(batch).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_it_needs_no_labeled_image() -> None:
    method, batches = method_and_batches(labeled=0)
    batch = batches.at(0)
    assert batch.images.shape[0] == 8
    assert len(batch.labels_B) == 0
    assert torch.isfinite(method(batch).loss)


def test_the_teacher_is_neither_trained_nor_saved() -> None:
    method, batches = method_and_batches()
    assert len(list(method.parameters())) == len(list(method.network.parameters()))
    assert all(name.startswith("network.") for name in method.state_dict())
    method.train()
    nn.init.normal_(method.network.head.weight)
    method(batches.at(0)).loss.backward()
    assert all(each.grad is None for each in method.teacher.network.parameters())
    assert not method.teacher.network.training
