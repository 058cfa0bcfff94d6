"""Relational knowledge distillation (Park et al., CVPR 2019, arXiv 1904.05068). Pure functions.

N images, F features; student and teacher may have different F.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["rkd_angle", "rkd_distance"]

_TINY = 1e-12  # of a squared distance: the root has no gradient at 0


def rkd_distance(student_NF: Tensor, teacher_NF: Tensor) -> Tensor:
    """Smooth L1 between pairwise distances, each divided by its mean over pairs apart; averaged over N^2 (eq. 5)."""
    return functional.smooth_l1_loss(_relative_distances(student_NF), _relative_distances(teacher_NF).detach())


def rkd_angle(student_NF: Tensor, teacher_NF: Tensor) -> Tensor:
    """Smooth L1 between the cosines of the angles i-j-k of all triplets; averaged over N^3 (eq. 8).

    Memory grows with N^3, not with F: the cosines come from the Gram matrix.
    """
    return functional.smooth_l1_loss(_cosines(student_NF), _cosines(teacher_NF).detach())


def _gram(x_NF: Tensor) -> Tensor:
    """Inner products [N, N] about the mean: distances and angles do not change, and less is lost in differences."""
    centred_NF = x_NF - x_NF.mean(0)
    return centred_NF @ centred_NF.T


def _squared_distances(gram_NN: Tensor) -> Tensor:
    norm_N = gram_NN.diagonal()
    return (norm_N[:, None] + norm_N[None, :] - 2 * gram_NN).clamp(min=0)


def _relative_distances(x_NF: Tensor) -> Tensor:
    squared_NN = _squared_distances(_gram(x_NF))
    apart_NN = squared_NN > _TINY
    distance_NN = torch.where(apart_NN, squared_NN.clamp(min=_TINY).sqrt(), 0.0)
    return distance_NN / (distance_NN.sum() / apart_NN.sum().clamp(min=1)).clamp(min=_TINY)


def _cosines(x_NF: Tensor) -> Tensor:
    """cos of the angle at j between i and k, [j, i, k]; 0 where two of them are the same point."""
    gram_NN = _gram(x_NF)
    squared_NN = _squared_distances(gram_NN)
    inverse_NN = torch.where(squared_NN > _TINY, squared_NN.clamp(min=_TINY).rsqrt(), 0.0)
    # (x_i - x_j) . (x_k - x_j) = G_ik - G_ij - G_jk + G_jj
    products_JIK = gram_NN - gram_NN[:, :, None] - gram_NN[:, None, :] + gram_NN.diagonal()[:, None, None]
    return products_JIK * inverse_NN[:, :, None] * inverse_NN[:, None, :]
