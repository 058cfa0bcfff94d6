"""The trusted set: unlabeled images whose pseudo label the inner network may believe (KD-FixMatch, stage 2).

An image is kept when the outer network is confident of its label *and* the cluster of its features stands for the
same class. Both filters are from the paper's abstract; how they are carried out is our reconstruction.

Features are streamed, so that they may lie in a file; logits, and a few numbers an image, are in memory.
What is drawn by chance follows from the seed and from the images' order in the source, not from their order here.

N unlabeled images, R some of them, F features, J clusters, K classes.
"""

import io
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from kdedge.config import Config
from kdedge.errors import RunError
from kdedge.runs import write_bytes
from kdedge.trust import dec
from kdedge.trust.stream import WHOLE, ScaledFeatures, Share, scaled_features

__all__ = [
    "OUTLIER",
    "TrustConfig",
    "TrustedSet",
    "compare_with_confidence",
    "confidence_only_like",
    "load_trusted",
    "save_trusted",
    "select_trusted",
]

KEPT, OUTLIER, REFUTED, UNSURE, DISAGREES, QUOTA = (
    "kept", "outlier", "its label differs", "low confidence", "cluster disagrees", "quota",
)  # fmt: skip
"""Why an image is kept or dropped: the first filter, in this order, that it does not pass."""

_KMEANS_IMAGES = 20_000  # centroids to start from are means of thousands either way


class TrustConfig(Config):
    """Which pseudo labels are trusted."""

    filters: Literal["none", "confidence", "clusters", "confidence+clusters"] = "confidence+clusters"
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.95
    clusters: Annotated[int, Field(gt=1)] | None = None  # null: as many as classes
    # At most so many a class, the most confident first; null: no limit. "balanced": the median of the classes that
    # kept any, so that the head of a long tail is cut and at least half of the classes lose nothing.
    quota: Annotated[int, Field(gt=0)] | Literal["balanced"] | None = None
    label_weight: Annotated[float, Field(ge=0)] = 10.0  # votes of a labeled image when clusters get their class


@dataclass(frozen=True)
class TrustedSet:
    """One row for each unlabeled image, in the order of the run's unlabeled split."""

    index: npt.NDArray[np.int64]  # into the source
    label: npt.NDArray[np.int64]  # the outer network's
    confidence: npt.NDArray[np.float32]
    cluster: npt.NDArray[np.int64]
    kept: npt.NDArray[np.bool_]
    why: npt.NDArray[np.str_]
    logits: npt.NDArray[np.float32]  # [N, K] of the outer network, for soft distillation

    def precision(self, truth_N: npt.NDArray[np.int64], mask_N: npt.NDArray[np.bool_]) -> float | None:
        """Share of the images in the mask whose label is right, of those whose truth is known (not -1)."""
        known = mask_N & (truth_N >= 0)
        return float((self.label == truth_N)[known].mean()) if known.any() else None

    def summary(self, truth_N: npt.NDArray[np.int64], classes: int) -> dict[str, Any]:
        """Size, coverage, counts; precision after each filter where the truth is known (for reporting only)."""
        confident = ~np.isin(self.why, (OUTLIER, REFUTED, UNSURE))
        return {
            "size": int(self.kept.sum()),
            "coverage": float(self.kept.mean()) if len(self.kept) else 0.0,
            "precision": self.precision(truth_N, self.kept),
            "precision_before_filters": self.precision(truth_N, np.ones_like(self.kept)),
            "precision_after_confidence": self.precision(truth_N, confident),
            "precision_after_clusters": self.precision(truth_N, confident & (self.why != DISAGREES)),
            "per_class": np.bincount(self.label[self.kept], minlength=classes).tolist(),
            "why": {str(reason): int((self.why == reason).sum()) for reason in np.unique(self.why)},
        }


