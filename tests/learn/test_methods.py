"""The baseline; FixMatch and KD-FixMatch have files of their own."""

import copy
import sys
from pathlib import Path

import pytest
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from toys import VIEWS, toy_network, toy_pool

from kdedge.data.batches import Batches
from kdedge.methods.supervised import Supervised


def test_the_baseline_sees_labels_only() -> None:
    labels_only = Batches(toy_pool(), VIEWS, labeled_batch=6, unlabeled_batch=0, seed=0, stage="t").at(0)
    method = Supervised(toy_network()).train()
    expected = functional.cross_entropy(copy.deepcopy(method.network)(labels_only.images), labels_only.labels_B)
    assert method(labels_only).loss.item() == pytest.approx(expected.item(), rel=1e-6)
