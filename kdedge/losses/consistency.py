"""Losses between views of the same image. Pure functions.

B labeled images, U unlabeled images, K classes.
"""

import torch
from torch import Tensor
from torch.nn import functional

from kdedge.errors import BugError

__all__ = ["adjustment", "fairness", "labeled_cross_entropy", "log_prior", "masked_cross_entropy", "merge_targets"]

_EMPTY = 1e-6  # a class predicted less often than this is one that is not predicted


def merge_targets(
    own_label_U: Tensor, own_mask_U: Tensor, trusted_label_U: Tensor, *, outer_first: bool = False
) -> tuple[Tensor, Tensor]:
    """The inner network's target [U] and weight [U].

    Heuristic 1 of KD-FixMatch: the network's own label where it is confident, else the trusted label where there is
    one (`trusted_label` of -1 means none), else weight 0. With `outer_first` the trusted label wins.
    """
    trusted = trusted_label_U >= 0
    use_trusted = trusted if outer_first else trusted & (own_mask_U == 0)
    target_U = torch.where(use_trusted, trusted_label_U, own_label_U)
    return target_U, torch.where(use_trusted, torch.ones_like(own_mask_U), own_mask_U)


def masked_cross_entropy(logits_UK: Tensor, target_U: Tensor, weight_U: Tensor) -> Tensor:
    """(1 / U) sum_u weight_u H(target_u, logits_u): divided by all U images, not by those selected.

    FixMatch, arXiv 2001.07685, eq. 4: half the mask is half the loss.
    """
    return (functional.cross_entropy(logits_UK, target_U, reduction="none") * weight_U).mean()


def log_prior(labels_N: Tensor, classes: int) -> Tensor:
    """Log of each class's share [K] of the labels; a class without any counts as one image."""
    counts_K = torch.bincount(labels_N, minlength=classes).clamp(min=1)
    return torch.log(counts_K / counts_K.sum())


def adjustment(strength: float, log_prior_K: Tensor | None) -> Tensor | None:
    """The prior as `labeled_cross_entropy` takes it: `strength` times `log_prior` [K], or None without adjustment."""
    if not strength:
        return None
    if log_prior_K is None:
        raise BugError(f"logit_adjustment is {strength}, but the labels' log prior was not given")
    return strength * log_prior_K


def labeled_cross_entropy(logits_BK: Tensor, labels_B: Tensor, log_prior_K: Tensor | None = None) -> Tensor:
    """mean_B H(y, logits + log_prior): with a prior, logits learn what they would from evenly many labels of a class.

    Logit adjustment for long-tailed labels, Menon et al., arXiv 2007.07314; the prior is already scaled.
    """
    return functional.cross_entropy(logits_BK if log_prior_K is None else logits_BK + log_prior_K, labels_B)


def fairness(strong_UK: Tensor, weight_U: Tensor, mean_K: Tensor, share_K: Tensor) -> Tensor:
    """sum_k P_k log Q_k, the negative cross entropy of two normalised ratios, to be descended (arXiv 2205.07246).

    P is from `mean` probability over `share` of predictions in the run so far, Q from the kept strong views of this
    step; the gradient goes through the mean probability of Q alone. The ratio is high where a class is predicted
    seldom for the probability it gets. Descending makes Q larger where it is above P, so a class that strong views
    name less often than the run so far gains probability. A class that no kept strong view names contributes 0.
    """
    probs_UK = torch.softmax(strong_UK.float(), dim=1)
    kept = weight_U.sum().clamp(min=1e-12)
    now_K = torch.zeros_like(mean_K).scatter_add_(0, probs_UK.argmax(1), weight_U) / kept
    ratio_K = _normalized_ratio((probs_UK * weight_U.unsqueeze(1)).sum(0) / kept, now_K)
    return (_normalized_ratio(mean_K, share_K) * torch.where(now_K > _EMPTY, ratio_K, 1.0).log()).sum()


def _normalized_ratio(mean_K: Tensor, share_K: Tensor) -> Tensor:
    present_K = share_K > _EMPTY
    ratio_K = torch.where(present_K, mean_K / torch.where(present_K, share_K, 1.0), 0.0)
    return ratio_K / ratio_K.sum().clamp(min=1e-12)
