"""Labels only: the baseline every other number is read against, and the fine-tuning of what was pre-trained."""

from typing import Literal, final

from torch.nn import functional

from kdedge.config import Config
from kdedge.data.batches import Batch
from kdedge.methods.step import Method, Step

__all__ = ["FineTuneConfig", "Supervised"]


class FineTuneConfig(Config):
    """Training on the labels alone, in place of FixMatch.

    `train` head is linear evaluation: the rest keeps the weights and the statistics it starts with, and the head is the
    logistic regression on the features of the labeled images without views (`kdedge.train.probe`). There are no steps
    then, and nothing of `optim` is read.
    """

    kind: Literal["fine-tune"] = "fine-tune"
    train: Literal["all", "head"] = "all"


@final
class Supervised(Method):
    """Cross entropy on weak views of the labeled images, averaged over the batch."""

    def forward(self, batch: Batch) -> Step:
        loss = functional.cross_entropy(self.network(batch.images).float(), batch.labels_B)
        return Step(loss, {"loss_labeled": loss.detach()})
