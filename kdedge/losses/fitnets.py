"""FitNets: hints from a middle layer (Romero et al., ICLR 2015, arXiv 1412.6550). Pure functions.

M images, C channels of the teacher's map, H and W pixels of a map.
"""

from torch import Tensor
from torch.nn import functional

__all__ = ["fitnets"]


def fitnets(student_MCHW: Tensor, teacher_MCHW: Tensor) -> Tensor:
    """Mean squared difference of the two maps (eq. 3), both pooled to the smaller side where they differ.

    The student's map has been through the regressor, which gives it the teacher's channels.
    """
    (height, width), (teacher_height, teacher_width) = student_MCHW.shape[2:], teacher_MCHW.shape[2:]
    size = (min(height, teacher_height), min(width, teacher_width))
    return functional.mse_loss(
        functional.adaptive_avg_pool2d(student_MCHW, size), functional.adaptive_avg_pool2d(teacher_MCHW.detach(), size)
    )
