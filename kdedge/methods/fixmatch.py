"""FixMatch (Sohn et al., 2020, arXiv 2001.07685): the outer network.

B labeled images, U unlabeled images, K classes.
"""

from typing import Annotated, Literal, final

from pydantic import Field
from torch import Tensor

from kdedge.config import Config
from kdedge.data.batches import Batch
from kdedge.losses.consistency import adjustment, labeled_cross_entropy, masked_cross_entropy
from kdedge.methods.health import pseudo_label_logs
from kdedge.methods.step import Method, Step
from kdedge.methods.thresholds import Policy, ThresholdConfig
from kdedge.models.zoo import Network

__all__ = ["FixMatch", "FixMatchConfig", "logits_of"]


class FixMatchConfig(Config):
    """Eq. 4 and table 4 of the paper."""

    kind: Literal["fixmatch"] = "fixmatch"
    thresholds: ThresholdConfig = ThresholdConfig()
    unlabeled_weight: Annotated[float, Field(ge=0)] = 1.0
    logit_adjustment: Annotated[float, Field(ge=0)] = 0.0  # 1 for long-tailed labels; arXiv 2007.07314


def logits_of(network: Network, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, K], [U, K], [U, K] of the labeled, weak and strong views in one forward pass.

    One pass, so that batch normalisation sees the mixture (google-research/fixmatch interleaves for the same reason).
    """
    unlabeled = len(batch.position_U)
    labeled, weak, strong = network(batch.images).float().split([len(batch.labels_B), unlabeled, unlabeled])
    return labeled, weak, strong


@final
class FixMatch(Method):
    """L = mean_B H(y, weak x) + unlabeled_weight (1 / U) sum_U weight_u H(label_u, strong u) + the policy's own term.

    Eq. 3 and 4 of the paper with the fixed policy, where weight is 1[max q >= threshold] and label argmax q.
    """

    scaled_prior_K: Tensor | None

    def __init__(
        self, network: Network, config: FixMatchConfig, policy: Policy, log_prior_K: Tensor | None = None
    ) -> None:
        """`log_prior` (`kdedge.losses.consistency.log_prior` of the labels) is needed for logit adjustment only."""
        super().__init__(network)
        self.config = config
        self.policy = policy
        # Not persistent: it is made again from the labels.
        self.register_buffer("scaled_prior_K", adjustment(config.logit_adjustment, log_prior_K), persistent=False)

    def forward(self, batch: Batch) -> Step:
        labeled_BK, weak_UK, strong_UK = logits_of(self.network, batch)
        pseudo = self.policy(labeled_BK, weak_UK, batch.position_U)
        loss_labeled = labeled_cross_entropy(labeled_BK, batch.labels_B, self.scaled_prior_K)
        loss_unlabeled = masked_cross_entropy(strong_UK, pseudo.label_U, pseudo.weight_U)
        loss = loss_labeled + self.config.unlabeled_weight * loss_unlabeled
        logs = {"loss_labeled": loss_labeled.detach(), "loss_unlabeled": loss_unlabeled.detach()}
        loss_extra = self.policy.extra_loss(strong_UK, pseudo)
        if loss_extra is not None:
            loss = loss + loss_extra
            logs["loss_extra"] = loss_extra.detach()
        classes = labeled_BK.shape[1]
        return Step(loss, logs | pseudo_label_logs(pseudo.label_U, pseudo.weight_U, batch.truth_U, classes))
