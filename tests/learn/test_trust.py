"""Deep embedded clustering and the trusted set."""


import numpy as np
import numpy.typing as npt
import pytest
import torch

from kdedge.errors import RunError
from kdedge.trust import dec
from kdedge.trust.select import (
    TrustConfig,
    TrustedSet,
    load_trusted,
    save_trusted,
    select_trusted,
)
from kdedge.trust.stream import scaled_features


def blobs(count: int = 60, classes: int = 4, noise: float = 0.15) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [count * classes, 8] around unit axes, and their classes."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(classes).repeat_interleave(count)
    return torch.eye(8)[truth] + noise * torch.randn(len(truth), 8, generator=generator), truth


def test_soft_assignment_is_the_student_kernel_written_out() -> None:
    features, centroids = torch.randn(5, 3).double(), torch.randn(4, 3).double()
    q = dec.soft_assignment(features, centroids)
    for i in range(5):
        kernel = [1 / (1 + float(((features[i] - centroids[j]) ** 2).sum())) for j in range(4)]
        np.testing.assert_allclose(q[i], [k / sum(kernel) for k in kernel], rtol=1e-10)


def test_target_rows_sum_to_1_and_follow_equation_3() -> None:
    q = torch.rand(7, 4).double()
    q = q / q.sum(1, keepdim=True)
    p = dec.target_distribution(q)
    frequency = [sum(float(q[i, j]) for i in range(7)) for j in range(4)]
    for i in range(7):
        weights = [float(q[i, j]) ** 2 / frequency[j] for j in range(4)]
        np.testing.assert_allclose(p[i], [w / sum(weights) for w in weights], rtol=1e-10)
    one_hot = torch.eye(4).double()[torch.tensor([0, 1, 2, 3, 1])]
    assert torch.equal(dec.target_distribution(one_hot), one_hot)


def test_the_divergence_falls_while_clustering_separable_blobs() -> None:
    features, truth = blobs()
    stream = scaled_features(features.numpy())
    scaled = stream.rows(np.arange(len(truth)))
    start = torch.stack([scaled[truth == k][:3].mean(0) for k in range(4)])

    held = dec.target_distribution(dec.soft_assignment(scaled, start))
    before = float(dec.kl_loss(held, dec.soft_assignment(scaled, start)))
    for steps in (1, 5, 20):  # P is held within an update
        _, centroids = dec.cluster(stream, start, updates=1, steps_an_update=steps)
        after = float(dec.kl_loss(held, dec.soft_assignment(scaled, centroids.float())))
        assert after < before
        before = after
    assignment, _ = dec.cluster(stream, start)
    assert torch.equal(assignment, truth)  # started at the classes, it stays with them


def test_the_map_of_clusters_is_a_permutation() -> None:
    assignment = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    label = torch.tensor([2, 2, 0, -1, 1, 1, 2])
    mapping = dec.map_clusters(assignment, label, torch.ones(7), 3, 3)
    assert mapping.tolist() == [2, 0, 1]
    # Two clusters vote for class 0; one to one, only the stronger gets it.
    mapping = dec.map_clusters(torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 0, 0, 0, 1]), torch.ones(5), 3, 3)
    assert sorted(mapping.tolist()) == [0, 1, 2]
    assert mapping[0] == 0
    # More clusters than classes: majority, and a cluster without votes agrees with nobody.
    mapping = dec.map_clusters(torch.tensor([0, 0, 1, 2]), torch.tensor([1, 1, 1, -1]), torch.ones(4), 3, 2)
    assert mapping.tolist() == [1, 1, -1]


def noisy_task() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of an outer network that is confidently wrong on a tenth, features that are right, labels, truth."""
    features, truth = blobs()
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(len(truth), generator=generator) < 0.1
    said = torch.where(wrong, (truth + 1) % 4, truth)
    logits = torch.nn.functional.one_hot(said, 4).float() * 8
    logits[::7] *= 0.2  # unsure of some
    label = torch.full_like(truth, -1)
    label[::20] = truth[::20]
    return logits, features, label, truth


def select(
    logits: torch.Tensor, features: torch.Tensor, index: npt.NDArray[np.int64], label: torch.Tensor, *config, **more
) -> TrustedSet:
    return select_trusted(logits, features.numpy(), index, label, *(config or [TrustConfig()]), **{"seed": 0} | more)


def test_clusters_remove_confident_mistakes_and_every_drop_has_its_reason() -> None:
    logits, features, label, truth = noisy_task()
    index = np.arange(1000, 1000 + len(truth))
    trusted = select(logits, features, index, label, TrustConfig())
    summary = trusted.summary(truth.numpy(), 4)
    assert summary["precision"] == 1.0 > summary["precision_after_confidence"]
    confident = torch.softmax(logits, 1).max(1).values >= 0.95
    assert set(np.unique(trusted.why)) == {"kept", "low confidence", "cluster disagrees"}
    np.testing.assert_array_equal(trusted.why == "low confidence", ~confident.numpy())
    np.testing.assert_array_equal(trusted.kept, trusted.why == "kept")
    assert summary["size"] == trusted.kept.sum() == sum(summary["per_class"])
    assert sum(summary["why"].values()) == len(truth)


@pytest.mark.parametrize("clusters", [None, 6])
def test_it_works_without_labels_in_the_pool_and_with_more_clusters_than_classes(clusters) -> None:
    logits, features, label, truth = noisy_task()
    none = torch.full_like(label, -1)
    trusted = select(logits, features, np.arange(len(truth)), none, TrustConfig(clusters=clusters))
    assert trusted.summary(truth.numpy(), 4)["precision"] > 0.97
    assert trusted.kept.mean() > 0.5


def test_filters_can_be_left_out() -> None:
    logits, features, label, truth = noisy_task()
    index = np.arange(len(truth))
    confident = (torch.softmax(logits, 1).max(1).values >= 0.95).numpy()
    alone = select(logits, features, index, label, TrustConfig(filters="confidence"))
    np.testing.assert_array_equal(alone.kept, confident)
    assert (alone.cluster == -1).all()
    nobody = select(logits, features, index, label, TrustConfig(filters="none"))
    assert nobody.kept.sum() == 0


def test_a_quota_keeps_the_most_confident_of_each_class() -> None:
    logits, features, label, _ = noisy_task()
    logits = logits + torch.rand(logits.shape, generator=torch.Generator().manual_seed(2))
    index = np.arange(len(label))
    free = select(logits, features, index, label, TrustConfig())
    capped = select(logits, features, index, label, TrustConfig(quota=10))
    assert np.bincount(capped.label[capped.kept], minlength=4).tolist() == [10] * 4
    for k in range(4):
        dropped = free.kept & ~capped.kept & (free.label == k)
        kept = capped.kept & (capped.label == k)
        assert capped.confidence[kept].min() >= capped.confidence[dropped].max()
        assert (capped.why[dropped] == "quota").all()


def test_a_trusted_set_survives_the_disk_and_damage_is_told(tmp_path) -> None:
    logits, features, label, _ = noisy_task()
    trusted = select(logits, features, np.arange(len(label)), label, TrustConfig())
    path = tmp_path / "trusted.npz"
    save_trusted(path, trusted)
    again = load_trusted(path)
    for name in trusted.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(trusted, name), getattr(again, name))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match=r"trusted\.npz cannot be read"):
        load_trusted(path)
