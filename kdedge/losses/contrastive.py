"""Losses that pull two views of an image together and push all others away. Pure functions.

N images, D numbers of an embedding.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["nt_xent"]


def nt_xent(first_ND: Tensor, second_ND: Tensor, temperature: float) -> Tensor:
    """Mean over the 2 N views of -log exp(s_ij / T) / sum_{k != i} exp(s_ik / T); s is the cosine, j the other view.

    SimCLR, Chen et al., arXiv 2002.05709, eq. 1 and algorithm 1. Row n of both is a view of image n.
    """
    views_VD = functional.normalize(torch.cat([first_ND, second_ND]).float(), dim=1)
    count = len(views_VD)
    similarity_VV = views_VD @ views_VD.T / temperature
    similarity_VV = similarity_VV.masked_fill(torch.eye(count, dtype=torch.bool, device=views_VD.device), -torch.inf)
    other_V = torch.arange(count, device=views_VD.device).roll(count // 2)
    return functional.cross_entropy(similarity_VV, other_V)
