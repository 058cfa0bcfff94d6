"""Deep embedded clustering and the trusted set."""

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from toys import toy_network, toy_pool

from kdedge.errors import RunError
from kdedge.train.engine import EnginePlan
from kdedge.train.evaluate import predict, predict_with_features
from kdedge.trust import dec
from kdedge.trust.select import (
    TrustConfig,
    TrustedSet,
    compare_with_confidence,
    confidence_only_like,
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
    refuted = (label >= 0) & (logits.argmax(1) != label)
    assert set(np.unique(trusted.why)) <= {"kept", "its label differs", "low confidence", "cluster disagrees"}
    np.testing.assert_array_equal(trusted.why == "its label differs", refuted.numpy())
    np.testing.assert_array_equal(trusted.why == "low confidence", ~(confident | refuted).numpy())
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


# ---- streaming


def wide(count: int = 150, features: int = 16, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping blobs that lie far from the origin, so that refining moves some images, and their classes."""
    generator = torch.Generator().manual_seed(3)
    truth = torch.arange(count) % classes
    return 2 + torch.eye(features)[truth] + 0.5 * torch.randn(count, features, generator=generator), truth


@pytest.mark.parametrize("chunk_images", [7, 64])
def test_a_chunk_size_changes_nothing(chunk_images) -> None:
    features, truth = wide()
    whole, parts = scaled_features(features.numpy(), 150), scaled_features(features.numpy(), chunk_images)
    assert parts.spread == pytest.approx(whole.spread, rel=1e-6)
    start = torch.stack([whole.rows(np.arange(150))[truth == k][:5].mean(0) for k in range(3)])
    expected, expected_centroids = dec.cluster(whole, start)
    assignment, centroids = dec.cluster(parts, start)
    assert (expected != dec.soft_assignment(whole.rows(np.arange(150)), start).argmax(1)).any()  # it did something
    assert torch.equal(assignment, expected)
    np.testing.assert_allclose(centroids, expected_centroids, rtol=1e-5, atol=1e-6)


def test_a_streamed_step_is_the_papers_gradient_in_plain_loops() -> None:
    """Section 3.1.3, eq. 5 with alpha = 1, over all images, its sign that of a descent."""
    features, truth = wide(30)
    stream = scaled_features(features.numpy(), 7)
    z = stream.rows(np.arange(30)).double()
    start = torch.stack([z[truth == k][:4].mean(0) for k in range(3)])
    q = dec.soft_assignment(z, start)
    p = dec.target_distribution(q)
    expected = start.clone()
    for j in range(3):
        for i in range(30):
            kernel = 1 / (1 + float(((z[i] - start[j]) ** 2).sum()))
            expected[j] += 0.5 * 2 * kernel * float(p[i, j] - q[i, j]) * (z[i] - start[j]) / 30
    _, moved = dec.cluster(stream, start, updates=1, steps_an_update=1)
    assert float((expected - start).abs().max()) > 1e-3
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-6)


def test_scaled_features_are_unit_vectors_with_a_mean_squared_distance_of_1() -> None:
    features, _ = wide()
    unit = features.double().numpy() / np.linalg.norm(features.double().numpy(), axis=1, keepdims=True)
    spread = np.sqrt(((unit - unit.mean(0)) ** 2).sum(1).mean())
    stream = scaled_features(features.numpy(), 64)
    np.testing.assert_allclose(stream.spread, spread, rtol=1e-6)
    np.testing.assert_allclose(stream.rows(np.array([140, 3, 99])), (unit / spread)[[140, 3, 99]], rtol=1e-5)
    in_chunks = torch.cat([part for _, part in stream.chunks()])
    assert torch.equal(in_chunks, stream.rows(np.arange(150)))


def test_features_in_a_file_give_the_set_of_features_in_memory(tmp_path) -> None:
    logits, features, label, truth = noisy_task()
    half = features.half().numpy()
    np.save(tmp_path / "features.npy", half)
    stored = np.load(tmp_path / "features.npy", mmap_mode="r")
    index = np.arange(len(truth))
    expected = select_trusted(logits, half, index, label, TrustConfig(), seed=0)
    found = select_trusted(logits, stored, index, label, TrustConfig(), seed=0)
    for name in found.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("labels", [True, False])
def test_the_order_of_the_images_does_not_matter(labels) -> None:
    logits, features, label, truth = noisy_task()  # most confidences are equal, so the quota cuts through ties
    label = label if labels else torch.full_like(label, -1)
    index = np.arange(1000, 1000 + len(truth))
    config = TrustConfig(quota=20)
    expected = select(logits, features, index, label, config)
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(5))
    found = select(logits[order], features[order], index[order], label[order], config)
    assert expected.kept.sum() == 80
    np.testing.assert_array_equal(found.index, expected.index[order])
    np.testing.assert_array_equal(found.why, expected.why[order])
    np.testing.assert_array_equal(found.cluster, expected.cluster[order])


def test_k_means_starts_from_a_seeded_part_of_many_images(monkeypatch) -> None:
    logits, features, label, truth = noisy_task()
    monkeypatch.setattr("kdedge.trust.select._KMEANS_IMAGES", 50)
    none = torch.full_like(label, -1)
    found = select(logits, features, np.arange(len(truth)), none)
    assert found.summary(truth.numpy(), 4)["precision"] > 0.97
    again = select(logits, features, np.arange(len(truth)), none)
    np.testing.assert_array_equal(found.cluster, again.cluster)


# ---- ties, quota, outliers


def test_equal_confidence_goes_by_a_seeded_order() -> None:
    logits, features, label, truth = noisy_task()
    index, config = np.arange(len(truth)), TrustConfig(filters="confidence", quota=10)
    first, again, other = (select(logits, features, index, label, config, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.kept, again.kept)
    assert (first.kept != other.kept).any()
    assert np.bincount(first.label[first.kept]).tolist() == np.bincount(other.label[other.kept]).tolist() == [10] * 4
    assert np.flatnonzero(first.kept & (first.label == 0)).max() > 20  # not simply the first


def test_a_balanced_quota_cuts_the_head_of_a_long_tail_to_the_median() -> None:
    said = torch.tensor([0] * 100 + [1] * 30 + [2] * 10)  # class 3 is never said
    logits = torch.nn.functional.one_hot(said, 4).float() * 10
    none = torch.full_like(said, -1)
    config = TrustConfig(filters="confidence", quota="balanced")
    trusted = select(logits, torch.eye(4)[said], np.arange(140), none, config)
    assert np.bincount(trusted.label[trusted.kept], minlength=4).tolist() == [30, 30, 10, 0]
    assert (trusted.why == "quota").sum() == 70
    nobody = select(logits * 0, torch.eye(4)[said], np.arange(140), none, config)
    assert nobody.kept.sum() == 0


def test_outliers_are_never_kept_and_do_not_vote() -> None:
    logits, features, label, truth = noisy_task()
    outlier = np.zeros(len(truth), dtype=bool)
    outlier[5:15] = True
    index = np.arange(len(truth))
    trusted = select(logits, features, index, label, outlier_N=outlier)
    assert (trusted.why[outlier] == "outlier").all()
    assert (trusted.why[~outlier] != "outlier").all()
    # All of class 0 said to be class 1: with their votes its cluster would be class 1's, without them it is not.
    logits = logits.clone()
    logits[truth == 0] = torch.tensor([0.0, 12.0, 0.0, 0.0])
    none = torch.full_like(label, -1)
    start_of_0 = (truth == 0).numpy()
    voting = select(logits, features, index, none, TrustConfig(clusters=8))
    silent = select(logits, features, index, none, TrustConfig(clusters=8), outlier_N=start_of_0)
    assert voting.kept[start_of_0].mean() > 0.9
    assert not silent.kept[start_of_0].any()


def test_a_labeled_image_is_never_trusted_to_be_of_another_class() -> None:
    logits, features, label, truth = noisy_task()
    label[5] = truth[5]
    logits[5] = torch.nn.functional.one_hot((truth[5] + 1) % 4, 4) * 12.0  # as sure as can be, and wrong
    for filters in ("confidence", "clusters", "confidence+clusters"):
        trusted = select(logits, features, np.arange(len(truth)), label, TrustConfig(filters=filters))
        labeled = (label >= 0).numpy() & trusted.kept
        assert (trusted.why[5], labeled.any()) == ("its label differs", True)
        np.testing.assert_array_equal(trusted.label[labeled], label.numpy()[labeled])
        assert not confidence_only_like(trusted, seed=0).kept[5]


# ---- against confidence alone


def test_the_confidence_only_set_has_the_same_classes_and_the_most_confident_of_each() -> None:
    logits, features, label, truth = noisy_task()
    logits = logits + torch.rand(logits.shape, generator=torch.Generator().manual_seed(2))
    index = np.arange(len(truth))
    outlier = np.arange(len(truth)) % 50 == 3
    trusted = select(logits, features, index, label, outlier_N=outlier)
    alone = confidence_only_like(trusted, seed=0)
    right = known = 0
    for k in range(4):
        count = sum(bool(kept) and said == k for kept, said in zip(trusted.kept, trusted.label, strict=True))
        refuted = [label[i] >= 0 and label[i] != trusted.label[i] for i in range(len(truth))]
        rows = [i for i in range(len(truth)) if trusted.label[i] == k and not outlier[i] and not refuted[i]]
        rows = sorted(rows, key=lambda i: -trusted.confidence[i])[:count]
        assert sorted(rows) == np.flatnonzero(alone.kept & (alone.label == k)).tolist()
        right, known = right + sum(int(truth[i]) == k for i in rows), known + count
    compared = compare_with_confidence(trusted, truth.numpy(), seed=0)
    assert compared["confidence_only_precision"] == pytest.approx(right / known)
    assert compared["images_exchanged"] == int((alone.kept & ~trusted.kept).sum()) > 0
    assert set(np.unique(alone.why)) - {"its label differs"} == {"kept", "outlier", "low confidence"}
    unknown = compare_with_confidence(trusted, np.full(len(truth), -1), seed=0)
    assert unknown["confidence_only_precision"] is None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_a_noisy_outer_network_clusters_beat_confidence_at_equal_size(seed) -> None:
    logits, features, label, truth = noisy_task()
    trusted = select(logits, features, np.arange(len(truth)), label, seed=seed)
    precision = trusted.summary(truth.numpy(), 4)["precision"]
    assert precision >= trusted.summary(truth.numpy(), 4)["precision_after_confidence"]
    assert precision > compare_with_confidence(trusted, truth.numpy(), seed)["confidence_only_precision"] + 0.03


# ---- what cannot be clustered, and small pools


def test_what_cannot_be_clustered_is_told_in_a_sentence() -> None:
    logits, features, label, truth = noisy_task()
    index = np.arange(len(truth))
    broken = features.clone()
    broken[17, 2] = torch.nan
    with pytest.raises(RunError, match=r"unlabeled image 17 are not finite numbers"):
        select(logits, broken, index, label)
    with pytest.raises(RunError, match=r"all 240 unlabeled images the same features"):
        select(logits, torch.full_like(features, 0.3), index, label)
    with pytest.raises(RunError, match=r"300 clusters were asked for \(trust.clusters\) of 240 unlabeled images"):
        select(logits, features, index, label, TrustConfig(clusters=300))
    # None of it matters where clusters are not asked for.
    assert select(logits, broken, index, label, TrustConfig(filters="confidence")).kept.any()


def test_two_hundred_images_and_a_class_without_a_label() -> None:
    logits, features, label, truth = noisy_task()
    some = torch.arange(0, 240)[torch.arange(240) % 6 != 5]  # 200 of them
    label = torch.where(label == 2, -1, label)
    trusted = select(logits[some], features[some], np.arange(200), label[some])
    assert trusted.summary(truth[some].numpy(), 4)["precision"] > 0.97
    assert trusted.kept.mean() > 0.5


def test_more_clusters_than_distinct_images_leave_some_empty() -> None:
    features = torch.eye(4).repeat_interleave(10, 0)
    truth = torch.arange(4).repeat_interleave(10)
    logits = torch.nn.functional.one_hot(truth, 4).float() * 10
    trusted = select(logits, features, np.arange(40), torch.full((40,), -1), TrustConfig(clusters=9))
    assert trusted.kept.all()
    assert len(np.unique(trusted.cluster)) < 9


# ---- predicting


def test_features_are_written_while_predicting(tmp_path) -> None:
    network, pool, plan = toy_network(), toy_pool(300), EnginePlan()
    path = tmp_path / "made" / "features.npy"
    network.train()
    logits, features = predict_with_features(network, pool.images, pool.mean, pool.std, plan, path)
    assert network.training
    assert torch.equal(logits, predict(network, pool.images, pool.mean, pool.std, plan))
    assert isinstance(features, np.memmap)
    assert features.dtype == np.float16
    network.eval()
    with torch.no_grad():
        embedded = network.embed((pool.images.images_u8.float() / 255 - pool.mean) / pool.std)
    np.testing.assert_allclose(features, embedded.numpy(), rtol=2e-3, atol=1e-4)
    np.testing.assert_array_equal(features, np.load(path))
    nothing = pool.images.rows(torch.arange(0))
    none_logits, none = predict_with_features(network, nothing, pool.mean, pool.std, plan, path)
    assert none_logits.shape == (0, 3)
    assert none.shape == (0, features.shape[1])


def test_features_that_cannot_be_written_are_told(tmp_path) -> None:
    network, pool = toy_network(), toy_pool()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"Cannot write the features of 60 images .* --resume"):
        predict_with_features(network, pool.images, pool.mean, pool.std, EnginePlan(), tmp_path / "file" / "f.npy")
