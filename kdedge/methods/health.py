"""How healthy pseudo labels are.

U unlabeled images of a batch, K classes.
"""

import torch
from torch import Tensor

__all__ = ["pseudo_label_logs"]


def pseudo_label_logs(label_U: Tensor, weight_U: Tensor, truth_U: Tensor, classes: int) -> dict[str, Tensor]:
    """Kept share, histogram [K] of kept labels and, where the truth of some kept image is known, their accuracy."""
    histogram = torch.zeros(classes, device=label_U.device).scatter_add_(0, label_U, weight_U)
    known = weight_U * (truth_U >= 0)
    right = (known * (label_U == truth_U)).sum()
    return {
        "kept_fraction": weight_U.mean(),
        "pseudo_label_histogram": histogram / weight_U.sum().clamp(min=1),
        "pseudo_label_accuracy": right / known.sum(),  # NaN, logged as null, where nothing kept has a known truth
    }
