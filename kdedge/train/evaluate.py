"""Logits and features of many images, in batches, in eval mode.

N images, C channels, H and W pixels, F features, K classes.
"""

import torch
from torch import Tensor

from kdedge.data.views import normalize
from kdedge.models.zoo import Network
from kdedge.train.engine import EnginePlan, prepare, using

__all__ = ["accuracy", "predict", "predict_with_features"]

_BATCH = 256


@torch.no_grad()
def predict_with_features(
    network: Network, images_u8: Tensor, mean: Tensor, std: Tensor, plan: EnginePlan
) -> tuple[Tensor, Tensor]:
    """Logits [N, K] and pooled features [N, F], float32 on the CPU, of uint8 images [N, C, H, W] without views."""
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    logits, features = [], []
    with using(plan, device):
        for part in torch.split(images_u8, _BATCH):
            embedded = network.embed(prepare(normalize(part.to(device).float(), mean, std), plan))
            features.append(embedded.float().cpu())
            logits.append(network.head(embedded).float().cpu())
    network.train(was_training)
    if not logits:
        return torch.zeros(0, network.head.out_features), torch.zeros(0, network.head.in_features)
    return torch.cat(logits), torch.cat(features)


def predict(network: Network, images_u8: Tensor, mean: Tensor, std: Tensor, plan: EnginePlan) -> Tensor:
    """Logits [N, K] of uint8 images [N, C, H, W]."""
    return predict_with_features(network, images_u8, mean, std, plan)[0]


def accuracy(logits_NK: Tensor, labels_N: Tensor) -> float | None:
    """Share of images with a known label (not -1) whose highest logit is that label; None where none is known."""
    known = labels_N >= 0
    if not known.any():
        return None
    return float((logits_NK.argmax(1) == labels_N)[known].double().mean())
