"""Knowledge distillation. Pure functions.

N images, K classes.
"""

import torch
from torch import Tensor

__all__ = ["kd"]


def kd(student_logits_NK: Tensor, teacher_logits_NK: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), averaged over images (Hinton et al., arXiv 1503.02531).

    T^2 keeps the size of the gradient when T changes. Zero, gradient too, where both agree up to a constant.
    """
    student = torch.log_softmax(student_logits_NK / temperature, dim=1)
    teacher = torch.log_softmax(teacher_logits_NK / temperature, dim=1)
    return (teacher.exp() * (teacher - student)).sum(1).mean() * temperature**2
