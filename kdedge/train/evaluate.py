"""Logits and features of many images, in batches, in eval mode.

N images, B images of a batch, C channels, H and W pixels, F features, K classes.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdedge.data.store import Resident, Store
from kdedge.data.views import normalize
from kdedge.errors import RunError
from kdedge.models.zoo import Network
from kdedge.train.distributed import ALONE, Ranks
from kdedge.train.engine import EnginePlan, prepare, using

__all__ = ["accuracy", "features", "predict", "predict_with_features"]

_BATCH = 256


@torch.no_grad()
def _outputs(
    network: Network, images: Store, mean: Tensor, std: Tensor, plan: EnginePlan, ranks: Ranks
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [B, K] and pooled features [B, F] of batch after batch, float32 on the CPU, in eval mode.

    Batches are dealt to the ranks, and those of one round come together, to all: the same numbers as of one process.
    """
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    try:
        with using(plan, device):
            for part, counts in _dealt(images, ranks):
                embedded = network.embed(prepare(normalize(part.to(device).float(), mean, std), plan))
                found = [each[: counts[ranks.rank]] for each in (network.head(embedded).float(), embedded.float())]
                logits_BK, features_BF = (ranks.gather_rows(each, counts).cpu() for each in found)
                yield logits_BK, features_BF
    finally:
        network.train(was_training)


def _dealt(images: Store, ranks: Ranks) -> Iterator[tuple[Tensor, list[int]]]:
    """Of each round of batches this rank's images, and how many of them count in each rank.

    Where the last round is short, the ranks without a batch get an image that does not count: not every network takes
    none at all.
    """
    rounds = torch.split(torch.arange(len(images)), _BATCH * ranks.world) if len(images) else ()
    parts = [torch.split(each, _BATCH) for each in rounds]
    mine = [each[ranks.rank] if ranks.rank < len(each) else each[0][:1] for each in parts]
    for number, each in enumerate(parts):
        if number + 1 < len(mine):
            images.expect(mine[number + 1])
        counts = [len(part) for part in each] + [0] * (ranks.world - len(each))
        yield images.rows(mine[number]), counts


def predict(
    network: Network, images: Tensor | Store, mean: Tensor, std: Tensor, plan: EnginePlan, ranks: Ranks = ALONE
) -> Tensor:
    """Logits [N, K], float32 on the CPU, of uint8 images [N, C, H, W] without views."""
    logits = [logits_BK for logits_BK, _ in _outputs(network, _stored(images), mean, std, plan, ranks)]
    return torch.cat([torch.zeros(0, network.head.out_features), *logits])


def features(
    network: Network, images: Tensor | Store, mean: Tensor, std: Tensor, plan: EnginePlan, ranks: Ranks = ALONE
) -> Tensor:
    """Pooled features [N, F], float32 on the CPU: for the few labeled images."""
    return torch.cat([found_BF for _, found_BF in _outputs(network, _stored(images), mean, std, plan, ranks)])


def predict_with_features(
    network: Network,
    images: Tensor | Store,
    mean: Tensor,
    std: Tensor,
    plan: EnginePlan,
    features_path: Path,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, np.memmap]:
    """Logits [N, K] as of `predict`, and pooled features [N, F] in float16, a read-only map of `features_path` (.npy).

    Features go to the file while they are made: logits are a few numbers an image, features a thousand. In float16
    a million images of 512 features are 1 GB; its rounding, 1 in 2,000, is far below the distance of two images.
    The first rank writes, and all map its file. RunError where the file cannot be written.
    """
    store = _stored(images)
    shape = (len(store), network.head.in_features)
    logits = [torch.zeros(0, network.head.out_features)]
    found = _outputs(network, store, mean, std, plan, ranks)
    if ranks.is_first:
        logits += _written(found, features_path, shape)
    else:
        logits += [logits_BK for logits_BK, _ in found]
    ranks.barrier()
    stored = np.lib.format.open_memmap(features_path, mode="r")
    ranks.barrier()  # all have it open: from here on it may be removed
    return torch.cat(logits), stored


def _written(found: Iterator[tuple[Tensor, Tensor]], features_path: Path, shape: tuple[int, int]) -> list[Tensor]:
    """The logits of all batches, the features being in the file by then."""
    header, logits = {"descr": "<f2", "fortran_order": False, "shape": shape}, []
    try:
        features_path.parent.mkdir(parents=True, exist_ok=True)
        with features_path.open("wb") as file:  # not through a map: there a full disk ends the process
            np.lib.format.write_array_header_1_0(file, header)
            for logits_BK, features_BF in found:
                logits.append(logits_BK)
                file.write(features_BF.numpy().astype("<f2").tobytes())
    except OSError as error:
        raise RunError(
            f"Cannot write the features of {shape[0]} images to {features_path}: {error.strerror or error}. "
            f"They take {2 * shape[0] * shape[1] / 2**20:.0f} MiB there for a while. Free some space, and go on with "
            "--resume."
        ) from error
    return logits


def _stored(images: Tensor | Store) -> Store:
    return Resident(images) if isinstance(images, Tensor) else images


def accuracy(logits_NK: Tensor, labels_N: Tensor) -> float | None:
    """Share of images with a known label (not -1) whose highest logit is that label; None where none is known."""
    known = labels_N >= 0
    if not known.any():
        return None
    return float((logits_NK.argmax(1) == labels_N)[known].double().mean())
