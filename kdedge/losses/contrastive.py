"""Losses that pull two views of an image together and push all others away. Pure functions.

N images, V = 2 N views, D numbers of an embedding, Q remembered embeddings, C views of a chunk.
"""

from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["Contrast", "nt_xent", "nt_xent_in_chunks"]


def nt_xent(first_ND: Tensor, second_ND: Tensor, temperature: float, queue_QD: Tensor | None = None) -> Tensor:
    """Mean over the 2 N views of -log exp(s_ij / T) / sum_{k != i} exp(s_ik / T); s is the cosine, j the other view.

    SimCLR, Chen et al., arXiv 2002.05709, eq. 1 and algorithm 1. Row n of both is a view of image n. `queue` holds
    embeddings of other images, of length 1, which take part in the sum and get no gradient.

    Alike embeddings give log(2 N - 1 + Q) whatever the temperature; of one image and no queue the loss is 0.
    """
    views_VD, other_V = _views(first_ND, second_ND)
    similarity_VV = views_VD @ views_VD.T / temperature
    itself_VV = torch.eye(len(views_VD), dtype=torch.bool, device=views_VD.device)
    logits = similarity_VV.masked_fill(itself_VV, -torch.inf)
    if queue_QD is not None:
        logits = torch.cat([logits, views_VD @ queue_QD.detach().to(views_VD).T / temperature], dim=1)
    return functional.cross_entropy(logits, other_V)


class Contrast(NamedTuple):
    """The loss, and the share of views whose other view is nearer than every other embedding; without gradient."""

    loss: Tensor
    accuracy: Tensor


def nt_xent_in_chunks(
    first_ND: Tensor, second_ND: Tensor, temperature: float, queue_QD: Tensor | None = None, chunk: int = 1024
) -> Contrast:
    """`nt_xent`, `chunk` views at a time: its similarities are made twice and never kept.

    Memory grows with chunk (V + Q) and not with V (V + Q): forwards and backwards with 4,096 images of 128 numbers take
    124 MiB, and the plain form 845, in as much time. Computed in float32 at least, under autocast too: a bf16 cosine
    has two digits, and the temperature multiplies what is wrong with them. Its gradient cannot be differentiated again.
    """
    with torch.autocast(first_ND.device.type, enabled=False):
        views_VD, other_V = _views(first_ND, second_ND)
        queue_QD = views_VD[:0].detach() if queue_QD is None else queue_QD.detach().to(views_VD)
        loss, accuracy = _InChunks.apply(views_VD, other_V, queue_QD, temperature, chunk)
    return Contrast(loss, accuracy)


def _views(first_ND: Tensor, second_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings [V, D] of length 1, float32 at least, and which of them is the other view of each."""
    views_VD = torch.cat([first_ND, second_ND])
    views_VD = functional.normalize(views_VD.to(torch.promote_types(views_VD.dtype, torch.float32)), dim=1)
    return views_VD, torch.arange(len(views_VD), device=views_VD.device).roll(len(first_ND))


@final
class _InChunks(torch.autograd.Function):
    """Of a view i, loss_i = log sum_{k != i} exp(s_ik / T) - s_ij / T, and d loss_i / d (s_ik / T) = p_ik - [k = j].

    s is a product, so a chunk's gradient goes two ways: to its own rows, and to the rows it was compared with.
    """

    @staticmethod
    def forward(
        ctx: Any, views_VD: Tensor, other_V: Tensor, queue_QD: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        loss_V, log_sum_V = torch.empty_like(views_VD[:, 0]), torch.empty_like(views_VD[:, 0])
        nearest_V = torch.empty_like(other_V, dtype=torch.bool)
        for start in range(0, len(views_VD), chunk):
            rows = slice(start, start + chunk)
            logits = _logits(views_VD, queue_QD, rows, temperature)
            own_C = logits.gather(1, other_V[rows, None]).squeeze(1)
            log_sum_V[rows] = logits.logsumexp(1)
            loss_V[rows] = log_sum_V[rows] - own_C
            # Of equals none is nearest: collapsed embeddings are not accurate.
            nearest_V[rows] = (logits >= own_C[:, None]).sum(1) == 1
        ctx.save_for_backward(views_VD, other_V, queue_QD, log_sum_V)
        ctx.temperature, ctx.chunk = temperature, chunk
        accuracy = nearest_V.to(views_VD.dtype).mean()
        ctx.mark_non_differentiable(accuracy)
        return loss_V.mean(), accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        views_VD, other_V, queue_QD, log_sum_V = ctx.saved_tensors
        slopes_VD = torch.zeros_like(views_VD)
        # The loop runs the backward pass inside autocast, which would round these products.
        with torch.autocast(views_VD.device.type, enabled=False):
            for start in range(0, len(views_VD), ctx.chunk):
                rows = slice(start, start + ctx.chunk)
                slope = _logits(views_VD, queue_QD, rows, ctx.temperature).sub_(log_sum_V[rows, None]).exp_()
                own = other_V[rows, None]
                slope.scatter_add_(1, own, torch.full_like(own, -1, dtype=slope.dtype))
                among_views, among_queue = slope.tensor_split([len(views_VD)], dim=1)
                slopes_VD[rows] += among_views @ views_VD
                slopes_VD[rows] += among_queue @ queue_QD
                slopes_VD += among_views.T @ views_VD[rows]
        return slopes_VD * (gradients[0] / (ctx.temperature * len(views_VD))), None, None, None, None


def _logits(views_VD: Tensor, queue_QD: Tensor, rows: slice, temperature: float) -> Tensor:
    """[C, V + Q]: cosines over the temperature, minus infinity with itself."""
    own_CD = views_VD[rows]
    logits = own_CD.new_empty(len(own_CD), len(views_VD) + len(queue_QD))
    torch.mm(own_CD, views_VD.T, out=logits[:, : len(views_VD)])
    torch.mm(own_CD, queue_QD.T, out=logits[:, len(views_VD) :])
    logits.div_(temperature)
    logits.diagonal(rows.start).fill_(-torch.inf)
    return logits
