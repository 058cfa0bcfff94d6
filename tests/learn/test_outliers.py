"""Outliers: planted ones are found, labeled images never are, and the line holds what it promises."""

import numpy as np
import pytest
import torch

from kdedge.errors import RunError
from kdedge.trust import outliers
from kdedge.trust.outliers import OutlierConfig, outlier_mask

SCORES = ("energy", "max-logit", "distance")


def planted(labels_a_class: int = 25, seed: int = 0) -> tuple[torch.Tensor, np.ndarray, torch.Tensor, np.ndarray]:
    """Logits, features, given labels and whether an image is an outlier: 4 classes of 200, and 200 of none."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(1000) // 200  # 4 is no class
    features = torch.eye(16)[truth] + 0.15 * torch.randn(1000, 16, generator=generator)
    logits = 8 * features[:, :4]
    label = torch.full((1000,), -1)
    for k in range(4):
        label[k * 200 : k * 200 + labels_a_class] = k
    order = torch.randperm(1000, generator=generator)
    return logits[order], features[order].numpy(), label[order], (truth == 4)[order].numpy()


def auroc(score: np.ndarray, outlier: np.ndarray) -> float:
    return float((score[outlier][:, None] > score[~outlier][None]).mean())


@pytest.mark.parametrize("score", SCORES)
def test_planted_outliers_score_higher_and_labeled_images_are_never_outliers(score) -> None:
    logits, features, label, outlier = planted()
    mask, scores = outlier_mask(logits, features, label, OutlierConfig(score=score))
    assert auroc(scores, outlier) > 0.99
    assert mask[outlier].mean() > 0.95
    assert not mask[label.numpy() >= 0].any()
    assert (mask.dtype, scores.dtype) == (np.bool_, np.float32)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("keep", [0.8, 0.95])
def test_the_share_that_stays_is_the_one_asked_for(score, keep) -> None:
    dropped = []
    for seed in range(8):
        logits, features, label, outlier = planted(seed=seed)
        mask, _ = outlier_mask(logits, features, label, OutlierConfig(score=score, keep=keep))
        dropped.append(mask[~outlier & (label.numpy() < 0)].mean())
    assert np.mean(dropped) == pytest.approx(1 - keep, abs=0.04)


def test_scores_and_line_written_out() -> None:
    logits, features, label, _ = planted(labels_a_class=10)
    for score in SCORES:
        mask, scores = outlier_mask(logits, features, label, OutlierConfig(score=score, keep=0.9))
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        given = [i for i in range(1000) if label[i] >= 0]
        for i in range(0, 1000, 7):
            z = [float(value) for value in logits[i]]
            slow = {
                "energy": -np.log(np.sum(np.exp(z))),
                "max-logit": -max(z),
                "distance": min(1 - float(unit[i] @ unit[j]) for j in given if j != i),
            }[score]
            assert scores[i] == pytest.approx(slow, abs=1e-5)
            p_value = (1 + sum(scores[j] >= scores[i] for j in given)) / (len(given) + 1)
            assert mask[i] == (label[i] < 0 and p_value <= 0.1)


@pytest.mark.parametrize("score", SCORES)
def test_few_labels_prove_nothing(score) -> None:
    logits, features, label, _ = planted(labels_a_class=5)
    label[np.flatnonzero(label.numpy() >= 0)[:2]] = -1  # 18 of the 19 that 0.95 needs
    mask, _ = outlier_mask(logits, features, label, OutlierConfig(score=score, keep=0.95))
    assert not mask.any()
    mask, _ = outlier_mask(logits, features, label, OutlierConfig(score=score))
    assert mask.any()


def test_chunks_and_maps_make_no_difference(monkeypatch, tmp_path) -> None:
    logits, features, label, _ = planted()
    config = OutlierConfig(score="distance")
    mask, scores = outlier_mask(logits, features, label, config)
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    monkeypatch.setattr(outliers, "_CHUNK_DISTANCES", 7 * 100)  # 7 images at a time
    again, scores_again = outlier_mask(logits, mapped, label, config)
    np.testing.assert_allclose(scores_again, scores, atol=1e-6)
    np.testing.assert_array_equal(again, mask)


def test_off_by_default() -> None:
    logits, features, label, _ = planted()
    mask, scores = outlier_mask(logits, features, label, OutlierConfig())
    assert not mask.any()
    assert not scores.any()


@pytest.mark.parametrize("score", SCORES)
def test_equal_images_and_missing_labels_are_no_outliers(score) -> None:
    logits, features, label, _ = planted()
    same = np.tile(features[:1], (1000, 1))
    assert not outlier_mask(logits[:1].expand(1000, -1), same, label, OutlierConfig(score=score))[0].any()
    nobody = torch.full_like(label, -1)
    assert not outlier_mask(logits, features, nobody, OutlierConfig(score=score))[0].any()


@pytest.mark.parametrize("score", SCORES)
def test_a_network_that_diverged_is_told(score) -> None:
    logits, features, label, _ = planted()
    row = int(np.flatnonzero(label.numpy() < 0)[0])
    logits[row], features[row] = float("nan"), float("inf")
    with pytest.raises(RunError, match=f"unlabeled image {row} is not a finite number"):
        outlier_mask(logits, features, label, OutlierConfig(score=score))
