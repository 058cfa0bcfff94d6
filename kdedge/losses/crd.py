"""Contrastive representation distillation (Tian et al., ICLR 2020, arXiv 1910.10699). Pure functions.

M images of a batch, N all images of the run, D numbers of an embedding, J negatives. Embeddings have length 1.
"""

import math

from torch import Tensor
from torch.nn import functional

__all__ = ["crd", "log_normalizer", "remember_"]


def crd(
    anchor_MD: Tensor,
    bank_ND: Tensor,
    position_M: Tensor,
    negative_J: Tensor,
    temperature: float,
    log_normalizer: Tensor,
) -> Tensor:
    """-(log h(own) + sum over negatives of log(1 - h(negative))), averaged over the M images (eq. 17 to 19).

    h = e / (e + J / N) with e = exp(anchor . bank / temperature) / normalizer is the chance that anchor and row belong
    to the same image. `bank` holds the other network's embeddings, without gradient; `position` is each image's own
    row. One draw of negatives serves the batch, so that they are one matrix product and not a gather of M J D numbers;
    an image that was drawn as its own negative does not count.
    """
    log_odds = math.log(len(negative_J) / len(bank_ND))
    own_M = (anchor_MD * bank_ND[position_M]).sum(1) / temperature - log_normalizer - log_odds
    other_MJ = anchor_MD @ bank_ND[negative_J].T / temperature - log_normalizer - log_odds
    other_loss_MJ = functional.softplus(other_MJ) * (position_M[:, None] != negative_J[None, :])
    return (functional.softplus(-own_M) + other_loss_MJ.sum(1)).mean()


def log_normalizer(anchor_MD: Tensor, bank_ND: Tensor, negative_J: Tensor, temperature: float) -> Tensor:
    """log(N mean exp(anchor . negative / temperature)): with it the N values of e sum to about 1.

    The authors' code estimates it once, from the first batch, and keeps it.
    """
    products_MJ = anchor_MD.detach() @ bank_ND[negative_J].T / temperature
    return products_MJ.logsumexp((0, 1)) - math.log(products_MJ.numel()) + math.log(len(bank_ND))


def remember_(bank_ND: Tensor, embedding_MD: Tensor, position_M: Tensor, momentum: float) -> None:
    """Change `bank` after a step: own rows become momentum * old + (1 - momentum) * new, of length 1.

    Of several views of one image the first one counts. In place: the bank has a row for each image of the run.
    """
    first_M = (position_M[:, None] == position_M[None, :]).byte().argmax(1)
    new_MD = momentum * bank_ND[position_M] + (1 - momentum) * embedding_MD.detach()[first_M]
    # Rows of the same place carry the same value, so that the order of writing, open on a GPU, does not matter.
    bank_ND.index_put_((position_M,), functional.normalize(new_MD))
