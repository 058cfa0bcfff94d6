"""Losses between views of the same image. Pure functions.

B labeled images, U unlabeled images, K classes.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["masked_cross_entropy", "merge_targets", "pseudo_labels"]


def pseudo_labels(logits_UK: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Label [U] and mask [U] (1.0 where the highest probability reaches `threshold`); no gradient flows back.

    FixMatch, arXiv 2001.07685, eq. 4.
    """
    confidence_U, label_U = torch.softmax(logits_UK.detach().float(), dim=1).max(1)
    return label_U, (confidence_U >= threshold).float()


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
