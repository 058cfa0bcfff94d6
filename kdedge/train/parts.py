"""A batch through a backbone in parts, for networks whose activations do not fit in memory at once.

B images of a batch, C channels, H and W pixels, F features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["in_parts"]


def in_parts(parts: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """For `Network.compute`: the backbone runs over `parts` chunks of the batch, whose activations are not kept.

    They are computed again, chunk by chunk, in the backward pass (Chen et al., 2016, arXiv 1604.06174), with the same
    draws of dropout: memory falls to that of one chunk, and a step takes about a third longer. The loss still sees
    all features of the batch at once, so its gradients are those of the whole, whatever it compares with what.

    Batch norm is the exception: a chunk is normalised by its own statistics. The running statistics move once a step:
    their mean is that of the whole batch; their variance leaves out how the chunks' means differ.
    """

    def compute(backbone: nn.Module, x_BCHW: Tensor) -> Tensor:
        norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm) and m.training and m.momentum]
        chunks, seen = x_BCHW.tensor_split(max(1, min(parts, len(x_BCHW) // 2))), 0  # of two images or more
        features = []
        for chunk in chunks:
            seen += len(chunk)
            with _counted_as(len(chunk) / len(x_BCHW), seen / len(x_BCHW), norms):
                features.append(
                    checkpoint(backbone, chunk, use_reentrant=False, context_fn=lambda: _first_and_again(backbone))
                )
        for norm in norms:
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked -= len(chunks) - 1
        return torch.cat(features)

    return compute


@contextmanager
def _counted_as(share: float, share_so_far: float, norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Momenta such that after all chunks (1 - M) running + M sum share statistics stands there, M a step's momentum.

    After chunk i the running statistics are that sum over the chunks so far, divided by its weights.
    """
    momenta = [norm.momentum or 0.0 for norm in norms]
    for norm, whole in zip(norms, momenta, strict=True):
        norm.momentum = whole * share / (1 - whole + whole * share_so_far)
    try:
        yield
    finally:
        for norm, whole in zip(norms, momenta, strict=True):
            norm.momentum = whole


def _first_and_again(backbone: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the forward pass and around its repetition, which must not move the statistics a second time."""
    return nullcontext(), _buffers_kept(backbone)


@contextmanager
def _buffers_kept(backbone: nn.Module) -> Iterator[None]:
    """Inside the block the backbone has copies of its buffers."""
    own = [(module, name, buffer) for module in backbone.modules() for name, buffer in module.named_buffers("", False)]
    for module, name, buffer in own:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in own:
            setattr(module, name, buffer)
