"""The inner network of KD-FixMatch (arXiv 2309.05826): FixMatch that also has the outer network's trusted labels.

The paper's text was not at hand; this is the reconstruction of reference section 1.3. Soft distillation to the outer
network's probabilities (`kd_weight`) is our extension for compact students.

B labeled images, U unlabeled images, N all unlabeled images of the run, K classes.
"""

from typing import Annotated, Literal, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdedge.config import Config
from kdedge.data.batches import Batch
from kdedge.losses.consistency import masked_cross_entropy, merge_targets, pseudo_labels
from kdedge.losses.kd import kd
from kdedge.losses.robust import masked_symmetric_cross_entropy
from kdedge.methods.fixmatch import logits_of
from kdedge.methods.health import pseudo_label_logs
from kdedge.methods.step import Method, Step
from kdedge.models.zoo import Network

__all__ = ["KDFixMatch", "KDFixMatchConfig"]


class KDFixMatchConfig(Config):
    """The unlabeled loss of the inner network."""

    threshold: Annotated[float, Field(ge=0)] = 0.95
    unlabeled_weight: Annotated[float, Field(ge=0)] = 1.0
    merge: Literal["heuristic1", "outer-first"] = "heuristic1"
    robust_loss: Literal["ce", "sce"] = "sce"
    sce_alpha: Annotated[float, Field(ge=0)] = 0.1  # the CIFAR-10 values of arXiv 1908.06112
    sce_beta: Annotated[float, Field(ge=0)] = 1.0
    kd_weight: Annotated[float, Field(ge=0)] = 1.0  # 0 is KD-FixMatch without soft distillation
    kd_temperature: Annotated[float, Field(gt=0)] = 1.0


@final
class KDFixMatch(Method):
    """L = L_s + unlabeled_weight (1 / U) sum_U weight_u R(target_u, strong u) + kd_weight KD(weak and strong views)."""

    trusted_label_N: Tensor
    teacher_logits_NK: Tensor

    def __init__(
        self, network: Network, config: KDFixMatchConfig, trusted_label_N: Tensor, teacher_logits_NK: Tensor
    ) -> None:
        """`trusted_label` is -1 where the outer network is not trusted; both are in the order of `Pool.unlabeled`."""
        super().__init__(network)
        self.config = config
        # Not persistent: both are in trusted.npz, and must not travel with the student.
        self.register_buffer("trusted_label_N", trusted_label_N, persistent=False)
        self.register_buffer("teacher_logits_NK", teacher_logits_NK, persistent=False)

    def forward(self, batch: Batch) -> Step:
        config = self.config
        labeled_BK, weak_UK, strong_UK = logits_of(self.network, batch)
        own_label_U, own_mask_U = pseudo_labels(weak_UK, config.threshold)
        target_U, weight_U = merge_targets(
            own_label_U, own_mask_U, self.trusted_label_N[batch.position_U], outer_first=config.merge == "outer-first"
        )
        loss_labeled = functional.cross_entropy(labeled_BK, batch.labels_B)
        loss_unlabeled = self._unlabeled(strong_UK, target_U, weight_U)
        loss = loss_labeled + config.unlabeled_weight * loss_unlabeled
        logs = {"loss_labeled": loss_labeled.detach(), "loss_unlabeled": loss_unlabeled.detach()}
        if config.kd_weight:
            teacher_UK = self.teacher_logits_NK[batch.position_U]
            loss_kd = kd(torch.cat([weak_UK, strong_UK]), torch.cat([teacher_UK, teacher_UK]), config.kd_temperature)
            loss = loss + config.kd_weight * loss_kd
            logs["loss_kd"] = loss_kd.detach()
        return Step(loss, logs | pseudo_label_logs(target_U, weight_U, batch.truth_U, labeled_BK.shape[1]))

    def _unlabeled(self, strong_UK: Tensor, target_U: Tensor, weight_U: Tensor) -> Tensor:
        config = self.config
        if config.robust_loss == "ce":
            return masked_cross_entropy(strong_UK, target_U, weight_U)
        return masked_symmetric_cross_entropy(strong_UK, target_U, weight_U, config.sce_alpha, config.sce_beta)
