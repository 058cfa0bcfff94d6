"""Starting weights know features, not our classes: their new head is fitted before anything is fine-tuned.

From a random head, the first hundreds of steps of fine-tuning teach the head and, on the way, unlearn the features
(Kumar et al., ICLR 2022, arXiv 2202.10054: first a linear probe, then fine-tuning).

N labeled images, F features, K classes.
"""

import warnings

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdedge.models.zoo import Network
from kdedge.train.engine import EnginePlan
from kdedge.train.evaluate import features

__all__ = ["fit_head"]

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # sklearn's C; features have unit variance
_FOLDS = 5
_JUDGED_IMAGES = 2000  # enough to choose the strength by
_FALLBACK = 1e-2  # for one label a class, which leaves nothing to judge by


def fit_head(
    network: Network, images_u8: Tensor, labels_N: Tensor, mean: Tensor, std: Tensor, plan: EnginePlan
) -> None:
    """Set the head to the logistic regression on the features of the labeled images, without views, in eval mode.

    How strongly it is regularised is chosen by the log loss of cross validation, so that its confidence, which decides
    what becomes a pseudo label, means what it says. A class without labeled image keeps its fresh weights.
    """
    features_NF = features(network, images_u8, mean, std, plan).double().numpy()
    labels = labels_N.cpu().numpy()
    present = np.unique(labels)
    if len(present) < 2:
        return
    centre, scale = features_NF.mean(0), features_NF.std(0)
    scale = np.where(scale > 1e-6, scale, 1.0)
    weight_KF, bias_K = _fitted((features_NF - centre) / scale, labels)
    weight_KF = weight_KF / scale
    bias_K = bias_K - weight_KF @ centre
    with torch.no_grad():
        rows = torch.from_numpy(present).to(network.head.weight.device)
        network.head.weight[rows] = torch.from_numpy(weight_KF).to(network.head.weight)
        network.head.bias[rows] = torch.from_numpy(bias_K).to(network.head.bias)


def _fitted(
    scaled_NF: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Weights and biases of the classes that are there, in ascending order."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a start, which fine-tuning improves
        model = LogisticRegression(C=_strength(scaled_NF, labels), max_iter=200).fit(scaled_NF, labels)
    if len(model.classes_) == 2:  # sklearn keeps the difference of the two
        return np.concatenate([-model.coef_, model.coef_]) / 2, np.concatenate(
            [-model.intercept_, model.intercept_]
        ) / 2
    return model.coef_, model.intercept_


def _strength(scaled_NF: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    if len(labels) > _JUDGED_IMAGES:
        from sklearn.model_selection import train_test_split

        scaled_NF, _, labels, _ = train_test_split(
            scaled_NF, labels, train_size=_JUDGED_IMAGES, random_state=0, stratify=_or_none(labels)
        )
    folds = min(_FOLDS, int(np.unique(labels, return_counts=True)[1].min()))
    if folds < 2:
        return _FALLBACK
    parts = StratifiedKFold(folds)  # not shuffled: the same labels give the same head
    scores = [
        cross_val_score(LogisticRegression(C=c, max_iter=200), scaled_NF, labels, cv=parts, scoring="neg_log_loss")
        for c in _STRENGTHS
    ]
    return _STRENGTHS[int(np.argmax([score.mean() for score in scores]))]


def _or_none(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    """What to draw evenly by; nothing where a class has one image, which cannot be parted."""
    return labels if np.unique(labels, return_counts=True)[1].min() > 1 else None
