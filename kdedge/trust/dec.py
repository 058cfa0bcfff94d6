"""Deep embedded clustering (Xie, Girshick, Farhadi, ICML 2016, arXiv 1511.06335) on the outer network's features.

The encoder is the outer network, already trained, so only the centroids are refined.

N images, C images of a chunk, F features, J clusters, K classes.
"""

import numpy as np
import torch
from torch import Tensor

from kdedge.trust.stream import ScaledFeatures

__all__ = ["cluster", "kl_loss", "map_clusters", "soft_assignment", "target_distribution"]


def soft_assignment(features_NF: Tensor, centroids_JF: Tensor) -> Tensor:
    """q_ij proportional to 1 / (1 + |z_i - m_j|^2), rows [N, J] sum to 1 (eq. 1 with alpha = 1)."""
    # Not torch.cdist(...)^2: the root has no gradient where a centroid sits on an image.
    squared_NJ = (
        features_NF.pow(2).sum(1, keepdim=True) - 2 * features_NF @ centroids_JF.T + centroids_JF.pow(2).sum(1)
    ).clamp(min=0)
    q_NJ = 1 / (1 + squared_NJ)
    return q_NJ / q_NJ.sum(1, keepdim=True)


def target_distribution(q_NJ: Tensor, mass_J: Tensor | None = None) -> Tensor:
    """p_ij proportional to q_ij^2 / f_j with f_j = sum_i q_ij, rows sum to 1 (eq. 3).

    Sharper than q, and fair to small clusters. `mass_J` is f over all images where q holds only some of them.
    """
    mass_J = q_NJ.sum(0) if mass_J is None else mass_J
    weight_NJ = q_NJ.pow(2) / mass_J.clamp(min=1e-12)
    return weight_NJ / weight_NJ.sum(1, keepdim=True)


def kl_loss(p_NJ: Tensor, q_NJ: Tensor) -> Tensor:
    """KL(P || Q) averaged over images (eq. 2); 0 log 0 counts 0."""
    return (torch.xlogy(p_NJ, p_NJ) - torch.xlogy(p_NJ, q_NJ.clamp(min=1e-12))).sum(1).mean()


def cluster(
    features: ScaledFeatures,
    start_JF: Tensor,
    *,
    updates: int = 20,
    steps_an_update: int = 5,
    tolerance: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Refine centroids by KL(P || Q) and return (assignment [N], centroids [J, F] in float64).

    P is held for `steps_an_update` steps over all images, then computed anew; stops where less than `tolerance` of
    the images change cluster between updates (section 3.3 of the paper). Processes that share the features all return
    the whole.
    """
    centroids_JF = start_JF.double().clone().requires_grad_(True)
    # The gradient of a mean over all images: a centroid's own are one in J of them, so the rate can be high. Five such
    # steps go as far as twenty at 0.1, with a quarter of the passes over a file.
    optimizer = torch.optim.SGD([centroids_JF], lr=0.5, momentum=0.9)
    assignment_N, mass_J = _assign(features, centroids_JF)
    for _ in range(updates):
        held_JF = centroids_JF.detach().clone()
        for _ in range(steps_an_update):
            _set_gradient(features, centroids_JF, held_JF, mass_J)
            optimizer.step()
        now_N, mass_J = _assign(features, centroids_JF)
        changed = float((now_N != assignment_N).double().mean())
        assignment_N = now_N
        if changed < tolerance:
            break
    return assignment_N, centroids_JF.detach()


@torch.no_grad()
def _assign(features: ScaledFeatures, centroids_JF: Tensor) -> tuple[Tensor, Tensor]:
    """The cluster of each image [N], and f_j = sum_i q_ij [J] in float64."""
    assignment_N = torch.zeros(len(features), dtype=torch.int64)  # of the images of other processes too
    mass_J = torch.zeros(len(centroids_JF), dtype=torch.float64)
    for part, features_CF in features.chunks():
        q_CJ = soft_assignment(features_CF, centroids_JF.float())
        assignment_N[part] = q_CJ.argmax(1)
        mass_J += q_CJ.sum(0, dtype=torch.float64)
    return features.share.total(assignment_N), features.share.total(mass_J)


def _set_gradient(features: ScaledFeatures, centroids_JF: Tensor, held_JF: Tensor, mass_J: Tensor) -> None:
    """Give `centroids_JF` the gradient of KL(P || Q) over all images, where P is that of the held centroids.

    P is computed again instead of kept: a row of P takes memory, a product of matrices takes little time.
    """
    centroids_JF.grad = torch.zeros_like(centroids_JF)
    for _, features_CF in features.chunks():
        with torch.no_grad():
            p_CJ = target_distribution(soft_assignment(features_CF, held_JF.float()), mass_J.float())
        loss = kl_loss(p_CJ, soft_assignment(features_CF, centroids_JF.float()))
        # The leaf is float64, so chunks are summed in float64.
        (loss * (len(features_CF) / len(features))).backward()  # type: ignore[no-untyped-call]
    centroids_JF.grad = features.share.total(centroids_JF.grad)


def map_clusters(assignment_N: Tensor, label_N: Tensor, weight_N: Tensor, clusters: int, classes: int) -> Tensor:
    """The class of each cluster [J] from weighted votes; `label` of -1 does not vote.

    One to one by the Hungarian method where there are as many clusters as classes, else by majority. A cluster
    without any vote gets class -1 under majority and agrees with nobody.
    """
    votes_JK = np.zeros((clusters, classes))
    voting = label_N >= 0
    np.add.at(votes_JK, (assignment_N[voting].numpy(), label_N[voting].numpy()), weight_N[voting].double().numpy())
    if clusters == classes:
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(votes_JK, maximize=True)
        mapping = np.empty(clusters, dtype=np.int64)
        mapping[rows] = columns
    else:
        mapping = np.where(votes_JK.sum(1) > 0, votes_JK.argmax(1), -1)
    return torch.from_numpy(mapping)
