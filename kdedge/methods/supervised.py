"""Labels only: the baseline every other number is read against."""

from typing import final

from torch.nn import functional

from kdedge.data.batches import Batch
from kdedge.methods.step import Method, Step

__all__ = ["Supervised"]


@final
class Supervised(Method):
    """Cross entropy on weak views of the labeled images, averaged over the batch."""

    def forward(self, batch: Batch) -> Step:
        loss = functional.cross_entropy(self.network(batch.images).float(), batch.labels_B)
        return Step(loss, {"loss_labeled": loss.detach()})
