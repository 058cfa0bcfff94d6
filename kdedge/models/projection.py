"""The head that contrastive learning compares embeddings after, and that is not needed afterwards.

B batch, F features, D numbers of an embedding.
"""

from typing import final

from torch import nn

from kdedge.models.zoo import projection_layer

__all__ = ["ProjectionHead"]


@final
class ProjectionHead(nn.Sequential):
    """[B, F] -> [B, D]: layers of the features' width, then one to D numbers without bias or ReLU.

    SimCLR, arXiv 2002.05709, section 4.2, with the three layers and the batch norm after each of SimCLRv2 (arXiv
    2006.10029; google-research/simclr, model_util.py). Item 0 is what fine-tuning may keep (`ModelSpec.neck`). Batch
    norm counts the whole batch in every process, since features are gathered before.
    """

    def __init__(self, features: int, layers: int, dims: int) -> None:
        """ValueError with fewer than one layer."""
        if layers < 1:
            raise ValueError(f"a projection head of {layers} layers was asked for, and at least 1 was expected")
        super().__init__(*(projection_layer(features) for _ in range(layers - 1)), _last(features, dims))


def _last(features: int, dims: int) -> nn.Module:
    """Its batch norm has no bias either: embeddings lie around the origin, where cosines tell them apart."""
    norm = nn.BatchNorm1d(dims)
    norm.register_parameter("bias", None)
    return nn.Sequential(nn.Linear(features, dims, bias=False), norm)
