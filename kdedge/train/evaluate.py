"""Logits and features of many images, in batches, in eval mode.

N images, B images of a batch, C channels, H and W pixels, F features, K classes.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdedge.data.views import normalize
from kdedge.errors import RunError
from kdedge.models.zoo import Network
from kdedge.train.engine import EnginePlan, prepare, using

__all__ = ["accuracy", "features", "predict", "predict_with_features"]

_BATCH = 256


@torch.no_grad()
def _outputs(
    network: Network, images_u8: Tensor, mean: Tensor, std: Tensor, plan: EnginePlan
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [B, K] and pooled features [B, F] of batch after batch, float32 on the CPU, in eval mode."""
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    try:
        with using(plan, device):
            for part in torch.split(images_u8, _BATCH):
                embedded = network.embed(prepare(normalize(part.to(device).float(), mean, std), plan))
                yield network.head(embedded).float().cpu(), embedded.float().cpu()
    finally:
        network.train(was_training)


def predict(network: Network, images_u8: Tensor, mean: Tensor, std: Tensor, plan: EnginePlan) -> Tensor:
    """Logits [N, K], float32 on the CPU, of uint8 images [N, C, H, W] without views."""
    logits = [logits_BK for logits_BK, _ in _outputs(network, images_u8, mean, std, plan)]
    return torch.cat([torch.zeros(0, network.head.out_features), *logits])


def features(network: Network, images_u8: Tensor, mean: Tensor, std: Tensor, plan: EnginePlan) -> Tensor:
    """Pooled features [N, F], float32 on the CPU: for the few labeled images."""
    return torch.cat([features_BF for _, features_BF in _outputs(network, images_u8, mean, std, plan)])


def predict_with_features(
    network: Network, images_u8: Tensor, mean: Tensor, std: Tensor, plan: EnginePlan, features_path: Path
) -> tuple[Tensor, np.memmap]:
    """Logits [N, K] as of `predict`, and pooled features [N, F] in float16, a read-only map of `features_path` (.npy).

    Features go to the file while they are made: logits are a few numbers an image, features a thousand. In float16
    a million images of 512 features are 1 GB; its rounding, 1 in 2,000, is far below the distance of two images.
    RunError where the file cannot be written.
    """
    shape = (len(images_u8), network.head.in_features)
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    logits = [torch.zeros(0, network.head.out_features)]
    try:
        features_path.parent.mkdir(parents=True, exist_ok=True)
        with features_path.open("wb") as file:  # not through a map: there a full disk ends the process
            np.lib.format.write_array_header_1_0(file, header)
            for logits_BK, features_BF in _outputs(network, images_u8, mean, std, plan):
                logits.append(logits_BK)
                file.write(features_BF.numpy().astype("<f2").tobytes())
    except OSError as error:
        raise RunError(
            f"Cannot write the features of {shape[0]} images to {features_path}: {error.strerror or error}. "
            f"They take {2 * shape[0] * shape[1] / 2**20:.0f} MiB there for a while. Free some space, and go on with "
            "--resume."
        ) from error
    return torch.cat(logits), np.lib.format.open_memmap(features_path, mode="r")


def accuracy(logits_NK: Tensor, labels_N: Tensor) -> float | None:
    """Share of images with a known label (not -1) whose highest logit is that label; None where none is known."""
    known = labels_N >= 0
    if not known.any():
        return None
    return float((logits_NK.argmax(1) == labels_N)[known].double().mean())