def select_trusted(
    logits_NK: Tensor,
    features_NF: npt.NDArray[Any],
    index_N: npt.NDArray[np.int64],
    label_N: Tensor,
    config: TrustConfig,
    *,
    seed: int,
    outlier_N: npt.NDArray[np.bool_] | None = None,
    share: Share = WHOLE,
) -> TrustedSet:
    """Filter the unlabeled images. `label` is the given label of those that are also labeled, else -1.

    Logits and features are the outer network's in eval mode on images without views; features may be a memory map,
    which is read in chunks. An image marked in `outlier_N` is not kept, and does not vote for its cluster's class;
    one whose given label is not the outer network's is not kept either, however confident that is.
    RunError where the features cannot be clustered.
    """
    classes = logits_NK.shape[1]
    confidence_N, predicted_N = _confidence(logits_NK)
    outlier_N = np.zeros(len(index_N), dtype=np.bool_) if outlier_N is None else outlier_N
    confident_N = confidence_N >= config.threshold
    agrees_N, assignment_N = torch.ones_like(confident_N), torch.full_like(predicted_N, -1)
    if "clusters" in config.filters:
        votes_N = torch.where(confident_N & ~torch.from_numpy(outlier_N), predicted_N, -1)
        votes_N = torch.where(label_N >= 0, label_N, votes_N)
        weight_N = torch.where(label_N >= 0, config.label_weight, confidence_N)
        features = scaled_features(features_NF, share=share)
        class_N, assignment_N = _clusters(features, index_N, label_N, votes_N, weight_N, classes, config, seed)
        agrees_N = class_N == predicted_N
    why = np.full(len(index_N), KEPT, dtype="<U20")
    why[~agrees_N.numpy()] = DISAGREES
    if "confidence" in config.filters:  # written last: the first filter is the reason that is told
        why[~confident_N.numpy()] = UNSURE
    if config.filters == "none":
        why[:] = UNSURE
    refuted_N = ((label_N >= 0) & (label_N != predicted_N)).numpy()
    why[refuted_N] = REFUTED
    why[outlier_N] = OUTLIER
    label, confidence = predicted_N.numpy().astype(np.int64), confidence_N.numpy().astype(np.float32)
    kept_K = np.bincount(label[why == KEPT], minlength=classes)
    if config.quota is not None and kept_K.any():
        quota = int(np.median(kept_K[kept_K > 0])) if config.quota == "balanced" else config.quota
        within_N = _most_confident(label, confidence, index_N, why == KEPT, np.minimum(kept_K, quota), seed)
        why[(why == KEPT) & ~within_N] = QUOTA
    return TrustedSet(
        np.asarray(index_N, dtype=np.int64),
        label,
        confidence,
        assignment_N.numpy().astype(np.int64),
        why == KEPT,
        why,
        logits_NK.numpy().astype(np.float32, copy=False),
    )


