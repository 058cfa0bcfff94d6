"""FixMatch (Sohn et al., 2020, arXiv 2001.07685): the outer network.

B labeled images, U unlabeled images, K classes.
"""

from typing import Annotated, final

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdedge.config import Config
from kdedge.data.batches import Batch
from kdedge.losses.consistency import masked_cross_entropy, pseudo_labels
from kdedge.methods.health import pseudo_label_logs
from kdedge.methods.step import Method, Step
from kdedge.models.zoo import Network

__all__ = ["FixMatch", "FixMatchConfig", "logits_of"]


class FixMatchConfig(Config):
    """Eq. 4 and table 4 of the paper."""

    threshold: Annotated[float, Field(ge=0)] = 0.95  # above 1 no pseudo label is ever kept
    unlabeled_weight: Annotated[float, Field(ge=0)] = 1.0


def logits_of(network: Network, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, K], [U, K], [U, K] of the labeled, weak and strong views in one forward pass.

    One pass, so that batch normalisation sees the mixture (google-research/fixmatch interleaves for the same reason).
    """
    unlabeled = len(batch.position_U)
    labeled, weak, strong = network(batch.images).float().split([len(batch.labels_B), unlabeled, unlabeled])
    return labeled, weak, strong


@final
class FixMatch(Method):
    """L = mean_B H(y, weak x) + unlabeled_weight (1 / U) sum_U 1[max q >= threshold] H(argmax q, strong u)."""

    def __init__(self, network: Network, config: FixMatchConfig) -> None:
        super().__init__(network)
        self.config = config

    def forward(self, batch: Batch) -> Step:
        labeled_BK, weak_UK, strong_UK = logits_of(self.network, batch)
        label_U, mask_U = pseudo_labels(weak_UK, self.config.threshold)
        loss_labeled = functional.cross_entropy(labeled_BK, batch.labels_B)
        loss_unlabeled = masked_cross_entropy(strong_UK, label_U, mask_U)
        return Step(
            loss_labeled + self.config.unlabeled_weight * loss_unlabeled,
            {"loss_labeled": loss_labeled.detach(), "loss_unlabeled": loss_unlabeled.detach()}
            | pseudo_label_logs(label_U, mask_U, batch.truth_U, labeled_BK.shape[1]),
        )
