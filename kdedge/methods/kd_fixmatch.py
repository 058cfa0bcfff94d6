"""The inner network of KD-FixMatch (arXiv 2309.05826): FixMatch that also has the outer network's trusted labels.

The paper's text was not at hand; this is the reconstruction of reference section 1.3. Distillation to the outer
network's answers (`distill`) is our extension for compact students.

B labeled images, U unlabeled images, M = B + 2 U rows of a pass, N all unlabeled images of the run, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self, final

import torch
from pydantic import Field
from torch import Tensor

from kdedge.config import Config
from kdedge.data.batches import Batch
from kdedge.losses.consistency import adjustment, labeled_cross_entropy, masked_cross_entropy, merge_targets
from kdedge.losses.robust import masked_symmetric_cross_entropy
from kdedge.methods.distill import DistillConfig, Distiller
from kdedge.methods.health import pseudo_label_logs
from kdedge.methods.step import Method, Step
from kdedge.methods.teacher import Answers, LiveTeacher, Teacher, ask
from kdedge.methods.thresholds import Policy, PseudoLabels, ThresholdConfig
from kdedge.models.zoo import Network

__all__ = ["KDFixMatch", "KDFixMatchConfig", "TrustedTargets"]

NonNegative = Annotated[float, Field(ge=0)]


class KDFixMatchConfig(Config):
    """The losses of the inner network.

    `merge` says what a trusted label is for. heuristic1: the target where the network's own label does not have full
    weight; outer-first: the target wherever there is one; separate-term: the target of a term of its own, beside
    FixMatch's.
    """

    kind: Literal["kd-fixmatch"] = "kd-fixmatch"
    thresholds: ThresholdConfig = ThresholdConfig()
    labeled_weight: NonNegative = 1.0  # 0 is training without labels
    unlabeled_weight: NonNegative = 1.0  # 0 leaves labels and distillation
    merge: Literal["heuristic1", "outer-first", "separate-term"] = "heuristic1"
    trusted_weight: NonNegative = 1.0  # of the separate term
    robust_loss: Literal["ce", "sce"] = "sce"
    sce_alpha: NonNegative = 0.1  # the CIFAR-10 values of arXiv 1908.06112
    sce_beta: NonNegative = 1.0
    logit_adjustment: NonNegative = 0.0  # 1 for long-tailed labels; arXiv 2007.07314
    distill: DistillConfig = DistillConfig()


@dataclass(frozen=True)
class TrustedTargets:
    """What is known of each unlabeled image, in the order of `Pool.unlabeled`.

    `label` is -1 where the outer network is not trusted; `usable` is 0.0 where the image was found to show none of
    the classes: it counts 0 in the unlabeled and in the distillation term.
    """

    label_N: Tensor
    usable_N: Tensor


@final
class KDFixMatch(Method):
    """L = labeled_weight L_s + unlabeled_weight (1 / U) sum_U weight_u R(target_u, strong u) + the policy's own term
    + distill.weight D(labeled, weak and strong views).

    With merge separate-term, + trusted_weight times the mean of R(trusted label, strong u) over the trusted images of
    the batch. Without trusted labels and teacher, and with robust_loss ce, it is FixMatch, bit for bit.
    """

    trusted_label_N: Tensor
    usable_N: Tensor
    scaled_prior_K: Tensor | None

    def __init__(
        self,
        network: Network,
        config: KDFixMatchConfig,
        policy: Policy,
        trusted: TrustedTargets,
        teacher: Teacher | None,
        log_prior_K: Tensor | None = None,
    ) -> None:
        """Without a teacher there is no distillation. `log_prior` is needed for logit adjustment only."""
        super().__init__(network)
        self.config = config
        self.policy = policy
        # Not persistent: they are in trusted.npz, and must not travel with the student.
        label_N = trusted.label_N.masked_fill(trusted.usable_N == 0, -1)
        self.register_buffer("trusted_label_N", label_N, persistent=False)
        self.register_buffer("usable_N", trusted.usable_N.float(), persistent=False)
        self.register_buffer("scaled_prior_K", adjustment(config.logit_adjustment, log_prior_K), persistent=False)
        self._all_usable = bool((trusted.usable_N > 0).all())
        self.teacher = teacher if config.distill.resolved_weight else None
        self.distiller = (
            None if self.teacher is None else Distiller(config.distill, network, self.teacher, len(trusted.label_N))
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to` calls: the teacher follows, though it is no submodule and must not become one."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.teacher is not None:
            self.teacher.move(fn)
        return self

    @property
    def extra_flops_an_image(self) -> int:
        """Of the teacher, for each image that passes through the network in training."""
        return 0 if self.teacher is None else self.teacher.flops_an_image

    @property
    def asked(self) -> Sequence[Network]:
        """The teacher, where it sees the student's own views."""
        return [self.teacher.network] if isinstance(self.teacher, LiveTeacher) else []

    @property
    def needs_all_images(self) -> bool:
        """For mixed images, and for maps of a middle layer."""
        return self._mixes or (self.distiller is not None and self.distiller.student_middle is not None)

    @property
    def passes(self) -> int:
        """How often an image passes through the network: mixed images need a pass beside FixMatch's."""
        return 2 if self._mixes and not self._distils_only else 1

    @property
    def _mixes(self) -> bool:
        return self.distiller is not None and self.config.distill.mixup

    @property
    def _distils_only(self) -> bool:
        config = self.config
        return not (config.labeled_weight or config.unlabeled_weight or self._trusted_term)

    @property
    def _trusted_term(self) -> bool:
        return self.config.merge == "separate-term" and self.config.trusted_weight > 0

    def forward(self, batch: Batch) -> Step:
        if self._mixes and self._distils_only:  # function matching: nobody needs the images as they are
            loss_distill = self._distill(batch, None)
            return Step(loss_distill, {"loss_distill": loss_distill.detach()})
        middle = None if self.distiller is None else self.distiller.student_middle
        # One pass, so that batch normalisation sees the mixture, as in FixMatch.
        student = ask(self.network, batch.images, middle)
        loss, logs = self._fixmatch(batch, student.logits_MK)
        if self.distiller is not None:
            loss_distill = self._distill(batch, student)
            loss = loss + loss_distill
            logs["loss_distill"] = loss_distill.detach()
        return Step(loss, logs)

    def _fixmatch(self, batch: Batch, logits_MK: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """All terms but distillation."""
        config = self.config
        unlabeled = len(batch.position_U)
        labeled_BK, weak_UK, strong_UK = torch.split(logits_MK, [len(batch.labels_B), unlabeled, unlabeled])
        trusted_U = self.trusted_label_N[batch.position_U]
        own = self._own_labels(labeled_BK, weak_UK, batch.position_U)
        target_U, weight_U = self._targets(own, trusted_U)
        loss_labeled = labeled_cross_entropy(labeled_BK, batch.labels_B, self.scaled_prior_K)
        loss_unlabeled = self._robust(strong_UK, target_U, weight_U)
        loss = config.labeled_weight * loss_labeled + config.unlabeled_weight * loss_unlabeled
        logs = {"loss_labeled": loss_labeled.detach(), "loss_unlabeled": loss_unlabeled.detach()}
        loss_extra = self.policy.extra_loss(strong_UK, own)
        if loss_extra is not None:
            loss = loss + loss_extra
            logs["loss_extra"] = loss_extra.detach()
        if self._trusted_term:
            mask_U = (trusted_U >= 0).float()
            # _robust divides by all U images; here the mean is over the trusted ones.
            share = mask_U.mean().clamp(min=1 / max(unlabeled, 1))
            loss_trusted = self._robust(strong_UK, trusted_U.clamp(min=0), mask_U) / share
            loss = loss + config.trusted_weight * loss_trusted
            logs["loss_trusted"] = loss_trusted.detach()
        if not (config.unlabeled_weight or self._trusted_term):  # nobody learns from them, so nobody is warned of them
            return loss, logs
        return loss, logs | pseudo_label_logs(target_U, weight_U, batch.truth_U, labeled_BK.shape[1])

    def _own_labels(self, labeled_BK: Tensor, weak_UK: Tensor, position_U: Tensor) -> PseudoLabels:
        """What the policy says of the usable images; it does not see the others, which would steer its thresholds."""
        if self._all_usable:
            everywhere: PseudoLabels = self.policy(labeled_BK, weak_UK, position_U)
            return everywhere
        label_U = torch.zeros_like(position_U)
        weight_U, probs_UK = torch.zeros_like(weak_UK[:, 0]), torch.zeros_like(weak_UK)
        rows = self.usable_N[position_U].nonzero().squeeze(1)
        if len(rows):
            own = self.policy(labeled_BK, weak_UK[rows], position_U[rows])
            label_U[rows], weight_U[rows], probs_UK[rows] = own.label_U, own.weight_U, own.probs_UK
        return PseudoLabels(label_U, weight_U.detach(), probs_UK.detach())

    def _targets(self, own: PseudoLabels, trusted_U: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.merge == "separate-term":
            return own.label_U, own.weight_U
        # Confident is full weight: SoftMatch gives every label some, and would leave no image to the trusted labels.
        sure_U = (own.weight_U == 1).float()
        outer_first = self.config.merge == "outer-first"
        target_U, weight_U = merge_targets(own.label_U, sure_U, trusted_U, outer_first=outer_first)
        return target_U, torch.maximum(weight_U, own.weight_U)

    def _robust(self, strong_UK: Tensor, target_U: Tensor, weight_U: Tensor) -> Tensor:
        config = self.config
        if config.robust_loss == "ce":
            return masked_cross_entropy(strong_UK, target_U, weight_U)
        return masked_symmetric_cross_entropy(strong_UK, target_U, weight_U, config.sce_alpha, config.sce_beta)

    def _distill(self, batch: Batch, student: Answers | None) -> Tensor:
        """The distillation term over the usable rows; with mixup the student answers anew, for the mixed images."""
        assert self.distiller is not None
        assert self.teacher is not None
        labeled = len(batch.labels_B)
        position_M = torch.cat([batch.position_B, batch.position_U, batch.position_U])
        rows = None
        if not self._all_usable:  # asked once, since to look at every batch would make it wait for the device
            usable_M = self.usable_N[position_M] > 0
            usable_M[:labeled] = True  # somebody gave it a label
            rows = usable_M.nonzero().squeeze(1)
        if student is None or self._mixes:
            images = _mixed(batch.images if rows is None else batch.images[rows])
            student = ask(self.network, images)
            position_M = position_M if rows is None else position_M[rows]
            teacher = self.teacher.answers(images, position_M)
        else:  # rows are of the answers: a batch that processes share has the whole of them, but not of the images
            teacher = self.teacher.answers(batch.images, position_M, self.distiller.teacher_middle)
            if rows is not None:
                student, teacher, position_M = student.rows(rows), teacher.rows(rows), position_M[rows]
        target_M = torch.cat([batch.labels_B, teacher.logits_MK[labeled:].argmax(1)])
        term: Tensor = self.distiller(student, teacher, target_M, position_M)
        return term


def _mixed(images_MCHW: Tensor) -> Tensor:
    """Each image mixed with the one before it in the batch, one share for all, even in 0..1 (mixup of Beta(1, 1))."""
    share = torch.rand(())  # on the CPU, so that a step is the same on every device
    return share * images_MCHW + (1 - share) * images_MCHW.roll(1, 0)
