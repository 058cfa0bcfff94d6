"""Losses that forgive wrong labels. Pure functions.

U images, K classes.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["masked_symmetric_cross_entropy", "reverse_cross_entropy"]

_LOG_ZERO = math.log(1e-4)  # HanxunH/SCELoss-Reproduce clamps the one-hot target here


def reverse_cross_entropy(logits_UK: Tensor, target_U: Tensor) -> Tensor:
    """-sum_k p_k log y_k [U] for one-hot y with log 0 cut to log 1e-4: 9.21 (1 - p_target).

    Wang et al., ICCV 2019, arXiv 1908.06112, eq. 5.
    """
    probs_UK = torch.softmax(logits_UK, dim=1).clamp(min=1e-7)
    others_U = probs_UK.sum(1) - probs_UK.gather(1, target_U.unsqueeze(1)).squeeze(1)
    return -_LOG_ZERO * others_U


def masked_symmetric_cross_entropy(
    logits_UK: Tensor, target_U: Tensor, weight_U: Tensor, alpha: float, beta: float
) -> Tensor:
    """(1 / U) sum_u weight_u (alpha CE_u + beta RCE_u). arXiv 1908.06112, eq. 7."""
    forward_U = functional.cross_entropy(logits_UK, target_U, reduction="none")
    return ((alpha * forward_U + beta * reverse_cross_entropy(logits_UK, target_U)) * weight_U).mean()
