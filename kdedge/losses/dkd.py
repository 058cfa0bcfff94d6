"""Decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv 2203.08679). Pure functions.

N images, K classes.
"""

import torch
from torch import Tensor

__all__ = ["dkd", "non_target_kd", "target_kd"]


def dkd(
    student_logits_NK: Tensor,
    teacher_logits_NK: Tensor,
    target_N: Tensor,
    temperature: float,
    alpha: float,
    beta: float,
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD), averaged over images (eq. 7).

    With alpha = 1 and beta = 1 - p_target of the teacher it is KD, image by image (eq. 6).
    """
    student_NK, teacher_NK = student_logits_NK / temperature, teacher_logits_NK / temperature
    target_N_loss = target_kd(student_NK, teacher_NK, target_N)
    others_N_loss = non_target_kd(student_NK, teacher_NK, target_N)
    return (alpha * target_N_loss + beta * others_N_loss).mean() * temperature**2


def target_kd(student_logits_NK: Tensor, teacher_logits_NK: Tensor, target_N: Tensor) -> Tensor:
    """TCKD [N]: KL between the two-way distributions (target class, all others together)."""
    teacher_N2, student_N2 = _target_or_not(teacher_logits_NK, target_N), _target_or_not(student_logits_NK, target_N)
    return (teacher_N2.exp() * (teacher_N2 - student_N2)).sum(1)


def non_target_kd(student_logits_NK: Tensor, teacher_logits_NK: Tensor, target_N: Tensor) -> Tensor:
    """NCKD [N]: KL between the distributions over the classes that are not the target, each made to sum to 1."""
    teacher_NK = torch.log_softmax(_without(teacher_logits_NK, target_N), dim=1)
    student_NK = torch.log_softmax(_without(student_logits_NK, target_N), dim=1)
    # The target counts exactly 0: its probability is 0, and what it is multiplied with is finite.
    return (teacher_NK.exp() * (teacher_NK - student_NK)).sum(1)


def _without(logits_NK: Tensor, target_N: Tensor) -> Tensor:
    """The logits, that of the target so low that its probability is 0, and finite: -inf would make 0 * inf."""
    return logits_NK.scatter(1, target_N.unsqueeze(1), -1e30)


def _target_or_not(logits_NK: Tensor, target_N: Tensor) -> Tensor:
    """log p(target), log p(any other) [N, 2]; the second from a sum over the others, which 1 - p would lose near 1."""
    total_N = logits_NK.logsumexp(1)
    target_logit_N = logits_NK.gather(1, target_N.unsqueeze(1)).squeeze(1)
    return torch.stack([target_logit_N - total_N, _without(logits_NK, target_N).logsumexp(1) - total_N], dim=1)