def _confidence(logits_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Highest probability and its class, both [N]; probabilities of all images are never in memory at once."""
    highest = [torch.softmax(logits_CK.float(), dim=1).max(1) for logits_CK in torch.split(logits_NK, 65_536)]
    return torch.cat([values for values, _ in highest]), torch.cat([classes for _, classes in highest])


def _clusters(
    features: ScaledFeatures,
    index_N: npt.NDArray[np.int64],
    label_N: Tensor,
    votes_N: Tensor,
    weight_N: Tensor,
    classes: int,
    config: TrustConfig,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The class that the cluster of each image stands for [N] (-1 for none), and the cluster [N]."""
    clusters = config.clusters or classes
    if len(features) < clusters:
        raise RunError(
            f"{clusters} clusters were asked for (trust.clusters) of {len(features)} unlabeled images. "
            "Set fewer clusters, or trust.filters=confidence."
        )
    # In the order of the source, so that what is drawn by position is drawn for the image.
    start_JF = _start(features, label_N, np.argsort(index_N, kind="stable"), clusters, classes, seed)
    assignment_N, _ = dec.cluster(features, start_JF)
    return dec.map_clusters(assignment_N, votes_N, weight_N, clusters, classes)[assignment_N], assignment_N


def _start(
    features: ScaledFeatures, label_N: Tensor, order_N: npt.NDArray[np.int64], clusters: int, classes: int, seed: int
) -> Tensor:
    """Centroids [J, F] to start from: class means of labeled images, else k-means with 20 starts."""
    given_R = order_N[label_N.numpy()[order_N] >= 0]
    given_labels_R = label_N[torch.from_numpy(given_R)]
    if clusters == classes and len(torch.unique(given_labels_R)) == classes:
        given_RF = features.rows(given_R)
        return torch.stack([given_RF[given_labels_R == k].mean(0, dtype=torch.float64) for k in range(classes)])
    drawn_R = order_N
    if len(order_N) > _KMEANS_IMAGES:  # all 20 starts in memory, instead of 20 times many passes over the file
        draw = np.random.default_rng(seed)
        drawn_R = order_N[draw.choice(len(order_N), max(_KMEANS_IMAGES, clusters), replace=False)]
    if features.share.rank:  # k-means rounds as its threads come: the first process's are taken
        return features.share.total(torch.zeros(clusters, features.features_NF.shape[1]))
    return features.share.total(_kmeans(features.rows(drawn_R), clusters, seed))


def _kmeans(features_RF: Tensor, clusters: int, seed: int) -> Tensor:
    """Means [J, F] of the best of 20 starts. Changes `features_RF`, which is sklearn's price for not copying it."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Fewer distinct images than clusters: means coincide, and the clusters of the second ones stay empty.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(clusters, n_init=20, random_state=seed % 2**32, copy_x=False).fit(features_RF.numpy())
    return torch.from_numpy(found.cluster_centers_)


def _most_confident(
    label_N: npt.NDArray[np.int64],
    confidence_N: npt.NDArray[np.float32],
    index_N: npt.NDArray[np.int64],
    candidate_N: npt.NDArray[np.bool_],
    count_K: Sequence[int] | npt.NDArray[np.int64],
    seed: int,
) -> npt.NDArray[np.bool_]:
    """Mask [N] of the `count` most confident candidates of each class; equal confidence goes by a seeded order."""
    order_N = np.empty(len(index_N), dtype=np.int64)
    order_N[np.argsort(index_N, kind="stable")] = np.random.default_rng(seed).permutation(len(index_N))
    chosen_N = np.zeros(len(index_N), dtype=np.bool_)
    for k, count in enumerate(count_K):
        rows_R = np.flatnonzero(candidate_N & (label_N == k))
        chosen_N[rows_R[np.lexsort((order_N[rows_R], -confidence_N[rows_R]))[:count]]] = True
    return chosen_N


def confidence_only_like(trusted: TrustedSet, seed: int) -> TrustedSet:
    """The set that confidence alone would keep, with as many images of each predicted class as `trusted` keeps.

    The most confident of each class, equal confidence by a seeded order; outliers and images whose label differs stay
    out, so that the two sets differ by the clusters alone.
    """
    out_N = np.isin(trusted.why, (OUTLIER, REFUTED))
    count_K = np.bincount(trusted.label[trusted.kept], minlength=trusted.logits.shape[1])
    kept_N = _most_confident(trusted.label, trusted.confidence, trusted.index, ~out_N, count_K, seed)
    why = np.where(kept_N, KEPT, np.where(out_N, trusted.why, UNSURE)).astype("<U20")
    return replace(trusted, cluster=np.full_like(trusted.cluster, -1), kept=kept_N, why=why)


def compare_with_confidence(trusted: TrustedSet, truth_N: npt.NDArray[np.int64], seed: int) -> dict[str, Any]:
    """Precision of `confidence_only_like`, and how many images it keeps in place of others.

    Truth is for reporting only; -1 where unknown, and precision None where none is known.
    """
    alone = confidence_only_like(trusted, seed)
    return {
        "confidence_only_precision": alone.precision(truth_N, alone.kept),
        "images_exchanged": int((alone.kept & ~trusted.kept).sum()),
    }


def save_trusted(path: Path, trusted: TrustedSet) -> None:
    """Write trusted.npz, atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: getattr(trusted, name) for name in TrustedSet.__dataclass_fields__})
    write_bytes(path, buffer.getvalue())


def load_trusted(path: Path) -> TrustedSet:
    """Read trusted.npz; RunError where it is damaged."""
    try:
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            return TrustedSet(**{name: file[name] for name in TrustedSet.__dataclass_fields__})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(
            f"{path} cannot be read as a trusted set: {error}. Go on with --resume, which makes it anew."
        ) from error
