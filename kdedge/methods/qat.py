"""Distilled quantization-aware training: a network with 8-bit roundings learns the answers of its float original.

B labeled images, U unlabeled images, M = B + U or B + 2 U rows of a pass, K classes.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Self, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kdedge.config import Config
from kdedge.data.batches import Batch
from kdedge.losses.kd import kd
from kdedge.methods.step import Method, Step
from kdedge.methods.teacher import LiveTeacher, ask
from kdedge.models.zoo import Network

__all__ = ["DistilledQAT", "DistilledQATConfig"]


class DistilledQATConfig(Config):
    """What the rounded network learns from; no label is needed."""

    # Of the unlabeled images: weak views, or strong ones as well, which cost half as much again and were no better.
    views: Literal["weak", "both"] = "weak"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    labeled_weight: Annotated[float, Field(ge=0)] = 0.0  # of the cross entropy on the labeled images


@final
class DistilledQAT(Method):
    """L = kd(rounded, float) over the rows + labeled_weight mean_B H(y, rounded).

    The teacher sees the very views: Mishra and Marr (arXiv 1711.05852, section 5.3, scheme C: both networks trained
    already, the float one fixed) with Hinton's loss. Averaged over the M rows that `views` asks for.
    """

    def __init__(self, network: Network, config: DistilledQATConfig, teacher: LiveTeacher) -> None:
        super().__init__(network)
        self.config, self.teacher = config, teacher

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to` calls: the teacher follows, though it is no submodule and must not become one."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.teacher.move(fn)
        return self

    @property
    def asked(self) -> Sequence[Network]:
        return [self.teacher.network]

    @property
    def extra_flops_an_image(self) -> int:
        return self.teacher.flops_an_image

    def forward(self, batch: Batch) -> Step:
        labeled, unlabeled = len(batch.labels_B), len(batch.position_U)
        rows = labeled + unlabeled * (2 if self.config.views == "both" else 1)
        images = batch.images[:rows]
        position_M = torch.cat([batch.position_B, batch.position_U, batch.position_U])[:rows]
        rounded_MK = ask(self.network, images).logits_MK
        float_MK = self.teacher.answers(images, position_M).logits_MK
        loss_distill = kd(rounded_MK, float_MK, self.config.temperature)
        logs = {
            "loss_distill": loss_distill.detach(),
            "agreement": (rounded_MK.argmax(1) == float_MK.argmax(1)).float().mean(),
        }
        if not self.config.labeled_weight:
            return Step(loss_distill, logs)
        loss_labeled = functional.cross_entropy(rounded_MK[:labeled], batch.labels_B)
        return Step(
            loss_distill + self.config.labeled_weight * loss_labeled, logs | {"loss_labeled": loss_labeled.detach()}
        )
