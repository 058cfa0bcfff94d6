"""How well features tell classes apart before any head is trained: by the classes of the nearest labeled images.

N images that are asked about, M labeled images of the bank, F features, K classes, k neighbours.
"""

import torch
from torch import Tensor
from torch.nn import functional

from kdedge.data.store import Store
from kdedge.models.zoo import Network
from kdedge.train.distributed import ALONE, Ranks
from kdedge.train.engine import EnginePlan
from kdedge.train.evaluate import features

__all__ = ["features_of_some", "knn_accuracy", "knn_scores"]

_SIMILARITIES = 2**22  # at once: 16 MiB, whatever the number of images
_READ = 2048  # images at once


def knn_scores(
    query_NF: Tensor,
    bank_MF: Tensor,
    bank_labels_M: Tensor,
    classes: int,
    *,
    neighbors: int = 200,
    temperature: float = 0.1,
    leave_out_itself: bool = False,
) -> Tensor:
    """[N, K]: of the `neighbors` nearest by cosine the sum over those of a class of exp((cosine - 1) / temperature).

    Wu et al., arXiv 1805.01978, section 3.4: 200 neighbours; 0.07 there. Where the bank has fewer images all of them
    vote. With `leave_out_itself` query n is image n of the bank and has no vote, nor has one image of each other class:
    if its own class alone had one less, features that tell nothing would be always wrong, and not right by chance.
    """
    query_NF, bank_MF = (functional.normalize(each.float(), dim=1) for each in (query_NF, bank_MF))
    count, place_M = min(neighbors, len(bank_MF)), _place_in_class(bank_labels_M)
    scores_NK = query_NF.new_zeros(len(query_NF), classes)
    if count < 1:
        return scores_NK
    size = max(1, _SIMILARITIES // len(bank_MF))
    for start in range(0, len(query_NF), size):
        cosine = query_NF[start : start + size] @ bank_MF.T
        if leave_out_itself:
            cosine[place_M[start : start + size, None] == place_M] = -torch.inf  # which is no vote
        nearest, place = cosine.topk(count, dim=1)
        scores_NK[start : start + size].scatter_add_(1, bank_labels_M[place], ((nearest - 1) / temperature).exp())
    return scores_NK


def _place_in_class(labels_M: Tensor) -> Tensor:
    """0 for the first image of its class, 1 for the second, ..."""
    order_M, place_M = labels_M.argsort(stable=True), torch.empty_like(labels_M)
    ordered_M = labels_M[order_M]
    counted_M = torch.arange(len(labels_M), device=labels_M.device)
    place_M[order_M] = counted_M - torch.searchsorted(ordered_M, ordered_M)  # the class begins where it is found first
    return place_M


def knn_accuracy(
    query_NF: Tensor,
    labels_N: Tensor,
    bank_MF: Tensor | None = None,
    bank_labels_M: Tensor | None = None,
    *,
    neighbors: int = 200,
    temperature: float = 0.1,
) -> float | None:
    """Share of the queries whose class the nearest images of the bank give; see `knn_scores`.

    Without a bank each query is held against all others but one of each class: leave-one-out, where there is no
    validation split. Images of unknown class (-1) are left out of both; None where no query or no bank is left, and
    without a bank where no class has two images.
    """
    alone = bank_MF is None or bank_labels_M is None
    if bank_MF is None or bank_labels_M is None:
        bank_MF, bank_labels_M = query_NF, labels_N
    known_N, known_M = labels_N >= 0, bank_labels_M >= 0
    query_NF, labels_N, bank_MF, bank_labels_M = (
        query_NF[known_N],
        labels_N[known_N],
        bank_MF[known_M],
        bank_labels_M[known_M],
    )
    if not len(labels_N) or not len(bank_labels_M) or (alone and int(labels_N.bincount().max()) < 2):
        return None
    classes = int(max(labels_N.max(), bank_labels_M.max())) + 1
    scores_NK = knn_scores(
        query_NF, bank_MF, bank_labels_M, classes, neighbors=neighbors, temperature=temperature, leave_out_itself=alone
    )
    return float((scores_NK.argmax(1) == labels_N).double().mean())


def features_of_some(
    network: Network,
    images: Store,
    places_N: Tensor,
    mean: Tensor,
    std: Tensor,
    plan: EnginePlan,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Pooled features [N, F], float32 on the CPU, of the images at `places`, which are read as it goes."""
    parts = [features(network, images.rows(part), mean, std, plan, ranks) for part in torch.split(places_N, _READ)]
    return torch.cat(parts)
