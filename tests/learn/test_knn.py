"""kNN accuracy against votes counted one by one."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from toys import toy_network, toy_pool

from kdedge.train import knn
from kdedge.train.engine import EnginePlan
from kdedge.train.evaluate import features
from kdedge.train.knn import features_of_some, knn_accuracy, knn_scores


def some(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return torch.eye(3)[labels] + 0.7 * torch.randn(count, 3, generator=generator), labels


def counted(query: list[float], bank: list[list[float]], labels: list[int], neighbors: int, temperature: float) -> list:
    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    ordered = sorted(((cosine(query, row), k) for row, k in zip(bank, labels, strict=True)), reverse=True)[:neighbors]
    return [sum(math.exp((c - 1) / temperature) for c, k in ordered if k == of) for of in range(3)]


@pytest.mark.parametrize("neighbors", [1, 5, 200])
@pytest.mark.parametrize("itself", [False, True])
def test_scores_are_the_votes_counted_one_by_one(monkeypatch, neighbors, itself) -> None:
    bank, labels = some(12)
    query = bank if itself else some(9, 1)[0]
    rows, given = bank.tolist(), labels.tolist()
    place = [given[:m].count(k) for m, k in enumerate(given)]  # of each image in its class
    expected = []
    for n, each in enumerate(query.tolist()):
        others = [m for m in range(12) if not (itself and place[m] == place[n])]
        kept = [rows[m] for m in others], [int(labels[m]) for m in others]
        expected.append(counted(each, *kept, neighbors, 0.3))
    for similarities in (2**22, 24):  # at once, and two queries at a time
        monkeypatch.setattr(knn, "_SIMILARITIES", similarities)
        found = knn_scores(query, bank, labels, 3, neighbors=neighbors, temperature=0.3, leave_out_itself=itself)
        assert found.flatten().tolist() == pytest.approx([v for row in expected for v in row], rel=1e-4)


def test_accuracy_is_that_of_the_highest_vote_and_of_known_classes_only() -> None:
    (query, labels), (bank, bank_labels) = some(50, 1), some(80)
    right = knn_scores(query, bank, bank_labels, 3).argmax(1) == labels
    assert knn_accuracy(query, labels, bank, bank_labels) == pytest.approx(float(right.float().mean()))
    assert knn_accuracy(query * 9, labels, bank * 0.1, bank_labels) == knn_accuracy(query, labels, bank, bank_labels)
    unknown = torch.full((20,), -1)
    more, more_bank = torch.cat([query, query[:20]]), torch.cat([bank, query[:20]])
    found = knn_accuracy(more, torch.cat([labels, unknown]), more_bank, torch.cat([bank_labels, unknown]))
    assert found == knn_accuracy(query, labels, bank, bank_labels)


def test_without_a_bank_no_image_votes_for_itself() -> None:
    labels = torch.randint(0, 2, (200,), generator=torch.Generator().manual_seed(0))
    noise = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    alone = knn_accuracy(noise, labels, neighbors=1)
    assert alone is not None
    assert alone == pytest.approx(0.5, abs=0.15)
    assert knn_accuracy(noise, labels, noise, labels, neighbors=1) == 1
    clear, classes = some(90)
    assert (knn_accuracy(clear, classes) or 0) > 0.7


def test_features_that_tell_nothing_are_right_by_chance() -> None:
    labels = torch.arange(4).repeat(10)
    assert knn_accuracy(torch.ones(40, 8), labels) == 0.25
    noise = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert knn_accuracy(noise, labels, temperature=1e3) == pytest.approx(0.25, abs=0.15)
    assert knn_accuracy(noise[:4], labels[:4]) is None  # of each class one: nobody could be right


def test_where_nothing_can_be_asked_there_is_no_accuracy() -> None:
    features_of_one, label = some(1)
    assert knn_accuracy(features_of_one, label) is None
    assert knn_accuracy(features_of_one, torch.tensor([-1]), *some(5)) is None
    assert knn_accuracy(*some(5), features_of_one[:0], label[:0]) is None
    assert knn_accuracy(*some(5), features_of_one, label) is not None


def test_features_of_a_part_of_a_set_are_those_of_its_images(monkeypatch) -> None:
    monkeypatch.setattr(knn, "_READ", 7)
    pool, network, plan = toy_pool(), toy_network(), EnginePlan()
    places = torch.tensor([3, 1, 44, 5, 6, 59, 8, 2, 20])
    found = features_of_some(network, pool.images, places, pool.mean, pool.std, plan)
    whole = features(network, pool.images, pool.mean, pool.std, plan)
    torch.testing.assert_close(found, whole[places], rtol=1e-5, atol=1e-6)
