"""Distillation from a stronger teacher (Huang et al., NeurIPS 2022, arXiv 2205.10536). Pure functions.

N images, K classes.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["dist"]


def dist(student_logits_NK: Tensor, teacher_logits_NK: Tensor, temperature: float, beta: float, gamma: float) -> Tensor:
    """T^2 (beta mean_N (1 - Pearson of rows) + gamma mean_K (1 - Pearson of columns)) of softmax(logits / T).

    Eq. 8 to 11; the T^2 is the authors' code's. A row or column of the student that is a positive affine transform of
    the teacher's costs nothing: only the order and the spacing of the classes, and of the images, are taught.
    """
    student_NK = torch.softmax(student_logits_NK / temperature, dim=1)
    teacher_NK = torch.softmax(teacher_logits_NK / temperature, dim=1)
    inter = (1 - _pearson(student_NK, teacher_NK)).mean()
    intra = (1 - _pearson(student_NK.T, teacher_NK.T)).mean()
    return (beta * inter + gamma * intra) * temperature**2


def _pearson(a_RC: Tensor, b_RC: Tensor) -> Tensor:
    """Correlation of each row of `a` with that of `b` [R]; 0, and no gradient, where a row is constant."""
    centred_a_RC, centred_b_RC = a_RC - a_RC.mean(1, keepdim=True), b_RC - b_RC.mean(1, keepdim=True)
    # normalize divides by at least eps: a column that no image of the batch is given to has a norm near 0
    return (functional.normalize(centred_a_RC, eps=1e-8) * functional.normalize(centred_b_RC, eps=1e-8)).sum(1)
