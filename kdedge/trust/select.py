"""The trusted set: unlabeled images whose pseudo label the inner network may believe (KD-FixMatch, stage 2).

An image is kept when the outer network is confident of its label *and* the cluster of its features stands for the
same class. Both filters are from the paper's abstract; how they are carried out is our reconstruction.

N unlabeled images, F features, J clusters, K classes.
"""

import io
import zipfile
from dataclasses import dataclass
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

__all__ = ["TrustConfig", "TrustedSet", "load_trusted", "save_trusted", "select_trusted"]

KEPT, UNSURE, DISAGREES, QUOTA = "kept", "low confidence", "cluster disagrees", "quota"


class TrustConfig(Config):
    """Which pseudo labels are trusted."""

    filters: Literal["none", "confidence", "clusters", "confidence+clusters"] = "confidence+clusters"
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.95
    clusters: Annotated[int, Field(gt=1)] | None = None  # null: as many as classes
    quota: Annotated[int, Field(gt=0)] | None = (
        None  # at most so many a class, the most confident first; null: no limit
    )
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

    def summary(self, truth_N: npt.NDArray[np.int64], classes: int) -> dict[str, Any]:
        """Size, coverage, counts; precision after each filter where the truth is known (for reporting only)."""
        confident = self.why != UNSURE

        def precision(mask: npt.NDArray[np.bool_]) -> float | None:
            known = mask & (truth_N >= 0)
            return float((self.label == truth_N)[known].mean()) if known.any() else None

        return {
            "size": int(self.kept.sum()),
            "coverage": float(self.kept.mean()) if len(self.kept) else 0.0,
            "precision": precision(self.kept),
            "precision_before_filters": precision(np.ones_like(self.kept)),
            "precision_after_confidence": precision(confident),
            "per_class": np.bincount(self.label[self.kept], minlength=classes).tolist(),
            "why": {str(reason): int((self.why == reason).sum()) for reason in np.unique(self.why)},
        }


def select_trusted(
    logits_NK: Tensor,
    features_NF: Tensor,
    index_N: npt.NDArray[np.int64],
    label_N: Tensor,
    config: TrustConfig,
) -> TrustedSet:
    """Filter the unlabeled images. `label` is the given label of those that are also labeled, else -1.

    Logits and features are the outer network's in eval mode on images without views.
    """
    classes = logits_NK.shape[1]
    confidence_N, predicted_N = torch.softmax(logits_NK.float(), dim=1).max(1)
    confident_N = confidence_N >= config.threshold
    agrees_N, assignment_N = _clusters_agree(
        features_NF, predicted_N, confidence_N, confident_N, label_N, classes, config
    )
    why = np.full(len(index_N), KEPT, dtype="<U20")
    if "clusters" in config.filters:
        why[~agrees_N.numpy()] = DISAGREES
    if "confidence" in config.filters:  # written last: the first filter is the reason that is told
        why[~confident_N.numpy()] = UNSURE
    if config.filters == "none":
        why[:] = UNSURE
    if config.quota is not None:
        _cap(why, predicted_N.numpy(), confidence_N.numpy(), config.quota)
    return TrustedSet(
        np.asarray(index_N, dtype=np.int64),
        predicted_N.numpy().astype(np.int64),
        confidence_N.numpy().astype(np.float32),
        assignment_N.numpy().astype(np.int64),
        why == KEPT,
        why,
        logits_NK.numpy().astype(np.float32),
    )


def _clusters_agree(
    features_NF: Tensor,
    predicted_N: Tensor,
    confidence_N: Tensor,
    confident_N: Tensor,
    label_N: Tensor,
    classes: int,
    config: TrustConfig,
) -> tuple[Tensor, Tensor]:
    """Mask [N] of images whose cluster stands for their predicted class, and the cluster of each [N]."""
    if "clusters" not in config.filters:
        return torch.ones_like(confident_N), torch.full_like(predicted_N, -1)
    clusters = config.clusters or classes
    scaled_NF = dec.scaled_features(features_NF)
    start_JF = _start(scaled_NF, label_N, predicted_N, confident_N, clusters, classes)
    assignment_N, _ = dec.cluster(scaled_NF, start_JF)
    votes_N = torch.where(label_N >= 0, label_N, torch.where(confident_N, predicted_N, -1))
    weight_N = torch.where(label_N >= 0, config.label_weight, confidence_N)
    mapping_J = dec.map_clusters(assignment_N, votes_N, weight_N, clusters, classes)
    return mapping_J[assignment_N] == predicted_N, assignment_N


def _start(
    scaled_NF: Tensor, label_N: Tensor, predicted_N: Tensor, confident_N: Tensor, clusters: int, classes: int
) -> Tensor:
    """Centroids [J, F] to start from: class means of labeled images, else k-means with 20 starts."""
    present = torch.bincount(label_N[label_N >= 0], minlength=classes) > 0
    if clusters == classes and bool(present.all()):
        return torch.stack([scaled_NF[label_N == k].mean(0) for k in range(classes)])
    from sklearn.cluster import KMeans

    if len(scaled_NF) < clusters:
        raise RunError(
            f"{clusters} clusters were asked for (trust.clusters) of {len(scaled_NF)} unlabeled images. "
            "Set fewer clusters, or trust.filters=confidence."
        )
    means = KMeans(clusters, n_init=20, random_state=0).fit(scaled_NF.numpy()).cluster_centers_
    return torch.from_numpy(means).to(scaled_NF.dtype)


def _cap(why: npt.NDArray[np.str_], label: npt.NDArray[Any], confidence: npt.NDArray[Any], quota: int) -> None:
    for k in np.unique(label):
        rows = np.flatnonzero((label == k) & (why == KEPT))
        why[rows[np.argsort(-confidence[rows], kind="stable")[quota:]]] = QUOTA


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
